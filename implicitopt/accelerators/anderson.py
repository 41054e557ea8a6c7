"""Anderson acceleration, types I and II."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from implicitopt.accelerators.protocol import Pairing
from implicitopt.kkt import norm

__all__ = ["Anderson"]

#: How far, relative to ‖dv_i‖‖dr_j‖ and to themselves, two paired differences may disagree.
FLOOR, SHARE = 0.1, 0.5
#: A difference is left out when this share of it, or less, is not a combination of newer ones.
INDEPENDENT = 3e-2


@dataclass(frozen=True)
class Anderson:
    """Anderson acceleration: extrapolate from the last differences of iterates and residuals.

    With r = F(v) − v and the differences S = (dv_i), Y = (dr_i) of the last m steps,

        v⁺ = v + r − (S + Y) c,   type II: c = argmin ‖r − Y c‖,   type I: (Sᵀ Y) c = Sᵀ r.

    Type II is the multisecant form of bad Broyden and minimizes the residual; type I is that of
    good Broyden, and the faster one on the saddle systems of this library.

    Args:
        kind: "I" or "II".
        memory: m. None: between 20 and 60, fewer for larger systems.
        ridge: regularization, relative to the scale of the m × m system.
        damping: β in (0, 1], scales the residual that is added.

    The m × m systems are formed and solved in float64. Where one fails, that problem takes the
    plain step v + β r. In a symmetric (KKT) system, differences that contradict the symmetry are
    out of date, and are left out.

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
        return AndersonState.empty(
            v, self.memory or min(60, max(20, 500_000 // max(1, v.shape[1])))
        )

    def init_paired(self, v: Tensor, pairing: Pairing) -> AndersonState:
        state = self.init(v)
        state.pairing = pairing
        return state

    def step(self, state: AndersonState, v: Tensor, Fv: Tensor) -> tuple[Tensor, AndersonState]:
        r = Fv - v
        state.push(v, r, symmetric=self.kind == "II")
        S, Y = state.S[:, : state.filled], state.Y[:, : state.filled]
        if not state.filled:
            return v + self.damping * r, state
        c = self._coefficients(state, S, Y, r)
        plain = v + self.damping * r
        step = (c[:, None] @ S + self.damping * (c[:, None] @ Y))[:, 0]
        mixed = plain - step
        good = torch.isfinite(mixed).all(dim=1, keepdim=True)
        return torch.where(good, mixed, plain), state

    def restart(self, state: AndersonState, mask: Tensor) -> AndersonState:
        state.forget(mask)
        return state

    def _coefficients(self, state: AndersonState, S: Tensor, Y: Tensor, r: Tensor) -> Tensor:
        """c, ``(B, m)``: zero for differences left out, and for a problem whose solve failed."""
        k = state.filled
        use = state.use[:, :k]
        gram = state.gram[:, :k, :k]
        T = Y if self.kind == "II" else S
        rhs = (T @ r[..., None])[..., 0].double()
        # Unit rows, so that ridge is relative; a difference left out becomes a row of the identity.
        length = (state.length_y if self.kind == "II" else state.length_s)[:, :k]
        use = use & (length > 0)
        if self.kind == "I":
            use = use & state.independent()
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
        return torch.where(solved, c[..., 0] * unit, 0.0).to(r.dtype)


@dataclass
class AndersonState:
    """Ring buffers of the last differences, and their Gram matrices, updated a row a step."""

    S: Tensor  # (B, m, n) differences of v
    Y: Tensor  # (B, m, n) differences of r
    gram: Tensor  # (B, m, m) float64, ⟨t_i, y_j⟩ with t = s (type I) or y (type II)
    gram_s: Tensor
    length_s: Tensor  # (B, m) float64 norms
    length_y: Tensor
    length_q: Tensor  # of pairing(y)
    use: Tensor  # (B, m) which differences count
    pairing: Pairing | None = None
    last: tuple[Tensor, Tensor] | None = None
    fresh: Tensor | None = None  # (B,) problems just restarted: their next difference is void
    pushed: int = 0

    @classmethod
    def empty(cls, v: Tensor, memory: int) -> AndersonState:
        rows, n = v.shape
        lengths = v.new_zeros(rows, memory, dtype=torch.float64)
        return cls(
            S=v.new_zeros(rows, memory, n),
            Y=v.new_zeros(rows, memory, n),
            gram=v.new_zeros(rows, memory, memory, dtype=torch.float64),
            gram_s=v.new_zeros(rows, memory, memory, dtype=torch.float64),
            length_s=lengths,
            length_y=lengths.clone(),
            length_q=lengths.clone(),
            use=torch.zeros(rows, memory, dtype=torch.bool, device=v.device),
        )

    @property
    def filled(self) -> int:
        return min(self.pushed, self.S.shape[1])

    def push(self, v: Tensor, r: Tensor, *, symmetric: bool) -> None:
        """Take in the newest iterate and residual."""
        if self.last is not None:
            self._push_difference(v - self.last[0], r - self.last[1], symmetric=symmetric)
        self.last = (v, r)

    def _push_difference(self, s: Tensor, y: Tensor, *, symmetric: bool) -> None:
        sound = torch.isfinite(s).all(dim=1) & torch.isfinite(y).all(dim=1)
        if self.fresh is not None:
            sound = sound & ~self.fresh
            self.fresh = None
        s = torch.where(sound[:, None], s, torch.zeros_like(s))
        y = torch.where(sound[:, None], y, torch.zeros_like(y))
        at = self.pushed % self.S.shape[1]
        self.pushed += 1
        k = self.filled
        self.S[:, at], self.Y[:, at] = s, y
        self.use[:, at] = sound
        self.length_s[:, at], self.length_y[:, at] = norm(s).double(), norm(y).double()
        if not symmetric:
            row = (self.S[:, :k] @ s[..., None])[..., 0].double()
            self.gram_s[:, :k, at] = row
            self.gram_s[:, at, :k] = row
        T = self.Y if symmetric else self.S
        t = y if symmetric else s
        self.gram[:, :k, at] = (T[:, :k] @ y[..., None])[..., 0].double()
        self.gram[:, at, :k] = (self.Y[:, :k] @ t[..., None])[..., 0].double()
        if self.pairing is not None:
            self._drop_outdated(s, self.pairing(y), at, k)

    def _drop_outdated(self, s: Tensor, q: Tensor, at: int, k: int) -> None:
        """Leave out what contradicts the newest difference: ⟨s_i, Py⟩ ≠ ⟨s, Py_i⟩ = ⟨Ps, y_i⟩."""
        assert self.pairing is not None
        self.length_q[:, at] = norm(q).double()
        mine = (self.S[:, :k] @ q[..., None])[..., 0].double()
        theirs = (self.Y[:, :k] @ self.pairing(s)[..., None])[..., 0].double()
        reach = self.length_s[:, :k] * self.length_q[:, at : at + 1]
        reach = reach + self.length_q[:, :k] * self.length_s[:, at : at + 1]
        agree = (mine - theirs).abs() <= SHARE * (mine.abs() + theirs.abs()) + FLOOR * reach
        self.use[:, :k] &= agree

    def independent(self) -> Tensor:
        """Which differences are not, nearly, combinations of newer ones; ``(B, filled)``."""
        k, m = self.filled, self.S.shape[1]
        newest_first = [(self.pushed - 1 - age) % m for age in range(k)]
        order = torch.tensor(newest_first, device=self.S.device)
        back = torch.argsort(order)
        use = (self.use & (self.length_s > 0))[:, order]
        length = torch.where(use, self.length_s[:, order], 1.0)
        gram = self.gram_s[:, order][:, :, order] / (length[:, :, None] * length[:, None])
        gram = torch.where(use[:, :, None] & use[:, None], gram, 0.0)
        eye = torch.eye(k, dtype=gram.dtype, device=gram.device)
        gram = gram + eye * torch.where(use, 1e-14, 1.0)[:, :, None]
        factor, _ = torch.linalg.cholesky_ex(gram)
        orthogonal = torch.nan_to_num(factor.diagonal(dim1=1, dim2=2))
        return (orthogonal > INDEPENDENT)[:, back]

    def forget(self, mask: Tensor) -> None:
        """Leave out all differences of the problems in ``mask``, and their next one."""
        self.use &= ~mask[:, None]
        self.fresh = mask
