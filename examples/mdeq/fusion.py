"""The fusion of the branches: what each resolution hears of the others."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

#: The scale of the norm that ends the cell, at the start. Small, so that the untrained cell is a
#: contraction: the gain from state to state around a block is proportional to it.
SCALE = 0.35


def down(source: int, target: int, halvings: int, groups: int) -> nn.Sequential:
    """To a coarser branch: convolutions of stride 2, each with its norm."""
    layers: list[nn.Module] = []
    for k in range(halvings):
        last = k == halvings - 1
        out = target if last else source
        layers += [
            nn.Conv2d(source, out, 3, stride=2, padding=1, bias=False),
            nn.GroupNorm(groups, out),
        ]
        if not last:
            layers.append(nn.ReLU())
    return nn.Sequential(*layers)


def up(source: int, target: int, size: int, groups: int) -> nn.Sequential:
    """To a finer branch: mix the channels, then repeat the pixels."""
    return nn.Sequential(
        nn.Conv2d(source, target, 1, bias=False),
        nn.GroupNorm(groups, target),
        nn.Upsample(size=(size, size), mode="nearest"),
    )


def joined(channels: int, groups: int) -> nn.Sequential:
    """What follows the sum of the branches."""
    norm = nn.GroupNorm(groups, channels)
    nn.init.constant_(norm.weight, SCALE)
    return nn.Sequential(nn.ReLU(), weight_norm(nn.Conv2d(channels, channels, 1, bias=False)), norm)


class Fusion(nn.Module):
    """Every branch is brought to every resolution, and summed there."""

    def __init__(self, channels: tuple[int, ...], sizes: tuple[int, ...], groups: int) -> None:
        super().__init__()

        def path(i: int, j: int) -> nn.Module:
            """From branch j to branch i."""
            if j > i:
                return up(channels[j], channels[i], sizes[i], groups)
            return down(channels[j], channels[i], i - j, groups)  # nothing where i = j

        branches = range(len(channels))
        self.paths = nn.ModuleList(nn.ModuleList(path(i, j) for j in branches) for i in branches)
        self.joined = nn.ModuleList(joined(width, groups) for width in channels)

    def forward(self, z: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        sums = (
            sum(path(branch) for path, branch in zip(paths, z, strict=True)) for paths in self.paths
        )
        return tuple(end(total) for end, total in zip(self.joined, sums, strict=True))
