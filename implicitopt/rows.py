"""Some of the problems: the rows of every tensor in a solver's state, taken out and put back."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

from torch import Tensor

__all__ = ["put", "take"]

State = TypeVar("State")


def take(state: State, rows: Tensor) -> State:
    """The problems ``rows``, ``(K,)`` indices, of all tensors in a state, ``(B, …)`` each.

    A state is any nesting of tuples, lists and dataclasses; whatever else it holds stays.

    >>> import torch
    >>> take((torch.arange(4), None, 7), torch.tensor([0, 2]))
    (tensor([0, 2]), None, 7)
    """
    tree: Any = state
    if isinstance(tree, Tensor):
        tree = tree[rows]
    elif dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        names = [field.name for field in dataclasses.fields(tree)]
        parts = {name: take(getattr(tree, name), rows) for name in names}
        tree = dataclasses.replace(tree, **parts)
    elif isinstance(tree, tuple | list):
        found = [take(part, rows) for part in tree]
        tree = type(tree)(*found) if hasattr(tree, "_fields") else type(tree)(found)
    return tree  # type: ignore[no-any-return]


def put(tree: Any, rows: Tensor, part: Any) -> Any:
    """``tree`` with the problems ``rows`` as in ``part``, which is of its structure.

    >>> import torch
    >>> put((torch.zeros(3), 7), torch.tensor([1]), (torch.ones(1), 7))
    (tensor([0., 1., 0.]), 7)
    """
    if isinstance(tree, Tensor):
        return tree.index_copy(0, rows, part)
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        names = [field.name for field in dataclasses.fields(tree)]
        found = {name: put(getattr(tree, name), rows, getattr(part, name)) for name in names}
        return dataclasses.replace(tree, **found)
    if isinstance(tree, tuple | list):
        parts = [put(a, rows, b) for a, b in zip(tree, part, strict=True)]
        return type(tree)(*parts) if hasattr(tree, "_fields") else type(tree)(parts)
    return tree
