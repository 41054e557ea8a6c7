"""Anderson acceleration, types I and II."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from implicitopt.kkt import norm

__all__ = ["Anderson"]

#: A difference is left out when this share of it, or less, is not a combination of newer ones.
INDEPENDENT = 3e-2
#: Up to this many unknowns differences are kept in float64, whatever the dtype: in float32 the
#: rounding of their products, not of F, would decide the result.
WIDE = 2048


@dataclass(frozen=True)
class Anderson:
    """Anderson acceleration: extrapolate from the last differences of iterates and residuals.

    With r = F(v) − v and the differences S = (dv_i), Y = (dr_i) of the last m steps,

        v⁺ = v + r − (S + Y) c,   type II: c = argmin ‖r − Y c‖,   type I: (Sᵀ Y) c = Sᵀ r.

    Type II is the multisecant form of bad Broyden and minimizes the residual; type I is that of
    good Broyden, and the faster one on the saddle systems of this library.

    Args:
        kind: "I" or "II".
        memory: m. None: 60 for up to a thousand unknowns, fewer for more, at least 10.
        ridge: regularization, relative to the scale of the m × m system.
        damping: β in (0, 1], scales the residual that is added.

    The m × m systems are formed and solved in float64. Where one fails, that problem takes the
    plain step v + β r. Type I leaves out differences that are nearly combinations of newer ones:
    far from a solution these say more about how F has changed since than about F.

    Raises:
        TypeError, ValueError: an option is not as above.

    Source: Anderson 1965; Fang and Saad 2009 (types I and II); Zhang, O'Donoghue, Boyd 2020
    (safeguards of type I).

    >>> import torch, implicitopt
    >>> z = implicitopt.fixed_point(
    ...     lambda z, x: 0.9 * z.cos() + x, torch.ones(1, 3), accelerator=implicitopt.Anderson("II")
    ... )
    >>> bool((z - 0.9 * z.cos() - 1).abs().max() < 1e-3)
    True
    """

    kind: Literal["I", "II"] = "I"
    memory: int | None = None
    ridge: float = 1e-10
    damping: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in ("I", "II"):
            raise ValueError(f'Anderson kind must be "I" or "II"; got {self.kind!r}')
        if self.memory is not None:
            if isinstance(self.memory, bool) or not isinstance(self.memory, int):
                raise TypeError(f"Anderson memory must be an int or None; got {self.memory!r}")
            if self.memory < 1:
                raise ValueError(f"Anderson memory must be at least 1; got {self.memory}")
        if not 0 <= self.ridge < 1:
            raise ValueError(f"Anderson ridge must lie in [0, 1); got {self.ridge}")
        if not 0 < self.damping <= 1:
            raise ValueError(f"Anderson damping must lie in (0, 1]; got {self.damping}")

    def init(self, v: Tensor) -> AndersonState:
        memory = self.memory or min(60, max(10, 60_000 // max(1, v.shape[1])))
        return AndersonState.empty(v, memory)

    def step(self, state: AndersonState, v: Tensor, Fv: Tensor) -> tuple[Tensor, AndersonState]:
        r = Fv - v
        state.push(v, r)
        plain = v + self.damping * r
        if not state.filled:
            return plain, state
        rhs = state.update_gram(r.to(state.S.dtype), self.kind)
        c = self._coefficients(state, rhs).to(state.S.dtype)[:, None]
        S, Y = state.S[:, : state.filled], state.Y[:, : state.filled]
        mixed = plain - torch.baddbmm(c @ S, c, Y, alpha=self.damping)[:, 0].to(plain.dtype)
        good = torch.isfinite(norm(mixed))[:, None]
        return torch.where(good, mixed, plain), state

    def restart(self, state: AndersonState, mask: Tensor) -> AndersonState:
        state.forget(mask)
        return state

    def _coefficients(self, state: AndersonState, rhs: Tensor) -> Tensor:
        """c, ``(B, m)``: zero for differences left out, and for a problem whose solve failed."""
        gram = state.gram[:, : state.filled, : state.filled]
        # Unit rows, so that ridge is relative; a difference left out becomes a row of the identity.
        length = state.length[:, : state.filled]
        use = state.use[:, : state.filled] & (length > 0)
        if self.kind == "I":
            use = use & state.independent(use)
        unit = torch.where(use, 1 / torch.where(use, length, torch.ones_like(length)), 0.0)
        gram = (
            torch.where(use[:, :, None] & use[:, None], gram, 0.0)
            * unit[:, :, None]
            * unit[:, None]
        )
        rhs = torch.where(use, rhs, 0.0) * unit
        diagonal = gram.diagonal(dim1=1, dim2=2)
        scale = diagonal.abs().amax(dim=1, keepdim=True)
        # Type I: SᵀY is about −SᵀS near a contraction, so the ridge keeps each pivot's sign.
        shift = self.ridge * scale * torch.where(diagonal < 0, -1.0, 1.0)
        gram = gram + torch.diag_embed(torch.where(use, shift, torch.ones_like(shift)))
        c, info = torch.linalg.solve_ex(gram, rhs[..., None])
        solved = (info == 0)[:, None] & torch.isfinite(c[..., 0]).all(dim=1, keepdim=True)
        return torch.where(solved, c[..., 0] * unit, 0.0)


@dataclass
class AndersonState:
    """Ring buffers of the last differences, and their Gram matrices, updated a row a step."""

    S: Tensor  # (B, m, n) differences of v
    Y: Tensor  # (B, m, n) differences of r
    gram: Tensor  # (B, m, m) float64, ⟨t_i, y_j⟩ with t = s (type I) or y (type II)
    gram_s: Tensor  # (B, m, m) float64, ⟨s_i, s_j⟩ (type I)
    length: Tensor  # (B, m) float64, ‖t_i‖
    use: Tensor  # (B, m) which differences count
    last: tuple[Tensor, Tensor] | None = None
    fresh: Tensor | None = None  # (B,) problems just restarted: their next difference is void
    pushed: int = 0

    @classmethod
    def empty(cls, v: Tensor, memory: int) -> AndersonState:
        rows, n = v.shape
        wide = torch.float64 if n <= WIDE else torch.promote_types(v.dtype, torch.float32)
        square = v.new_zeros(rows, memory, memory, dtype=torch.float64)
        return cls(
            S=v.new_zeros(rows, memory, n, dtype=wide),
            Y=v.new_zeros(rows, memory, n, dtype=wide),
            gram=square,
            gram_s=square.clone(),
            length=square[:, 0].clone(),
            use=torch.zeros(rows, memory, dtype=torch.bool, device=v.device),
        )

    @property
    def filled(self) -> int:
        return min(self.pushed, self.S.shape[1])

    @property
    def newest(self) -> int:
        return (self.pushed - 1) % self.S.shape[1]

    def push(self, v: Tensor, r: Tensor) -> None:
        """Take in the newest iterate and residual."""
        if self.last is not None:
            wide = self.S.dtype
            s, y = v.to(wide) - self.last[0].to(wide), r.to(wide) - self.last[1].to(wide)
            sound = torch.isfinite(norm(s)) & torch.isfinite(norm(y))
            if self.fresh is not None:
                sound = sound & ~self.fresh
                self.fresh = None
            self.pushed += 1
            self.S[:, self.newest] = torch.where(sound[:, None], s, torch.zeros_like(s))
            self.Y[:, self.newest] = torch.where(sound[:, None], y, torch.zeros_like(y))
            self.use[:, self.newest] = sound
        self.last = (v, r)

    def update_gram(self, r: Tensor, kind: str) -> Tensor:
        """The Gram matrices' row and column of the newest difference; returns ⟨t_i, r⟩."""
        k, at = self.filled, self.newest
        s, y = self.S[:, at], self.Y[:, at]
        if kind == "II":
            products = _products(self.Y[:, :k], y, r)
            self.gram[:, :k, at] = self.gram[:, at, :k] = products[:, 0]
        else:
            products = _products(self.S[:, :k], y, s, r)
            self.gram[:, :k, at] = products[:, 0]
            self.gram[:, at, :k] = _products(self.Y[:, :k], s)[:, 0]
            self.gram_s[:, :k, at] = self.gram_s[:, at, :k] = products[:, 1]
        self.length[:, at] = norm(y if kind == "II" else s).double()
        return products[:, -1]

    def independent(self, use: Tensor) -> Tensor:
        """Which of the differences in ``use`` are not, nearly, combinations of newer ones."""
        k, m = self.filled, self.S.shape[1]
        newest_first = [(self.pushed - 1 - age) % m for age in range(k)]
        order = torch.tensor(newest_first, device=self.S.device)
        back = torch.argsort(order)
        use = use[:, order]
        unit = torch.where(use, 1 / torch.where(use, self.length[:, order], 1.0), 0.0)
        gram = self.gram_s[:, order][:, :, order] * unit[:, :, None] * unit[:, None]
        gram = torch.where(use[:, :, None] & use[:, None], gram, 0.0)
        gram = gram + torch.diag_embed(torch.where(use, 1e-14, 1.0))
        # The Cholesky factor's diagonal is each unit difference's distance to the span before it.
        factor, _ = torch.linalg.cholesky_ex(gram)
        distance = torch.nan_to_num(factor.diagonal(dim1=1, dim2=2))
        return (distance > INDEPENDENT)[:, back]

    def forget(self, mask: Tensor) -> None:
        """Leave out all differences of the problems in ``mask``, and their next one."""
        self.use &= ~mask[:, None]
        self.fresh = mask if self.fresh is None else self.fresh | mask


def _products(window: Tensor, *rows: Tensor) -> Tensor:
    """⟨row, w_i⟩ of each row with each of the window's, ``(B, rows, m)``, in float64."""
    # In this order: the transposed product, of the same numbers, takes four times as long.
    return (torch.stack(rows, dim=1) @ window.mT).double()
