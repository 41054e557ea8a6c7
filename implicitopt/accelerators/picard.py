"""Plain iteration."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from implicitopt.options import check_option

__all__ = ["Picard"]


@dataclass(frozen=True)
class Picard:
    """v ← (1 − β) v + β F(v): no acceleration, damped by β.

    Args:
        damping: β in (0, 2).

    Raises:
        ValueError: damping is not as above.

    >>> import torch, implicitopt
    >>> z = implicitopt.fixed_point(
    ...     lambda z, x: 0.5 * z + x, torch.ones(1, 1), accelerator=implicitopt.Picard()
    ... )
    >>> round(z.item(), 3)
    2.0
    """

    damping: float = 1.0

    def __post_init__(self) -> None:
        check_option("Picard damping", self.damping, float, above=0, below=2)

    def init(self, v: Tensor) -> None:
        return None

    def step(self, state: None, v: Tensor, Fv: Tensor) -> tuple[Tensor, None]:
        return v + self.damping * (Fv - v), None

    def restart(self, state: None, mask: Tensor) -> None:
        return None

    def take(self, state: None, rows: Tensor) -> None:
        return None
