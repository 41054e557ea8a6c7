"""How far a result is from a known one."""

from __future__ import annotations

from torch import Tensor

__all__ = ["relative_error"]


def relative_error(found: Tensor, known: Tensor) -> float:
    """‖found − known‖ / ‖known‖."""
    return ((found - known).norm() / known.norm()).item()
