"""The plain networks: an encoder of images, and a decoder with as many weights as another."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

LEAST = 4  # the side at which images are flattened, about


def levels(side: int) -> list[int]:
    """The sides that an image is halved to (rounded up), down to about ``LEAST``."""
    sides = [side]
    while sides[-1] > LEAST + 1:
        sides.append((sides[-1] + 1) // 2)
    return sides


def widths(base: int, count: int) -> list[int]:
    """The channels at each halving: doubled each time, up to 8 times the first."""
    return [base * min(2**k, 8) for k in range(count)]


class Encoder(nn.Module):
    """Images ``(B, C, H, H)`` to ``(B, outputs)``: strided convolutions and a linear layer."""

    def __init__(self, image: tuple[int, int], outputs: int, base: int = 16) -> None:
        super().__init__()
        colors, side = image
        sides = levels(side)
        layers: list[nn.Module] = []
        before = colors
        for channels in widths(base, len(sides) - 1):
            layers += [nn.Conv2d(before, channels, 3, stride=2, padding=1), norm(channels)]
            layers.append(nn.SiLU())
            before = channels
        layers += [nn.Flatten(), nn.Linear(before * sides[-1] ** 2, outputs)]
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)


class ConvDecoder(nn.Module):
    """Codes ``(B, latent)`` to images in [0, 1]: a linear layer, then upsampling convolutions."""

    def __init__(self, latent: int, image: tuple[int, int], base: int = 16) -> None:
        super().__init__()
        colors, side = image
        self.latent = latent
        # As in the equilibrium decoder, the finest pixels come from a shuffle: cheaper, as good.
        fine = 2 if side % 2 == 0 else 1
        *larger, small = levels(side // fine)
        channels = widths(base, len(larger) + 1)[-1]
        layers: list[nn.Module] = [
            nn.Linear(latent, channels * small**2),
            nn.Unflatten(1, (channels, small, small)),
        ]
        for size, out in zip(reversed(larger), reversed(widths(base, len(larger))), strict=True):
            layers += [norm(channels), nn.SiLU(), nn.Upsample(size=(size, size))]
            layers.append(nn.Conv2d(channels, out, 3, padding=1))
            channels = out
        layers += [norm(channels), nn.SiLU()]
        layers += [nn.Conv2d(channels, colors * fine**2, 3, padding=1), nn.PixelShuffle(fine)]
        self.layers = nn.Sequential(*layers, nn.Sigmoid())

    def forward(self, codes: Tensor) -> Tensor:
        return self.layers(codes)


def norm(channels: int) -> nn.GroupNorm:
    """Group norm in groups of about 8 channels."""
    return nn.GroupNorm(math.gcd(channels, max(1, channels // 8)), channels)


def parameters(module: nn.Module) -> int:
    """How many numbers a module learns."""
    return sum(p.numel() for p in module.parameters())


def matched(latent: int, image: tuple[int, int], target: int) -> ConvDecoder:
    """The decoder whose number of parameters is nearest to ``target``, by its width."""
    with torch.device("meta"):  # sizes alone, no memory
        counts = {w: parameters(ConvDecoder(latent, image, w)) for w in range(4, 257, 4)}
    found = min(counts, key=lambda width: abs(counts[width] - target))
    return ConvDecoder(latent, image, found)
