"""Per-problem histories of steps: the L-BFGS direction, and a linear model of what follows x."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from implicitopt.kkt import at_hand, norm

__all__ = ["Secants", "ratio"]


def ratio(a: Tensor, b: Tensor) -> Tensor:
    """a / b, and 0 where b is 0."""
    return torch.where(b != 0, a / b, 0.0)


@dataclass
class Secants:
    """The last differences of several quantities, each ``(B, m, ·)``, a ring for each problem."""

    rings: list[Tensor]
    count: Tensor  # (B,) differences pushed so far

    @classmethod
    def empty(cls, memory: int, *like: Tensor) -> Secants:
        rows = len(like[0])
        rings = [block.new_zeros(rows, memory, block.shape[1]) for block in like]
        return cls(rings, torch.zeros(rows, dtype=torch.int64, device=like[0].device))

    def push(self, mask: Tensor, *changes: tuple[Tensor, Tensor]) -> None:
        """Record new − old of each quantity for the problems in ``mask``."""
        slot = self.count % self.rings[0].shape[1]
        rows = mask.nonzero()[:, 0] if at_hand(mask) else None
        for ring, (new, old) in zip(self.rings, changes, strict=True):
            if rows is not None:
                ring[rows, slot[rows]] = new[rows] - old[rows]
                continue
            at = slot[:, None, None].expand(-1, 1, ring.shape[2])
            kept = torch.where(mask[:, None, None], (new - old)[:, None], ring.gather(1, at))
            ring.scatter_(1, at, kept)  # one row of each ring, not all of it
        self.count = self.count + mask

    def clear(self, mask: Tensor) -> None:
        """Forget the differences of the problems in ``mask``."""
        self.count = torch.where(mask, torch.zeros_like(self.count), self.count)

    def quasi_newton(self, g: Tensor, scale: Tensor) -> Tensor:
        """−H g, H the L-BFGS inverse of the pairs (dx, dg) with H₀ = ``scale`` at first.

        With the pairs as rows of S and Y, oldest first, R the upper triangle of S Yᵀ, D its
        diagonal, and γ the scale or, from the newest pair, sᵀy / yᵀy,

            a = R⁻¹ S g,   H g = γ g + Sᵀ R⁻ᵀ (D a + γ (Y Yᵀ a − Y g)) − γ Yᵀ a.

        Source: Byrd, Nocedal and Schnabel, "Representations of quasi-Newton matrices", 1994, 3.1.
        """
        S, Y = (ring.double() for ring in self.rings)
        wide = g.double()
        m = S.shape[1]
        ages = torch.arange(m, device=g.device)
        slots = (self.count[:, None] + ages) % m  # from the oldest to the newest
        there = ages >= m - self.count[:, None]

        def ordered(products: Tensor) -> Tensor:
            products = products.gather(1, slots[..., None].expand_as(products))
            return products.gather(2, slots[:, None].expand(-1, m, -1))

        SY, YY = ordered(S @ Y.mT), ordered(Y @ Y.mT)
        pairs = there[:, :, None] & there[:, None]
        R = torch.where(pairs, SY, 0.0).triu()
        D = R.diagonal(dim1=1, dim2=2).clone()
        fitted = ratio(D[:, -1], YY[:, -1, -1])
        gamma = torch.where(fitted > 0, fitted, scale.double())[:, None]
        R.diagonal(dim1=1, dim2=2).masked_fill_(~there, 1.0)
        Sg, Yg = ((rows @ wide[..., None])[..., 0].gather(1, slots) for rows in (S, Y))
        a = _triangular(R, torch.where(there, Sg, 0.0), upper=True)
        inner = D * a + gamma * ((YY @ a[..., None])[..., 0] - Yg)
        b = _triangular(R.mT, torch.where(there, inner, 0.0), upper=False)
        back = (ages - self.count[:, None]) % m
        along_s, along_y = b.gather(1, back), (gamma * a).gather(1, back)
        step = (along_y[:, None] @ Y - along_s[:, None] @ S)[:, 0] - gamma * wide
        return step.to(g.dtype)

    def predict(self, dx: Tensor) -> list[Tensor]:
        """What the other quantities do when the first moves by ``dx``: least squares."""
        first = self.rings[0].double()
        used = torch.arange(first.shape[1], device=dx.device) < self.count[:, None]
        gram = first @ first.mT
        square = gram.diagonal(dim1=1, dim2=2)
        unit = torch.where(used & (square > 0), square.rsqrt(), 0.0)
        gram = torch.where(used[:, :, None] & used[:, None], gram, 0.0)
        gram = gram * unit[:, :, None] * unit[:, None]
        gram.diagonal(dim1=1, dim2=2).add_(1e-6)
        rhs = torch.where(used, (first @ dx.double()[..., None])[..., 0], 0.0) * unit
        c, _ = torch.linalg.solve_ex(gram, rhs[..., None])
        weights = torch.nan_to_num(c[..., 0] * unit).to(dx.dtype)[:, None]
        return [(weights @ ring)[:, 0] for ring in self.rings[1:]]


def _triangular(matrix: Tensor, rhs: Tensor, *, upper: bool) -> Tensor:
    """The solution of one triangular system for each problem, ``(B, m)``."""
    found: Tensor = torch.linalg.solve_triangular(matrix, rhs[..., None], upper=upper)[..., 0]
    return found


def clip(step: Tensor, radius: Tensor) -> Tensor:
    """``step`` shortened to at most ``radius``, per problem."""
    length = norm(step)
    share = torch.where(length > radius, radius / length, 1.0)
    return step * share[:, None].to(step.dtype)
