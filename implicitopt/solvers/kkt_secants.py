"""What sweeps have told of ∂f, of the loss and of L's curvature: differences of what they found.

Each step leaves five differences of states, and three of inputs:

    s = (Δz, Δx)               y = Δf ≈ J s,                        J = ∂f/∂(z, x)
    m = Δμ                     w = Δ(Jᵀμ) ≈ Jᵀ m + C s,             C = μ·∂²f
                               g = Δ∇ℓ ≈ (∂²ℓ) s

They are kept in a ring, with all their products, which a step updates by its own rows: one pass
over the ring. Everything else works on the products.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from implicitopt.accelerators.anderson import kept_dtype, products_with
from implicitopt.kkt import Point, Sweep, norm, some

__all__ = ["KKTSecants", "Products"]

#: Places of the differences: of states s, w, g, y and m, of inputs s, w and g.
S, W, G, Y, M = range(5)


class Products(NamedTuple):
    """⟨a, b⟩ of q differences of each kind, (B, kinds, q, kinds, q), and of them with residuals."""

    states: Tensor  #: (B, 5, q, 5, q)
    inputs: Tensor  #: (B, 3, q, 3, q)
    off: Tensor  #: (B, 5, q) with f − z
    adjoint_off: Tensor  #: (B, 5, q) with μ⁺ − μ
    grad: Tensor  #: (B, 3, q) with ∇ₓL


@dataclass
class KKTSecants:
    """The ring. Its slot after the newest differences takes a probe of the loss, s and g alone."""

    states: Tensor  # (B, m + 1, 5, n)
    inputs: Tensor  # (B, m + 1, 3, d)
    of_states: Tensor  # (B, m + 1, 5, m + 1, 5) float64, their products; 0: does not count
    of_inputs: Tensor  # (B, m + 1, 3, m + 1, 3) float64
    with_off: Tensor  # (B, 2, m + 1, 5) float64, with the last f − z and μ⁺ − μ
    with_grad: Tensor  # (B, m + 1, 3) float64, with the last ∇ₓL
    last: tuple[Tensor, ...] | None = None
    fresh: Tensor | None = None  # (B,) problems just restarted: their next difference is void
    pushed: int = 0

    @classmethod
    def empty(cls, start: Point, memory: int) -> KKTSecants:
        unknowns = sum(block.shape[1] for block in start)
        kept = kept_dtype(start.z.dtype, unknowns)
        rows, slots, new = len(start.z), memory + 1, start.z.new_zeros
        f64 = torch.float64
        return cls(
            states=new(rows, slots, 5, start.z.shape[1], dtype=kept),
            inputs=new(rows, slots, 3, start.x.shape[1], dtype=kept),
            of_states=new(rows, slots, 5, slots, 5, dtype=f64),
            of_inputs=new(rows, slots, 3, slots, 3, dtype=f64),
            with_off=new(rows, 2, slots, 5, dtype=f64),
            with_grad=new(rows, slots, 3, dtype=f64),
        )

    @property
    def memory(self) -> int:
        return self.states.shape[1] - 1

    @property
    def filled(self) -> int:
        """How many differences there are, the probe not counted."""
        return min(self.pushed, self.memory)

    @property
    def newest(self) -> int:
        return (self.pushed - 1) % self.memory

    @property
    def mu(self) -> Tensor:
        """The last μ taken in."""
        assert self.last is not None
        return self.last[M]

    @property
    def rounding(self) -> float:
        """What the products of unit differences may be off by."""
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
        if self.last is not None:
            self.pushed += 1
            at = self.newest
            places = [*self.states[:, at].unbind(1), *self.inputs[:, at].unbind(1)]
            for place, new, old in zip(places, now, self.last, strict=True):
                torch.sub(new, old, out=place)
            self._void(at, self.fresh)
            off, adjoint_off, descent = Point.split(sweep.r.to(self.states.dtype), point.z.shape[1])
            self._multiply(at, off, adjoint_off, -descent)
        self.last, self.fresh = now, None

    def probe(
        self, move: tuple[Tensor, Tensor], change: tuple[Tensor, Tensor], sweep: Sweep
    ) -> None:
        """Take in how ∇ℓ changes along (Δz, Δx): for the next look, and no longer."""
        at, n = self.filled, self.states.shape[3]
        states, inputs = self.states[:, at], self.inputs[:, at]
        states.zero_()
        inputs.zero_()
        for place, (of_z, of_x) in ((S, move), (G, change)):
            states[:, place].copy_(of_z)
            inputs[:, place].copy_(of_x)
        self._void(at, None)
        # Of s with others' g, what g with their s says: the loss's Hessian is symmetric.
        for kept, window in ((self.of_states, self.states), (self.of_inputs, self.inputs)):
            kept[:, at], kept[:, :, :, at] = 0.0, 0.0
            kinds = window.shape[2]
            found = products_with(window[:, : at + 1].flatten(1, 2), window[:, at, G, None]).mT
            found = found.unflatten(1, (at + 1, kinds))[..., 0]
            kept[:, : at + 1, :, at, G] = kept[:, at, G, : at + 1] = found
            kept[:, : at + 1, G, at, S] = kept[:, at, S, : at + 1, G] = found[:, :, S]
            kept[:, at, S, at, S] = window[:, at, S].double().square().sum(dim=1)
        off, adjoint_off, descent = Point.split(sweep.r.to(self.states.dtype), n)
        for which, residual in enumerate((off, adjoint_off)):
            self.with_off[:, which, at] = products_with(states, residual[:, None])[:, 0]
        self.with_grad[:, at] = products_with(inputs, -descent[:, None])[:, 0]

    def products(self, count: int) -> Products:
        """Of the first ``count`` slots."""
        return Products(
            self.of_states[:, :count, :, :count].permute(0, 2, 1, 4, 3),
            self.of_inputs[:, :count, :, :count].permute(0, 2, 1, 4, 3),
            self.with_off[:, 0, :count].mT,
            self.with_off[:, 1, :count].mT,
            self.with_grad[:, :count].mT,
        )

    def distances(self) -> Tensor:
        """Squared, of the present iterate (z, μ, x) from the middle of each difference, (B, k).

        It is the sum of all later ones and half of it.
        """
        k = self.filled
        of_states, of_inputs = self.of_states[:, :k, :, :k], self.of_inputs[:, :k, :, :k]
        steps = of_states[:, :, S, :, S] + of_states[:, :, M, :, M] + of_inputs[:, :, S, :, S]
        age = (self.newest - torch.arange(k, device=steps.device)) % self.memory
        later = (age[:, None] < age).double() + 0.5 * (age[:, None] == age).double()
        summed = later.expand_as(steps).mT @ steps @ later.expand_as(steps)
        return summed.diagonal(dim1=1, dim2=2).clamp_min(0)

    def combine(self, coefficients: dict[int, Tensor]) -> Tensor:
        """Σ c_i · difference i of the states' kinds given: each ``(B, q)``, -> ``(B, n)``."""
        total: Tensor | None = None
        for kind, each in coefficients.items():
            row, window = each[:, None].to(self.states.dtype), self.states[:, : each.shape[1], kind]
            total = torch.bmm(row, window) if total is None else torch.baddbmm(total, row, window)
        assert total is not None
        return total[:, 0]

    def combine_inputs(self, coefficients: Tensor) -> Tensor:
        """The same of inputs: ``(B, 3, q) -> (B, d)``."""
        row = coefficients.mT.flatten(1)[:, None].to(self.inputs.dtype)
        return torch.bmm(row, self.inputs[:, : coefficients.shape[2]].flatten(1, 2))[:, 0]

    def forget(self, mask: Tensor) -> None:
        """Leave out all differences of the problems in ``mask``, and their next one."""
        self.of_states.masked_fill_(mask[:, None, None, None, None], 0.0)
        self.of_inputs.masked_fill_(mask[:, None, None, None, None], 0.0)
        self.fresh = mask if self.fresh is None else self.fresh | mask

    def _void(self, at: int, fresh: Tensor | None) -> None:
        """Zero the differences in a slot where they are not finite, or say nothing."""
        states, inputs = self.states[:, at], self.inputs[:, at]
        sizes = norm(states.flatten(1)) + norm(inputs.flatten(1))
        void = ~(sizes < torch.inf)
        if fresh is not None:
            void = void | fresh
        if some(void):
            states.masked_fill_(void[:, None, None], 0.0)
            inputs.masked_fill_(void[:, None, None], 0.0)

    def _multiply(self, at: int, off: Tensor, adjoint_off: Tensor, grad: Tensor) -> None:
        """The products of the newest rows with all others', and of all with the residuals."""
        k = self.filled
        rows = torch.cat([self.states[:, at], off[:, None], adjoint_off[:, None]], dim=1)
        found = products_with(self.states[:, :k].flatten(1, 2), rows).mT.unflatten(1, (k, 5))
        self.of_states[:, :k, :, at] = found[..., :5]
        self.of_states[:, at, :, :k] = found[..., :5].permute(0, 3, 1, 2)
        self.with_off[:, :, :k] = found[..., 5:].permute(0, 3, 1, 2)
        rows = torch.cat([self.inputs[:, at], grad[:, None]], dim=1)
        found = products_with(self.inputs[:, :k].flatten(1, 2), rows).mT.unflatten(1, (k, 3))
        self.of_inputs[:, :k, :, at] = found[..., :3]
        self.of_inputs[:, at, :, :k] = found[..., :3].permute(0, 3, 1, 2)
        self.with_grad[:, :k] = found[..., 3]
