"""What an accelerator is: two methods on ``(B, n)`` matrices."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from implicitopt.accelerators.anderson import Anderson

__all__ = ["Accelerator", "Restartable", "accelerate", "check_accelerator", "take_rows"]


@runtime_checkable
class Accelerator(Protocol):
    """Turns a slowly converging iteration v ← F(v) into a fast one.

    Each row is a problem of its own: no row may influence another (use ``torch.where``, never
    multiplication by a mask, and no reduction over dim 0).
    """

    def init(self, v: Tensor) -> Any:
        """The state before the first step, for ``v`` of shape ``(B, n)``."""
        ...

    def step(self, state: Any, v: Tensor, Fv: Tensor) -> tuple[Tensor, Any]:
        """The next iterate, ``(B, n)``, and the next state, given v and F(v)."""
        ...


@runtime_checkable
class Restartable(Protocol):
    """An accelerator that can forget the history of some of its problems."""

    def restart(self, state: Any, mask: Tensor) -> Any:
        """The state with the history of the problems in ``mask``, ``(B,)``, forgotten."""
        ...


def accelerate(
    accelerator: Accelerator, state: Any, v: Tensor, r: Tensor, Fv: Tensor | None = None
) -> tuple[Tensor, Any]:
    """The accelerator's step where F(v) = v + r; ``Anderson`` is given r itself.

    Near a solution r is known to more digits than the difference of F(v) and v, each rounded, has
    left.
    """
    if isinstance(accelerator, Anderson) and type(accelerator).step is Anderson.step:
        return accelerator.step_from_residual(state, v, r)
    return accelerator.step(state, v, v + r if Fv is None else Fv)


def check_accelerator(name: str, accelerator: Any) -> None:
    """``accelerator``, the option ``name``, must be an object with the two methods."""
    if isinstance(accelerator, type) or not isinstance(accelerator, Accelerator):
        raise TypeError(
            f"{name} must be Anderson(...), Broyden(...), Picard(...) or an object with the "
            f"methods init(v) and step(state, v, Fv); got {accelerator!r}. Pass one, or leave it "
            "out for the default."
        )


def take_rows(name: str, accelerator: Any, state: Any, rows: Tensor) -> Any:
    """The accelerator's state of the problems ``rows`` alone, ``(K,)`` indices."""
    if not hasattr(accelerator, "take"):
        raise TypeError(
            f"{name} must have a method take(state, rows) for subset=..., which lets finished "
            f"problems leave the batch; got {accelerator!r}. Add one that indexes dim 0 of each "
            "tensor of its state, or leave subset out."
        )
    return accelerator.take(state, rows)
