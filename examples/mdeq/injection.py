"""What enters the cell: an input made into one injection a branch."""

from __future__ import annotations

from torch import Tensor, nn

from mdeq.fusion import down


class CodeInjection(nn.Module):
    """Latent codes ``(B, latent)`` to every branch, linearly.

    A dense map to a big image would hold nearly all the parameters (17 million for 32 channels of
    64×64). So codes are mapped to at most ``grid``×``grid`` pixels, and pixels are then doubled and
    convolved up to a branch's size. At the start an injection is of unit size, at x = 0 too, where
    it is the biases: were it small, the cell would be no contraction there.
    """

    def __init__(
        self, latent: int, channels: tuple[int, ...], sizes: tuple[int, ...], grid: int
    ) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            self.branch(latent, c, size, grid) for c, size in zip(channels, sizes, strict=True)
        )

    @staticmethod
    def branch(latent: int, channels: int, size: int, grid: int) -> nn.Sequential:
        sizes = [size]
        while sizes[-1] > grid:
            sizes.append((sizes[-1] + 1) // 2)
        small, *larger = reversed(sizes)
        dense = nn.Linear(latent, channels * small**2)
        nn.init.kaiming_normal_(dense.weight, nonlinearity="linear")
        nn.init.normal_(dense.bias)
        layers: list[nn.Module] = [dense, nn.Unflatten(1, (channels, small, small))]
        for side in larger:
            conv = nn.Conv2d(channels, channels, 3, padding=1)
            nn.init.kaiming_normal_(conv.weight, nonlinearity="linear")
            layers += [nn.Upsample(size=(side, side)), conv]
        return nn.Sequential(*layers)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(branch(x) for branch in self.branches)


def stem(colors: int, width: int, stride: int, groups: int) -> nn.Sequential:
    """From an image to ``width`` channels of 1/``stride`` of its size.

    By convolutions that each halve it, since one of a stride beyond 2 would pass over pixels.
    """
    strides = []
    while stride % 2 == 0 and stride > 2:
        strides.append(2)
        stride //= 2
    strides.append(stride)
    layers: list[nn.Module] = []
    for k, each in enumerate(strides, start=1 - len(strides)):
        out = max(width >> -k, groups) // groups * groups
        # With a bias: without one a blank image would inject nothing.
        layers += [
            nn.Conv2d(colors, out, 3, stride=each, padding=1),
            nn.GroupNorm(groups, out),
            nn.ReLU(),
        ]
        colors = out
    return nn.Sequential(*layers)


class ImageInjection(nn.Module):
    """Images ``(B, C, H, W)`` to every branch; the finest is at 1/``stride`` of their size."""

    def __init__(self, image: int, channels: tuple[int, ...], stride: int, groups: int) -> None:
        super().__init__()
        finest = channels[0]
        self.stem = stem(image, finest, stride, groups)
        self.paths = nn.ModuleList(down(finest, c, i, groups) for i, c in enumerate(channels))

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        finest = self.stem(image)
        return tuple(path(finest) for path in self.paths)
