"""What a solve's sweeps tell of the system that its gradient needs: differences along its way.

Between two sweeps the iterate v = (z, μ, x) changes by s, and what the joint iteration adds to it,
r = (f − z, μ⁺ − μ, −∇ₓL), by y ≈ A s with A = ∂r/∂v. The linear system of the backward pass has the
matrix A at the solution, and S and Y of the last steps are an inverse of it on what Y spans.

Where f is linear, the change g of ∇ℓ is what z and x make of μ⁺ and ∇ₓL, and the rest is what μ
makes of them: one difference tells of two, (Δz, 0, Δx) and (0, Δμ, 0).
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
RIDGE = 1e-6


@dataclass
class Trail:
    """The last differences of each problem."""

    secants: Secants  # of v and r and, where sweeps keep it apart, ∇ℓ
    last: tuple[Tensor, ...]  # these of the last sweep
    begun: Tensor  # (B,) whether there was one
    states: int  # n, the length of z and of μ

    @classmethod
    def at(cls, start: Point, size: int, *, apart: bool = False) -> Trail:
        """``apart``: sweeps will keep ∇ℓ apart."""
        v, n = start.joined(), start.z.shape[1]
        v = torch.zeros_like(v, dtype=torch.promote_types(v.dtype, torch.float32))
        last = (v, v, v[:, n:]) if apart else (v, v)
        secants = Secants.empty(size, *last)
        return cls(secants, last, secants.count > 0, n)

    def push(
        self,
        point: Point,
        r: Tensor,
        moving: Tensor,
        loss_grad: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Take in the sweep at ``point``, for the problems in ``moving``, ``(B,)``."""
        wide = self.last[0].dtype
        blocks = [point.joined(), r]
        if loss_grad is not None:
            blocks.append(torch.cat(loss_grad, dim=1))
        now = tuple(block.to(wide) for block in blocks)
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
        s, y, alike = self._pairs(settled)
        if bool((units != 1).any()):
            of_z, of_mu, of_x = Point.split(units.to(s.dtype), self.states)
            s = s / units.to(s.dtype)[:, None]
            y = y * torch.cat((of_mu, of_z, of_x), dim=1)[:, None]
        unit = _unit(s)
        gram = products_with(y, y) * (unit[:, :, None] * unit[:, None])
        most = gram.diagonal(dim1=1, dim2=2).amax(dim=1, keepdim=True)
        gram.diagonal(dim1=1, dim2=2).add_(torch.where(most > 0, RIDGE * most, 1.0))
        inverse, _ = torch.linalg.inv_ex(gram)
        use = settled & alike & inverse.isfinite().all(dim=(1, 2))
        inverse = torch.where(use[:, None, None], inverse, 0.0)
        unit = unit[:, None]

        def apply(w: Tensor) -> Tensor:
            row = w[:, None].to(y.dtype)
            c = torch.bmm(products_with(y, row) * unit, inverse) * unit
            c = c.to(y.dtype)
            return torch.baddbmm(row, c, s, beta=-1).baddbmm_(c, y)[:, 0].to(w.dtype)

        return apply

    def _pairs(self, settled: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """s and y, each ``(B, k, N)``, and whether they belong to one A, ``(B,)``.

        Those of (z, x) and of μ apart, 2k of them, for problems where these do.
        """
        s, y, *of_loss = self.secants.rings
        alike = self._asymmetry(s, y) <= SYMMETRIC
        if not of_loss:
            return s, y, alike
        (s_z, s_mu, s_x), (y_z, y_mu, y_x) = self._blocks(s), self._blocks(y)
        g_z, g_x = of_loss[0][:, :, : self.states], of_loss[0][:, :, self.states :]
        no_z, no_x = torch.zeros_like(s_z), torch.zeros_like(s_x)
        halves = (
            _rows([s_z, no_z, s_x], [no_z, s_mu, no_x]),
            _rows([y_z, g_z, -g_x], [no_z, y_mu - g_z, y_x + g_x]),
        )
        split = self._asymmetry(*halves) <= SYMMETRIC
        if not bool((split & settled).any()):
            return s, y, alike
        s, y = (
            torch.where(split[:, None, None], half, _rows([whole], [torch.zeros_like(whole)]))
            for half, whole in zip(halves, (s, y), strict=True)
        )
        return s, y, alike | split

    def _asymmetry(self, s: Tensor, y: Tensor) -> Tensor:
        """‖W − Wᵀ‖ / 2‖W‖ of W = Sᵀ H S, of the newest differences, ``(B,)``."""
        (s_z, s_mu, s_x), (y_z, y_mu, y_x) = self._blocks(s), self._blocks(y)
        # H s is (μ⁺ − μ, f − z, ∇ₓL) of what r is (f − z, μ⁺ − μ, −∇ₓL) of.
        w = products_with(y_mu, s_z) + products_with(y_z, s_mu) - products_with(y_x, s_x)
        size = self.secants.rings[0].shape[1]
        slots = torch.arange(s.shape[1], device=w.device) % size
        new = (self.secants.count[:, None] - 1 - slots) % size < NEWEST
        unit = torch.where(new, _unit(s), 0.0)
        w = w * (unit[:, :, None] * unit[:, None])
        return norm((w - w.mT).flatten(1)) / (2 * norm(w.flatten(1)))

    def _blocks(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Those of z, μ and x, ``(B, k, N)``."""
        n = self.states
        return rows[:, :, :n], rows[:, :, n : 2 * n], rows[:, :, 2 * n :]


def _rows(*halves: list[Tensor]) -> Tensor:
    """Each half's blocks side by side, one half after the other: ``(B, 2k, N)``."""
    return torch.cat([torch.cat(blocks, dim=2) for blocks in halves], dim=1)


def _unit(s: Tensor) -> Tensor:
    """One over the length of each, ``(B, k)``; 0 where its products would underflow."""
    length = torch.linalg.vector_norm(s, dim=2, dtype=torch.float64)
    return torch.where(length > torch.finfo(s.dtype).tiny ** 0.5, 1 / length, 0.0)
