"""The cell: the layer whose fixed point is the model."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from mdeq.block import Block
from mdeq.fusion import Fusion


def halvings(size: int, count: int) -> tuple[int, ...]:
    """``size`` and its halves, rounded up: ``(28, 14, 7)``."""
    sizes = [size]
    for _ in range(count - 1):
        sizes.append((sizes[-1] + 1) // 2)
    return tuple(sizes)


class Cell(nn.Module):
    """One multiscale layer: a block in each branch, then their fusion.

        z⁺ = fusion(block₀(z₀, u₀, v₀), block₁(z₁, u₁, v₁), …)

    Args:
        channels: of each branch, finest first; multiples of ``groups``.
        sizes: the side of each branch's square images, each half of the one before (rounded up).
        expansion: how much wider the inside of a block is.
        groups: of every group norm.
        film: the length of the vector that ``forward`` takes as its third argument; each branch
            reads its own equal part of it. None: no such vector.

    Source: Bai, Koltun, Kolter, "Multiscale deep equilibrium models", NeurIPS 2020.
    """

    def __init__(
        self,
        channels: tuple[int, ...],
        sizes: tuple[int, ...],
        expansion: int = 5,
        groups: int = 4,
        film: int | None = None,
    ) -> None:
        super().__init__()
        check(channels, sizes, groups, film)
        self.channels, self.sizes = tuple(channels), tuple(sizes)
        part = None if film is None else film // len(channels)
        self.blocks = nn.ModuleList(Block(c, expansion, groups, part) for c in channels)
        self.fusion = Fusion(self.channels, self.sizes, groups)

    @property
    def shapes(self) -> tuple[tuple[int, int, int], ...]:
        """Of each branch's state: (channels, height, width)."""
        return tuple((c, s, s) for c, s in zip(self.channels, self.sizes, strict=True))

    @property
    def width(self) -> int:
        """How many numbers a state has."""
        return sum(math.prod(shape) for shape in self.shapes)

    @staticmethod
    def flatten(z: tuple[Tensor, ...]) -> Tensor:
        """A state as a matrix ``(B, width)``."""
        return torch.cat([branch.flatten(1) for branch in z], dim=1)

    def unflatten(self, rows: Tensor) -> tuple[Tensor, ...]:
        """A matrix ``(B, width)`` as a state."""
        parts = rows.split([math.prod(shape) for shape in self.shapes], dim=1)
        return tuple(p.unflatten(1, shape) for p, shape in zip(parts, self.shapes, strict=True))

    def start(self, like: Tensor, *lead: int) -> tuple[Tensor, ...]:
        """A state of zeros, a tensor of shape ``(*lead, C, H, W)`` a branch; kind as ``like``."""
        return tuple(like.new_zeros(*lead, *shape) for shape in self.shapes)

    def forward(
        self, z: tuple[Tensor, ...], injection: tuple[Tensor, ...], film: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        parts = [None] * len(z) if film is None else film.chunk(len(z), dim=1)
        return self.fusion(
            tuple(
                block(*branch)
                for block, *branch in zip(self.blocks, z, injection, parts, strict=True)
            )
        )


def check(channels: tuple[int, ...], sizes: tuple[int, ...], groups: int, film: int | None) -> None:
    """Refuse what no cell can be made of."""
    if not channels or any(c < 1 or c % groups for c in channels):
        raise ValueError(
            f"channels must be multiples of groups={groups}, one a branch; got {channels}. Group "
            "norm needs that: change channels or groups."
        )
    expected = halvings(sizes[0], len(channels)) if sizes else ()
    if tuple(sizes) != expected:
        raise ValueError(
            f"sizes must halve from branch to branch (rounded up), one a branch: {expected}; got "
            f"{sizes}."
        )
    if film is not None and (film < 1 or film % len(channels)):
        raise ValueError(
            f"film must be a multiple of the number of branches, {len(channels)}, since each reads "
            f"its own part; got {film}."
        )
