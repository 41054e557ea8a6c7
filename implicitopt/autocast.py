"""Autocast is for the caller's f and loss: what is computed with their results keeps its dtype.

Products of differences in half precision would stall a solve at a residual of a few thousandths.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

__all__ = ["Scope", "autocast_as_now", "autocast_off", "precision"]

#: Makes a context.
Scope = Callable[[], AbstractContextManager[Any]]


def autocast_off(device: torch.device) -> AbstractContextManager[Any]:
    """A context without autocast on the device."""
    return _scope(device.type, False, None)


def autocast_as_now(device: torch.device) -> Scope:
    """Makes contexts in which autocast on the device is as it is at this call."""
    kind = device.type
    if not torch.amp.is_autocast_available(kind):
        return nullcontext
    enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    return lambda: _scope(kind, enabled, dtype)


def precision(like: Tensor) -> torch.dtype:
    """In which products with ``like`` are formed here: autocast may make it a coarser one.

    Not of float64, which it leaves alone.
    """
    kind = like.device.type
    available = torch.amp.is_autocast_available(kind) and like.dtype != torch.float64
    if available and torch.is_autocast_enabled(kind):
        return min(like.dtype, torch.get_autocast_dtype(kind), key=lambda dtype: dtype.itemsize)
    return like.dtype


def _scope(kind: str, enabled: bool, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    if not torch.amp.is_autocast_available(kind):
        return nullcontext()
    same = torch.is_autocast_enabled(kind) == enabled
    if same and (not enabled or torch.get_autocast_dtype(kind) == dtype):
        return nullcontext()
    return torch.autocast(kind, dtype=dtype, enabled=enabled)
