"""Anderson acceleration, types I and II."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor

from implicitopt.kkt import choose, norm, row_mask, some
from implicitopt.options import check_choice, check_option
from implicitopt.rows import take

__all__ = ["Anderson"]

#: A difference is left out when this share of it, or less, is not a combination of newer ones.
INDEPENDENT = 3e-2
#: Steps between looks at which are: it costs more than the rest of a small step.
LOOK_EVERY = 4
#: Added to squared distances between unit differences, well below that share's square.
ROUNDING = 1e-6
#: Up to this many unknowns differences are kept in float64, whatever the dtype: in float32 the
#: rounding of their products, not of F, would decide the result.
WIDE = 2048


def window(unknowns: int, least: int = 10, most: int = 60) -> int:
    """How many differences of so many unknowns are kept where nobody says."""
    return min(most, max(least, 60_000 // max(1, unknowns)))


def kept_dtype(dtype: torch.dtype, unknowns: int) -> torch.dtype:
    """What differences of so many unknowns are kept in."""
    return torch.float64 if unknowns <= WIDE else torch.promote_types(dtype, torch.float32)


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
        check_choice("Anderson kind", self.kind, ("I", "II"))
        if self.memory is not None:
            check_option("Anderson memory", self.memory, int, least=1)
        check_option("Anderson ridge", self.ridge, float, least=0, below=1)
        check_option("Anderson damping", self.damping, float, above=0, most=1)

    def init(self, v: Tensor) -> AndersonState:
        return AndersonState.empty(v, self.memory or window(v.shape[1]), self.kind)

    def step(self, state: AndersonState, v: Tensor, Fv: Tensor) -> tuple[Tensor, AndersonState]:
        return self.step_from_residual(state, v, Fv - v)

    def step_from_residual(
        self, state: AndersonState, v: Tensor, r: Tensor
    ) -> tuple[Tensor, AndersonState]:
        state.push(v, r, self.damping)
        plain = torch.add(v, r, alpha=self.damping)
        if not state.filled:
            return plain, state
        state.update_gram(self.damping)
        mixed = state.mix(plain, self._coefficients(state))
        sound = norm(mixed) < math.inf
        return choose(sound, mixed, plain), state

    def restart(self, state: AndersonState, mask: Tensor) -> AndersonState:
        state.forget(mask)
        return state

    def take(self, state: AndersonState, rows: Tensor) -> AndersonState:
        """The state of the problems ``rows`` alone."""
        return take(state, rows)

    def _coefficients(self, state: AndersonState) -> Tensor:
        """c, ``(B, m)``: zero for differences left out, and for a problem whose solve failed.

        Where the system is nearly singular they may not be finite; then neither is the step.
        """
        k = state.filled
        unit = state.unit[:, :k]
        use = unit > 0
        if self.kind == "I":
            if state.pushed % LOOK_EVERY == 0:
                state.look_apart()
            use &= state.apart[:, :k]
        # A difference left out becomes a row of the identity.
        out = ~use
        gram = state.gram[:, :k, :k].masked_fill(out[:, :, None] | out[:, None], 0.0)
        diagonal = gram.diagonal(dim1=1, dim2=2)
        scale = diagonal.abs().amax(dim=1, keepdim=True)
        # Type I: SᵀY is about −SᵀS near a contraction, so the ridge keeps each pivot's sign.
        shift = torch.copysign(self.ridge * scale, diagonal)
        diagonal.add_(shift.masked_fill_(out, 1.0))
        rhs = state.in_r[:, :k].masked_fill(out, 0.0)
        c, info = torch.linalg.solve_ex(gram, rhs[..., None])
        return cast(Tensor, (c[..., 0] * unit).masked_fill(info[:, None] != 0, 0.0))


@dataclass
class AndersonState:
    """Ring buffers of the last differences, and their Gram matrices, updated a row a step.

    What is kept of a difference is t = s (type I) or y (type II), which residuals are projected
    on, and u = s + β y, which steps are made of: each is read once a step, and no more is read.
    Products are of differences of unit length, t_i/‖t_i‖ and y_i/‖t_i‖, so that the ridge is
    relative; those of a difference that does not count are 0.
    """

    kind: str
    ring: Tensor  # (B, m, 2, n) t_i and u_i
    gram: Tensor  # (B, m, m) float64, ⟨t_i, y_j⟩
    gram_s: Tensor  # (B, m, m) float64, ⟨s_i, s_j⟩ for the later one as j (type II: empty)
    in_r: Tensor  # (B, m) float64, ⟨t_i, r⟩ with the last r
    unit: Tensor  # (B, m) float64, 1/‖t_i‖; 0: does not count
    apart: Tensor  # (B, m) bool: independent of newer ones, when last looked at (type I)
    last: tuple[Tensor, Tensor] | None = None
    fresh: Tensor | None = None  # (B,) problems just restarted: their next difference is void
    pushed: int = 0

    @classmethod
    def empty(cls, v: Tensor, memory: int, kind: str) -> AndersonState:
        rows, n = v.shape
        square = v.new_zeros(rows, memory, memory, dtype=torch.float64)
        return cls(
            kind,
            # Not read before it is written, and big: zeros would cost a pass over it.
            ring=v.new_empty(rows, memory, 2, n, dtype=kept_dtype(v.dtype, n)),
            gram=square,
            gram_s=square.clone() if kind == "I" else square[:, :0, :0],
            in_r=square[:, 0].clone(),
            unit=square[:, 0].clone(),
            apart=torch.ones(rows, memory, dtype=torch.bool, device=v.device),
        )

    def age(self, steps: int) -> None:
        """Begin as if ``steps`` differences, and a window more, had been taken in and forgotten.

        The order in which sums are formed, and so their rounding, depends on a difference's slot.
        """
        self.ring.zero_()
        self.pushed = self.ring.shape[1] + steps

    @property
    def filled(self) -> int:
        return min(self.pushed, self.ring.shape[1])

    @property
    def newest(self) -> int:
        return (self.pushed - 1) % self.ring.shape[1]

    def push(self, v: Tensor, r: Tensor, damping: float) -> None:
        """Take in the newest iterate and residual."""
        v, r = v.to(self.ring.dtype), r.to(self.ring.dtype)
        if self.last is not None:
            self.pushed += 1
            t, u = self.ring[:, self.newest].unbind(1)
            if self.kind == "I":
                torch.sub(v, self.last[0], out=t)
                torch.add(t, r - self.last[1], alpha=damping, out=u)
            else:
                torch.sub(r, self.last[1], out=t)
                torch.add(v - self.last[0], t, alpha=damping, out=u)
            length = norm(t)
            void = ~((length > 0) & (length < math.inf) & (norm(u) < math.inf))
            if self.fresh is not None:
                void = void | self.fresh
            unit = length.double().reciprocal()
            if some(void):
                t.masked_fill_(void[:, None], 0.0)
                u.masked_fill_(void[:, None], 0.0)
                unit = unit.masked_fill(void, 0.0)
            self.unit[:, self.newest] = unit
            self.apart[:, self.newest].fill_(True)
        self.last, self.fresh = (v, r), None

    def update_gram(self, damping: float) -> None:
        """The products with the newest difference and with the newest residual."""
        assert self.last is not None
        k, at = self.filled, self.newest
        T, U = self.ring[:, :k].unbind(2)
        t, unit = self.ring[:, at, 0], self.unit[:, None, :k]
        products = products_with(T, torch.stack((t, self.last[1]), dim=1)) * unit
        own = self.unit[:, at, None]
        in_t, in_r = products[:, 0] * own, products[:, 1]
        if self.kind == "II":
            self.gram[:, :k, at] = self.gram[:, at, :k] = in_t
        else:
            self.gram_s[:, :k, at] = in_t
            # y is the difference of two r, of which all products are known but the newest t's.
            self.gram[:, :k, at] = (in_r - self.in_r[:, :k]) * own
            in_u = products_with(U, t[:, None])[:, 0] * (unit[:, 0] * own)
            in_y = in_u - in_t
            self.gram[:, at, :k] = in_y if damping == 1 else in_y / damping
        self.in_r[:, :k] = in_r

    def mix(self, plain: Tensor, c: Tensor) -> Tensor:
        """plain − Σ c_i u_i, ``(B, n)``."""
        u = self.ring[:, : self.filled, 1]
        step = torch.baddbmm(plain[:, None].to(u.dtype), c[:, None].to(u.dtype), u, alpha=-1)
        return step[:, 0].to(plain.dtype)

    def look_apart(self) -> None:
        """Find which differences are not, nearly, combinations of newer ones."""
        k, m = self.filled, self.ring.shape[1]
        # Slots from the newest to the oldest, so that what is kept is the lower triangle, which is
        # all that is read; the other way, it is the same permutation.
        order = (self.newest - torch.arange(k, device=self.unit.device)) % m
        gram = self.gram_s[:, order[:, None], order]
        # The Cholesky factor's diagonal is each unit difference's distance to the span before it;
        # what is added hides rounding, and no distance that is asked about.
        gram.diagonal(dim1=1, dim2=2).add_(ROUNDING)
        factor, _ = torch.linalg.cholesky_ex(gram)
        self.apart[:, :k] = (factor.diagonal(dim1=1, dim2=2) > INDEPENDENT)[:, order]

    def forget(self, mask: Tensor) -> None:
        """Leave out all differences of the problems in ``mask``, and their next one."""
        for products in (self.gram, self.gram_s, self.in_r, self.unit):
            products.masked_fill_(row_mask(mask, products), 0.0)
        self.fresh = mask if self.fresh is None else self.fresh | mask


def products_with(window: Tensor, rows: Tensor) -> Tensor:
    """⟨row, w_i⟩ of each row with each of the window's, ``(B, rows, m)``, in float64."""
    # In this order: the transposed product, of the same numbers, takes four times as long.
    return torch.bmm(rows, window.mT).double()
