"""A decoder: from a latent code, by an equilibrium, to an image."""

from __future__ import annotations

from torch import Tensor, nn

from mdeq.cell import Cell, halvings
from mdeq.injection import CodeInjection


class Decoder(nn.Module):
    """The image of a code x is read from the state z = f(z, x).

    Args:
        latent: the length of a code.
        image: (channels, side) of the images.
        channels: of each branch, finest first.
        stride: the finest branch is at 1/``stride`` of the image's size; the head makes up for it.
        grid: the largest side that codes are mapped to densely (see ``CodeInjection``).
        expansion, groups: of the cell.

    The paper's decoder of 64×64 faces is ``Decoder(128, (3, 64), (32, 64, 128, 256))``. A small one
    for a CPU: ``Decoder(64, (3, 64), (16, 32, 48), stride=2)``.

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
    ) -> None:
        super().__init__()
        colors, side = image
        if side % stride:
            raise ValueError(
                f"stride must divide the image's side, {side}; got {stride}. Use 1, or another "
                "size of images."
            )
        sizes = halvings(side // stride, len(channels))
        self.latent = latent
        self.cell = Cell(channels, sizes, expansion, groups)
        self.inject = CodeInjection(latent, channels, sizes, grid)
        self.head = nn.Sequential(
            nn.Conv2d(channels[0], channels[0], 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels[0], colors * stride**2, 3, padding=1),
            nn.PixelShuffle(stride),
            nn.Sigmoid(),
        )

    def f(self, z: tuple[Tensor, ...], x: Tensor) -> tuple[Tensor, ...]:
        """The layer; x is ``(B, latent)``."""
        return self.cell(z, self.inject(x))

    def start(self, x: Tensor) -> tuple[Tensor, ...]:
        """A state to start from: zeros."""
        return self.cell.start(x, len(x))

    def image(self, z: tuple[Tensor, ...]) -> Tensor:
        """The images in a state, ``(B, C, H, W)``, pixels in [0, 1]."""
        return self.head(z[0])
