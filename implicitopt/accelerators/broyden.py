"""Broyden's methods with limited memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from implicitopt.kkt import norm
from implicitopt.options import check_choice, check_option
from implicitopt.rows import take

__all__ = ["Broyden"]


@dataclass(frozen=True)
class Broyden:
    """Broyden's rank-one updates of an approximate inverse H ≈ (I − ∂F/∂v)⁻¹, v⁺ = v + H r.

    With r = F(v) − v, s the last step, y = −dr and u = s − H y,

        good:  H⁺ = H + u (sᵀH) / (sᵀ H y),      bad:  H⁺ = H + u yᵀ / (yᵀ y).

    Args:
        kind: "good" or "bad".
        memory: rank-one terms kept; a problem whose memory is full starts over from H = I. None:
            100 for up to 600 unknowns, fewer for more, at least 30.
        damping: β in (0, 1], scales the step.

    An update whose denominator is within 1e-8 of zero, or that is not finite, is left out.

    Raises:
        TypeError, ValueError: an option is not as above.

    Source: Broyden 1965; the limited-memory form of Bai, Koltun, Kolter 2019 (DEQ).

    >>> import torch, implicitopt
    >>> z = implicitopt.fixed_point(
    ...     lambda z, x: 0.9 * z.cos() + x, torch.ones(1, 3), accelerator=implicitopt.Broyden()
    ... )
    >>> bool((z - 0.9 * z.cos() - 1).abs().max() < 1e-3)
    True
    """

    kind: Literal["good", "bad"] = "good"
    memory: int | None = None
    damping: float = 1.0

    def __post_init__(self) -> None:
        check_choice("Broyden kind", self.kind, ("good", "bad"))
        if self.memory is not None:
            check_option("Broyden memory", self.memory, int, least=1)
        check_option("Broyden damping", self.damping, float, above=0, most=1)

    def init(self, v: Tensor) -> BroydenState:
        rows, n = v.shape
        # A start from H = I throws away what is known: on affine maps up to 2n terms are of use.
        memory = self.memory or min(100, max(30, 60_000 // max(1, n)))
        use = torch.zeros(rows, memory, dtype=torch.bool, device=v.device)
        U, W = v.new_zeros(rows, memory, n), v.new_zeros(rows, memory, n)
        return BroydenState(U, W, use)

    def step(self, state: BroydenState, v: Tensor, Fv: Tensor) -> tuple[Tensor, BroydenState]:
        r = Fv - v
        if state.last is not None:
            self._update(state, v - state.last[0], state.last[1] - r)
        state.last = (v, r)
        moved = v + self.damping * state.apply(r)
        plain = v + self.damping * r
        good = torch.isfinite(moved).all(dim=1)
        state.forget(~good)
        return torch.where(good[:, None], moved, plain), state

    def restart(self, state: BroydenState, mask: Tensor) -> BroydenState:
        state.forget(mask)
        state.fresh = mask
        return state

    def take(self, state: BroydenState, rows: Tensor) -> BroydenState:
        """The state of the problems ``rows`` alone."""
        return take(state, rows)

    def _update(self, state: BroydenState, s: Tensor, y: Tensor) -> None:
        at = state.pushed % state.U.shape[1]
        if at == 0 and state.pushed:
            state.forget(torch.ones_like(s[:, 0], dtype=torch.bool))
        Hy = state.apply(y)
        w = state.apply_transposed(s) if self.kind == "good" else y
        denominator = (w * y).sum(dim=1)
        bound = 1e-8 * norm(w) * norm(y)
        u = s - Hy
        sound = (denominator.abs() > bound) & torch.isfinite(u).all(dim=1)
        if state.fresh is not None:
            sound = sound & ~state.fresh
            state.fresh = None
        safe = torch.where(sound, denominator, torch.ones_like(denominator))
        state.U[:, at] = torch.where(sound[:, None], u / safe[:, None], torch.zeros_like(u))
        state.W[:, at] = torch.where(sound[:, None], w, torch.zeros_like(w))
        state.use[:, at] = sound
        state.pushed += 1


@dataclass
class BroydenState:
    """H = I + Σ u_i w_iᵀ."""

    U: Tensor  # (B, m, n)
    W: Tensor  # (B, m, n)
    use: Tensor  # (B, m) bool: which terms count
    last: tuple[Tensor, Tensor] | None = None
    fresh: Tensor | None = None  # (B,) problems just restarted: their next difference is void
    pushed: int = 0

    def apply(self, r: Tensor) -> Tensor:
        """H r."""
        return r + self._chain(self.W, self.U, r)

    def apply_transposed(self, s: Tensor) -> Tensor:
        """Hᵀ s."""
        return s + self._chain(self.U, self.W, s)

    def _chain(self, left: Tensor, right: Tensor, row: Tensor) -> Tensor:
        k = min(self.pushed, left.shape[1])
        weights = row[:, None] @ left[:, :k].mT
        weights = torch.where(self.use[:, None, :k], weights, 0.0)
        return (weights @ right[:, :k])[:, 0]

    def forget(self, mask: Tensor) -> None:
        """H = I for the problems in ``mask``."""
        self.use = self.use & ~mask[:, None]
