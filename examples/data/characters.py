"""Handwritten or printed characters, by class and by who drew them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

DRAWERS = 20
Split = Literal["background", "evaluation"]  # Omniglot's names for training and test classes


@dataclass(frozen=True, eq=False)
class Characters:
    """Drawings of characters on the CPU, the same number for each.

    Attributes:
        pixels: ``(C, 20, 1, size, size)``, float32: for each of C classes, 20 drawings. Paper is 0
            and ink is 1.
        names: the classes' names, as ``Alphabet/character01``.
    """

    pixels: Tensor
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.pixels)


def rotated(characters: Characters) -> Characters:
    """The characters, then the same turned by 90°, 180° and 270° as classes of their own.

    Customary for Omniglot since Santoro et al., Meta-learning with memory-augmented neural
    networks, 2016. A character that looks the same when turned becomes several classes all the
    same, and print has many such pairs (b and q): keep `glyphs` as they are.
    """
    turns = [torch.rot90(characters.pixels, turn, (-2, -1)) for turn in range(4)]
    names = [f"{name}/{90 * turn}" for turn in (1, 2, 3) for name in characters.names]
    return Characters(torch.cat(turns), (*characters.names, *names))


def check_options(split: str, size: int) -> None:
    """Raise a ValueError unless there is such a split and size."""
    if split not in get_args(Split):
        raise ValueError(f"split must be one of {get_args(Split)}; got {split!r}.")
    if size < 1:
        raise ValueError(f"size must be positive; got {size}.")
