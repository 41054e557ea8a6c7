"""What sweeps have told of ∂f, of the loss and of L's curvature: differences of what they found.

Each step leaves five differences of states, and three of inputs:

    s = (Δz, Δx)               y = Δf ≈ J s,                        J = ∂f/∂(z, x)
    m = Δμ                     w = Δ(Jᵀμ) ≈ Jᵀ m + C s,             C = μ·∂²f
                               g = Δ∇ℓ ≈ (∂²ℓ) s

Inputs are measured in units, 1/τ, in which ∂f/∂x is about as large, a number, as ∂f/∂z: what
differences leave open is the smallest there is, which should not depend on the units of x.

They are kept in a ring, s, y and g over the length of s, and m and w over that of m, with all their
products, which a step updates by its own rows: one pass over the ring. Everything else works on the
products.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from implicitopt.accelerators.anderson import kept_dtype, products_with
from implicitopt.kkt import Point, Sweep, norm, row_mask, some

__all__ = ["KKTSecants"]

#: Places of the differences: of states s, w, g, y and m, of inputs s, w and g.
S, W, G, Y, M = range(5)


@dataclass
class KKTSecants:
    """The ring, and products of the differences in it: of q places, k of them filled."""

    states: Tensor  # (B, q, 5, n)
    inputs: Tensor  # (B, q, 3, d)
    lengths: Tensor  # (B, 2, q) float64, ‖s‖ and ‖m‖; 0: the difference does not count
    counts: Tensor  # (B, 5, q) float64, 1 where a difference of that kind does, else 0
    of_states: Tensor  # (B, 5, q, 5, q) float64, products of the states
    of_inputs: Tensor  # (B, 3, q, 3, q) float64, of the inputs
    with_off: Tensor  # (B, 5, q) float64, of the states with the last f − z
    with_adjoint_off: Tensor  # (B, 5, q) float64, and with the last μ⁺ − μ
    with_grad: Tensor  # (B, 3, q) float64, of the inputs with the last ∇ₓL
    tau: Tensor  # (B, 1) float64
    curved: Tensor  # (B, 2) float64, how curved f and the loss are, against what is assumed
    size: Tensor  # (B,) float64, 1 + ‖(z, μ, τ x)‖ of the last iterate
    ratio: Tensor  # (B,) float64, (1 + ‖(z, τ x)‖) / ‖μ‖ of it
    last: tuple[Tensor, ...] | None = None
    fresh: Tensor | None = None  # (B,) problems just restarted: their next difference is void
    pushed: int = 0

    @classmethod
    def empty(cls, start: Point, memory: int) -> KKTSecants:
        unknowns = sum(block.shape[1] for block in start)
        kept = kept_dtype(start.z.dtype, unknowns)
        rows, n, d, new = len(start.z), start.z.shape[1], start.x.shape[1], start.z.new_zeros
        f64 = torch.float64
        return cls(
            states=start.z.new_empty(rows, memory, 5, n, dtype=kept),  # not read before written
            inputs=start.z.new_empty(rows, memory, 3, d, dtype=kept),
            lengths=new(rows, 2, memory, dtype=f64),
            counts=new(rows, 5, memory, dtype=f64),
            of_states=new(rows, 5, memory, 5, memory, dtype=f64),
            of_inputs=new(rows, 3, memory, 3, memory, dtype=f64),
            with_off=new(rows, 5, memory, dtype=f64),
            with_adjoint_off=new(rows, 5, memory, dtype=f64),
            with_grad=new(rows, 3, memory, dtype=f64),
            tau=new(rows, 1, dtype=f64) + 1.0,
            curved=new(rows, 2, dtype=f64) + 1.0,
            size=new(rows, dtype=f64),
            ratio=new(rows, dtype=f64),
        )

    @property
    def filled(self) -> int:
        """k, how many differences there are."""
        return min(self.pushed, self.states.shape[1])

    @property
    def newest(self) -> int:
        return (self.pushed - 1) % self.states.shape[1]

    @property
    def bend(self) -> Tensor:
        """``curved``, at most 1: what there is to gain where it is less, (B, 2)."""
        return self.curved.clamp(max=1)

    @property
    def noise(self) -> Tensor:
        """What each difference is off by for rounding, in relation to itself, (B, k)."""
        lengths = self.lengths[:, :, : self.filled]
        unit = torch.finfo(self.states.dtype).eps * self.size
        return (unit[:, None, None] / lengths).sum(dim=1)

    @property
    def rounding(self) -> float:
        """What the products may be off by."""
        return 1e-10 if self.states.dtype == torch.float64 else 1e-6

    def push(self, point: Point, sweep: Sweep) -> None:
        """Take in the newest iterate and what the sweep found there."""
        assert sweep.loss_grad is not None  # as ``KKT.apart`` asks
        loss_z, loss_x = sweep.loss_grad
        found = (
            point.z, sweep.mu - loss_z, loss_z, sweep.f, point.mu,
            point.x, sweep.grad - loss_x, loss_x,
        )  # fmt: skip
        now = tuple(block.to(self.states.dtype) for block in found)
        if self.pushed == 0 and self.last is not None:
            self.tau = _units(now[1] - self.last[1], now[6] - self.last[6])
        z, mu, x = (size.double() for size in sweep.sizes[:3])
        primal = torch.hypot(z, self.tau[:, 0] * x)
        self.size, self.ratio = 1 + torch.hypot(primal, mu), (1 + primal) / mu
        if self.last is not None:
            self.pushed += 1
            self._keep(self.newest, now, self.last)
            self._multiply(self.newest, sweep)
        self.last, self.fresh = now, None

    def states_with(self, row: Tensor, kinds: tuple[int, ...]) -> Tensor:
        """⟨difference, row⟩ over states, a column for each of the kinds: -> ``(B, kinds · k)``."""
        k, row = self.filled, row[:, None].to(self.states.dtype)
        windows = (self.states[:, :k, kind] for kind in kinds)
        found = torch.cat([products_with(window, row) for window in windows], dim=1)
        return (found * torch.stack([self.counts[:, kind, :k] for kind in kinds], dim=1)).flatten(1)

    def inputs_with(self, row: Tensor) -> Tensor:
        """⟨difference, row⟩ over inputs, of s, w and g, ``(B, d) -> (B, 3, k)``."""
        k, row = self.filled, row[:, None].to(self.inputs.dtype)
        found = products_with(self.inputs[:, :k].flatten(1, 2), row)
        by_kind: Tensor = found.unflatten(2, (k, 3))[:, 0].mT * self.counts[:, : G + 1, :k]
        return by_kind

    def combine(self, coefficients: dict[int, Tensor]) -> Tensor:
        """Σ c_i · difference i of the states' kinds given: each ``(B, r, k) -> (B, r, n)``."""
        total: Tensor | None = None
        for kind, each in coefficients.items():
            rows, window = each.to(self.states.dtype), self.states[:, : each.shape[2], kind]
            total = torch.bmm(rows, window) if total is None else torch.baddbmm(total, rows, window)
        assert total is not None
        return total

    def combine_inputs(self, coefficients: Tensor) -> Tensor:
        """The same of all inputs: ``(B, 3, k) -> (B, d)``."""
        row = coefficients.mT.flatten(1)[:, None].to(self.inputs.dtype)
        return torch.bmm(row, self.inputs[:, : coefficients.shape[2]].flatten(1, 2))[:, 0]

    def distances(self, ss: Tensor, mm: Tensor) -> Tensor:
        """Squared, of the present iterate (z, μ, x) from the middle of each difference, (B, k).

        It is the sum of all later ones and half of it, and so a sum of products of unit
        differences, ``ss`` and ``mm``, (B, k, k).
        """
        age = (self.newest - torch.arange(self.filled, device=ss.device)) % self.states.shape[1]
        # later[j, i]: how much of difference j lies between the middle of i and the iterate.
        later = 0.5 + 0.5 * (age - age[:, None]).sign().double()
        s, m = (self.lengths[:, :, : self.filled, None] * later).unbind(1)
        squares = torch.bmm(ss, s) * s + torch.bmm(mm, m) * m
        return squares.sum(dim=1).clamp_min(0)

    def forget(self, mask: Tensor) -> None:
        """Leave out all differences of the problems in ``mask``, and their next one."""
        for each in (self.lengths, self.counts, self.of_states, self.of_inputs):
            each.masked_fill_(row_mask(mask, each), 0.0)
        self.curved = torch.where(mask[:, None], 1.0, self.curved)
        self.fresh = mask if self.fresh is None else self.fresh | mask

    def _keep(self, at: int, now: tuple[Tensor, ...], last: tuple[Tensor, ...]) -> None:
        """Put the newest differences, over their lengths, in their slot."""
        states, inputs = self.states[:, at], self.inputs[:, at]
        places = [*states.unbind(1), *inputs.unbind(1)]
        for place, new, old in zip(places, now, last, strict=True):
            torch.sub(new, old, out=place)
        void = ~(norm(states.flatten(1)) + norm(inputs.flatten(1)) < torch.inf)
        if self.fresh is not None:
            void = void | self.fresh
        if some(void):
            states.masked_fill_(void[:, None, None], 0.0)
            inputs.masked_fill_(void[:, None, None], 0.0)
        tau = self.tau.to(inputs.dtype)
        s = torch.hypot(norm(states[:, S]), norm(inputs[:, S]) * tau[:, 0])
        m = norm(states[:, M])
        lengths = torch.stack([s, m, s, s, m], dim=1)
        self.lengths[:, :, at], counts = lengths[:, :2], lengths > 0
        self.counts[:, :, at] = counts
        units = torch.where(counts, lengths.reciprocal(), 0.0)[..., None]
        states.mul_(units)
        inputs.mul_(units[:, : G + 1] * torch.stack([tau, 1 / tau, 1 / tau], dim=1))

    def _multiply(self, at: int, sweep: Sweep) -> None:
        """The products of the newest differences with all, and of all with the residuals."""
        k = self.filled
        counts = self.counts[:, None, :, :k]
        off, adjoint_off, descent = Point.split(sweep.r.to(self.states.dtype), sweep.f.shape[1])
        rows = torch.cat([self.states[:, at], off[:, None], adjoint_off[:, None]], dim=1)
        found = products_with(self.states[:, :k].flatten(1, 2), rows)
        found = found.unflatten(2, (k, 5)).mT * counts  # (B, 7, 5, k)
        self.of_states[:, :, at, :, :k] = found[:, :5]
        self.of_states[:, :, :k, :, at] = found[:, :5].permute(0, 2, 3, 1)
        self.with_off[:, :, :k], self.with_adjoint_off[:, :, :k] = found[:, 5], found[:, 6]
        grad = descent / -self.tau.to(descent.dtype)
        rows = torch.cat([self.inputs[:, at], grad[:, None]], dim=1)
        found = products_with(self.inputs[:, :k].flatten(1, 2), rows)
        found = found.unflatten(2, (k, 3)).mT * counts[:, :, :3]
        self.of_inputs[:, :, at, :, :k] = found[:, :3]
        self.of_inputs[:, :, :k, :, at] = found[:, :3].permute(0, 2, 3, 1)
        self.with_grad[:, :, :k] = found[:, 3]


def _units(w_z: Tensor, w_x: Tensor) -> Tensor:
    """τ, ``(B, 1)``, from a w; 1 where it says nothing.

    A difference and not Jᵀμ, since where an earlier solve ended (∂f/∂x)ᵀ μ is −∂ℓ/∂x, however
    large ∂f/∂x.

    With the root in the place of this fourth root, a number of both would be as large; with no root
    the products would.
    """
    sizes = (norm(w).double() / w.shape[1] ** 0.25 for w in (w_x, w_z))
    tau = torch.div(*sizes)
    return torch.where((tau > 0) & (tau < torch.inf), tau, 1.0)[:, None]
