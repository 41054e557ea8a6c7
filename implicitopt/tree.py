"""Pytrees of tensors laid out as one matrix, a row per problem."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

__all__ = ["Layout", "Tree", "leaves"]

Tree = Any  # a tensor, or any nesting of tuples, lists and dicts of tensors


def leaves(tree: Tree) -> list[Any]:
    """The leaves of a pytree, left to right."""
    return list(pytree.tree_leaves(tree))


@dataclass(frozen=True)
class Layout:
    """How the leaves of a pytree fill the rows of one ``(problems, n)`` matrix.

    Solvers and accelerators see matrices only; ``f`` and ``loss`` see the user's pytrees.
    With ``batched=False`` the whole pytree is one problem: one row.
    """

    spec: Any
    shapes: tuple[tuple[int, ...], ...]  # of one problem's part of each leaf
    batched: bool
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tree: Tree, *, batched: bool) -> Layout:
        flat, spec = pytree.tree_flatten(tree)
        shapes = tuple(tuple(leaf.shape[1:] if batched else leaf.shape) for leaf in flat)
        return cls(spec, shapes, batched, flat[0].dtype, flat[0].device)

    @property
    def width(self) -> int:
        """Numbers per problem."""
        return sum(torch.Size(shape).numel() for shape in self.shapes)

    def flatten(self, tree: Tree, name: str = "a tree") -> Tensor:
        """The pytree, called ``name`` in messages, as a ``(problems, width)`` matrix."""
        flat, spec = pytree.tree_flatten(tree)
        first = 1 if self.batched else 0
        if (
            spec != self.spec
            or not all(isinstance(leaf, Tensor) for leaf in flat)
            or any(leaf.shape[first:] != like for leaf, like in zip(flat, self.shapes, strict=True))
        ):
            got = [tuple(leaf.shape) if isinstance(leaf, Tensor) else leaf for leaf in flat]
            raise ValueError(
                f"{name} must keep its structure and shapes from call to call, "
                f"{list(self.shapes)}{' after the batch' if self.batched else ''}; got {got}. "
                "Return the same kind of value at every call."
            )
        rows = flat[0].shape[0] if self.batched else 1
        parts = [
            leaf.reshape(rows, -1) if leaf.numel() else leaf.new_zeros(rows, 0) for leaf in flat
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def unflatten(self, matrix: Tensor) -> Tree:
        """The inverse of :meth:`flatten`."""
        lead = (matrix.shape[0],) if self.batched else ()
        if len(self.shapes) == 1:
            parts = [matrix.reshape(lead + self.shapes[0])]
        else:
            sizes = [torch.Size(shape).numel() for shape in self.shapes]
            blocks = matrix.split(sizes, dim=1)
            parts = [
                block.reshape(lead + shape)
                for block, shape in zip(blocks, self.shapes, strict=True)
            ]
        return pytree.tree_unflatten(parts, self.spec)
