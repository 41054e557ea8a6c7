"""What a solve's sweeps tell of the system that its gradient needs: differences along its way.

Between two sweeps the iterate v = (z, μ, x) changes by s, and what the joint iteration adds to it,
r = (f − z, μ⁺ − μ, −∇ₓL), by y ≈ A s with A = ∂r/∂v. The linear system of the backward pass has the
matrix A at the solution, and S and Y of the last steps are an inverse of it on what Y spans.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from implicitopt.accelerators.anderson import products_with
from implicitopt.kkt import Point, choose, norm
from implicitopt.solvers.secants import Secants

__all__ = ["Trail"]

#: Of how many of the newest differences it depends whether they are used.
NEWEST = 30
#: They are where Sᵀ H S, H the Hessian of L, is symmetric up to this share of it: A is then one
#: matrix for all of them.
SYMMETRIC = 0.1
#: Added to YᵀY, relative to its largest entry.
RIDGE = 1e-4


@dataclass
class Trail:
    """The last differences of each problem."""

    secants: Secants  # of v and r
    last: tuple[Tensor, Tensor]  # v and r of the last sweep
    begun: Tensor  # (B,) whether there was one
    states: int  # n, the length of z and of μ

    @classmethod
    def at(cls, start: Point, size: int) -> Trail:
        v = start.joined()
        v = torch.zeros_like(v, dtype=torch.promote_types(v.dtype, torch.float32))
        secants = Secants.empty(size, v, v)
        return cls(secants, (v, v), secants.count > 0, start.z.shape[1])

    def push(self, point: Point, r: Tensor, moving: Tensor) -> None:
        """Take in the sweep at ``point``, for the problems in ``moving``, ``(B,)``."""
        wide = self.last[0].dtype
        now = point.joined().to(wide), r.to(wide)
        # What is larger could have differences that overflow.
        sound = moving & (norm(now[0]) + norm(now[1]) < torch.finfo(wide).max / 4)
        self.secants.push(sound & self.begun, *zip(now, self.last, strict=True))
        self.last = choose(sound, now, self.last)
        self.begun = self.begun | sound

    def inverse(self, settled: Tensor, units: Tensor) -> Callable[[Tensor], Tensor]:
        """w ↦ (S + Y) (YᵀY)⁻¹ Yᵀ w − w, about A⁻¹ w, ``(B, N) -> (B, N)``, in units of v.

        Only −w for problems that are not in ``settled``, ``(B,)``, or whose A changes on the way.
        ``units``, ``(B, N)``: s is measured in them, and y in one over those of its equations,
        which are z's for μ⁺ − μ = ∂L/∂z, μ's for f − z, and x's for −∇ₓL.

        Source: the inverse of multisecant quasi-Newton methods, Fang and Saad 2009; that of a
        forward solve in the backward one, SHINE (Ramzi et al. 2022), where nothing corrects it.
        """
        s, y = self.secants.rings
        if bool((units != 1).any()):
            of_z, of_mu, of_x = Point.split(units.to(s.dtype), self.states)
            s = s / units.to(s.dtype)[:, None]
            y = y * torch.cat((of_mu, of_z, of_x), dim=1)[:, None]
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
        unit = unit[:, None]

        def apply(w: Tensor) -> Tensor:
            row = w[:, None].to(y.dtype)
            c = torch.bmm(products_with(y, row) * unit, inverse) * unit
            c = c.to(y.dtype)
            return torch.baddbmm(row, c, s, beta=-1).baddbmm_(c, y)[:, 0].to(w.dtype)

        return apply

    def _asymmetry(self, by_unit: Tensor) -> Tensor:
        """‖W − Wᵀ‖ / 2‖W‖ of W = Sᵀ H S, of the newest differences, ``(B,)``."""
        (s_z, s_mu, s_x), (y_z, y_mu, y_x) = (
            block.split([self.states, self.states, block.shape[2] - 2 * self.states], dim=2)
            for block in self.secants.rings
        )
        # H s is (μ⁺ − μ, f − z, ∇ₓL) of what r is (f − z, μ⁺ − μ, −∇ₓL) of.
        w = products_with(y_mu, s_z) + products_with(y_z, s_mu) - products_with(y_x, s_x)
        w = w * by_unit
        slots = torch.arange(w.shape[1], device=w.device)
        new = (self.secants.count[:, None] - 1 - slots) % w.shape[1] < NEWEST
        w = torch.where(new[:, :, None] & new[:, None], w, 0.0)
        return norm((w - w.mT).flatten(1)) / (2 * norm(w.flatten(1)))
