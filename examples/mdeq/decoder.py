"""A decoder: from a latent code, by an equilibrium, to an image."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import conv_transpose2d

from mdeq.block import NARROW
from mdeq.cell import Cell, halvings
from mdeq.injection import CodeInjection

#: Where a finest branch is at a smaller part of the image's size than this, the head doubles first.
LARGEST_PATCH = 4


class Refine(nn.Module):
    """``(B, C, H, W)`` plus what two convolutions make of it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.widen = nn.Conv2d(channels, 2 * channels, 3, padding=1)
        self.narrow = nn.Conv2d(2 * channels, channels, 3, padding=1)
        with torch.no_grad():  # nearly nothing at the start
            self.narrow.weight.mul_(NARROW)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.narrow(self.widen(h).relu())


class Patches(nn.ConvTranspose2d):
    """``stride`` times larger: each place paints a patch, which fades into its neighbours'.

    Patches side by side, as of a pixel shuffle, would show their edges.
    """

    def __init__(self, channels: int, colors: int, stride: int) -> None:
        margin = (stride + 1) // 2
        side = stride + 2 * margin
        super().__init__(channels, colors, side, stride, margin)
        profile = torch.sin(math.pi * (torch.arange(side) + 0.5) / side) ** 2
        self.register_buffer("window", profile[:, None] * profile, persistent=False)
        with torch.no_grad():
            self.weight.mul_(1 / self.window.square().mean().sqrt())  # as it was on the whole

    def forward(self, h: Tensor) -> Tensor:
        kernel = self.weight * self.window
        return conv_transpose2d(h, kernel, self.bias, self.stride, self.padding)


def head(channels: int, colors: int, stride: int) -> nn.Sequential:
    """From a state's finest branch to an image: doubled while patches would be large, then painted.

    Nearly linear at the start, so that a code reaches the image as it is.
    """
    layers: list[nn.Module] = [Refine(channels)]
    while stride > LARGEST_PATCH and stride % 2 == 0:
        fewer = max(channels // 2, 8)
        layers += [nn.ConvTranspose2d(channels, fewer, 4, 2, 1), Refine(fewer)]
        channels, stride = fewer, stride // 2
    return nn.Sequential(*layers, Patches(channels, colors, stride), nn.Sigmoid())


class Decoder(nn.Module):
    """The image of a code x is read from the state z = f(z, x).

    The cell ends in a norm, which takes away how long a code is. So what is injected is added
    again behind it: z = cell(z, u(x)) + u(x). The state then follows the code linearly, near
    enough for images to be fitted in few sweeps; the cell adds what is not linear.

    Args:
        latent: the length of a code.
        image: (channels, side) of the images.
        channels: of each branch, finest first.
        stride: the finest branch is at 1/``stride`` of the image's size; the head makes up for it.
        grid: the largest side that codes are mapped to densely (see ``CodeInjection``).
        expansion, groups: of the cell.
        skip: whether u(x) is added. The paper's decoder does without.

    The paper's decoder of 64×64 faces is
    ``Decoder(128, (3, 64), (32, 64, 128, 256), skip=False)``. A small one for a CPU:
    ``Decoder(64, (3, 64), (32, 64), stride=8)``.

    >>> import torch, implicitopt
    >>> model = Decoder(8, image=(1, 28), channels=(8, 16))
    >>> x = torch.zeros(2, 8)
    >>> z = implicitopt.fixed_point(model.f, x, model.start)
    >>> model.image(z).shape
    torch.Size([2, 1, 28, 28])
    """

    def __init__(
        self,
        latent: int,
        image: tuple[int, int] = (3, 64),
        channels: tuple[int, ...] = (32, 64, 128, 256),
        *,
        stride: int = 1,
        grid: int = 8,
        expansion: int = 5,
        groups: int = 4,
        skip: bool = True,
    ) -> None:
        super().__init__()
        colors, side = image
        if side % stride:
            raise ValueError(
                f"stride must divide the image's side, {side}; got {stride}. Use 1, or another "
                "size of images."
            )
        sizes = halvings(side // stride, len(channels))
        self.latent, self.skip = latent, skip
        self.cell = Cell(channels, sizes, expansion, groups)
        self.inject = CodeInjection(latent, channels, sizes, grid)
        self.head = head(channels[0], colors, stride)

    def f(self, z: tuple[Tensor, ...], x: Tensor) -> tuple[Tensor, ...]:
        """The layer; x is ``(B, latent)``."""
        injected = self.inject(x)
        image = self.cell(z, injected)
        if not self.skip:
            return image
        return tuple(part + u for part, u in zip(image, injected, strict=True))

    def start(self, x: Tensor) -> tuple[Tensor, ...]:
        """A state to start from: zeros."""
        return self.cell.start(x, len(x))

    def image(self, z: tuple[Tensor, ...]) -> Tensor:
        """The images in a state, ``(B, C, H, W)``, pixels in [0, 1]."""
        return self.head(z[0])
