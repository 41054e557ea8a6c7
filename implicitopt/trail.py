"""What a solve's sweeps tell of the system that its gradient needs: differences along its way.

Between two sweeps the iterate v = (z, μ, x) changes by s, and what the joint iteration adds to it,
r = (f − z, μ⁺ − μ, −∇ₓL), by y ≈ A s with A = ∂r/∂v. The linear system of the backward pass has the
matrix A at the solution, and S and Y of the last steps are an inverse of it on what Y spans.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from implicitopt.accelerators.anderson import products_with
from implicitopt.kkt import Point, choose, norm

__all__ = ["Trail"]

#: Of how many of the newest differences it depends whether they are used.
NEWEST = 15
#: They are where Sᵀ H S, H the Hessian of L, is symmetric up to this share of it: A is then one
#: matrix for all of them.
SYMMETRIC = 0.1
#: Added to YᵀY, relative to its largest entry.
RIDGE = 1e-4


@dataclass
class Trail:
    """The last differences of each problem, in a ring of m places."""

    ring: Tensor  # (B, m, 2, N) s and y
    last: Tensor  # (B, 2, N) v and r of the last sweep; NaN: there was none
    count: Tensor  # (B,) differences yet
    states: int  # n, the length of z and of μ

    @classmethod
    def at(cls, start: Point, size: int) -> Trail:
        rows, unknowns = len(start.x), sum(block.shape[1] for block in start)
        wide = torch.promote_types(start.x.dtype, torch.float32)
        ring = start.x.new_zeros(rows, size, 2, unknowns, dtype=wide)
        count = torch.zeros(rows, dtype=torch.int64, device=ring.device)
        return cls(ring, torch.full_like(ring[:, 0], math.nan), count, start.z.shape[1])

    def push(self, point: Point, r: Tensor, moving: Tensor) -> None:
        """Take in the sweep at ``point``, for the problems in ``moving``, ``(B,)``."""
        now = torch.stack((point.joined(), r), dim=1).to(self.ring.dtype)
        change = now - self.last
        size = norm(change.flatten(1))
        sound = moving & (size > 0) & (size < math.inf)
        at = torch.arange(len(now), device=now.device), self.count % self.ring.shape[1]
        self.ring[at] = choose(sound, change, self.ring[at])
        self.last = choose(moving & (norm(now.flatten(1)) < math.inf), now, self.last)
        self.count = self.count + sound

    def inverse(self, settled: Tensor) -> Callable[[Tensor], Tensor]:
        """w ↦ (S + Y) (YᵀY)⁻¹ Yᵀ w − w, about A⁻¹ w, ``(B, N) -> (B, N)``.

        Only −w for problems that are not in ``settled``, ``(B,)``, or whose A changes on the way.

        Source: the inverse of multisecant quasi-Newton methods, Fang and Saad 2009; that of a
        forward solve in the backward one, SHINE (Ramzi et al. 2022), where nothing corrects it.
        """
        s, y = self.ring.unbind(2)
        length = torch.linalg.vector_norm(s, dim=2, dtype=torch.float64)
        counts = length > torch.finfo(s.dtype).tiny ** 0.5  # its products do not underflow
        unit = torch.where(counts, 1 / length, 0.0)
        by_unit = unit[:, :, None] * unit[:, None]
        gram = products_with(y, y) * by_unit
        most = gram.diagonal(dim1=1, dim2=2).amax(dim=1, keepdim=True)
        gram.diagonal(dim1=1, dim2=2).add_(torch.where(most > 0, RIDGE * most, 1.0))
        inverse, _ = torch.linalg.inv_ex(gram)
        use = settled & (self._asymmetry(by_unit) <= SYMMETRIC) & inverse.isfinite().all(dim=(1, 2))
        inverse = torch.where(use[:, None, None], inverse, 0.0)
        unit, both = unit[:, None], self.ring.flatten(1, 2)

        def apply(w: Tensor) -> Tensor:
            row = w[:, None].to(both.dtype)
            c = torch.bmm(products_with(y, row) * unit, inverse) * unit
            c = c.to(both.dtype).repeat_interleave(2, dim=2)  # of s and of y
            return torch.baddbmm(row, c, both, beta=-1)[:, 0].to(w.dtype)

        return apply

    def _asymmetry(self, by_unit: Tensor) -> Tensor:
        """‖W − Wᵀ‖ / 2‖W‖ of W = Sᵀ H S, of the newest differences, ``(B,)``."""
        (s_z, s_mu, s_x), (y_z, y_mu, y_x) = (
            block.split([self.states, self.states, block.shape[2] - 2 * self.states], dim=2)
            for block in self.ring.unbind(2)
        )
        # H s is (μ⁺ − μ, f − z, ∇ₓL) of what r is (f − z, μ⁺ − μ, −∇ₓL) of.
        w = products_with(y_mu, s_z) + products_with(y_z, s_mu) - products_with(y_x, s_x)
        w = w * by_unit
        slots = torch.arange(w.shape[1], device=w.device)
        new = (self.count[:, None] - 1 - slots) % w.shape[1] < NEWEST
        w = torch.where(new[:, :, None] & new[:, None], w, 0.0)
        return norm((w - w.mT).flatten(1)) / (2 * norm(w.flatten(1)))
