"""Per-problem histories of steps: the L-BFGS direction, and a linear model of what follows x."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from implicitopt.kkt import at_hand, norm

__all__ = ["Secants", "ratio"]


def ratio(a: Tensor, b: Tensor) -> Tensor:
    """a / b, and 0 where b is 0."""
    return torch.where(b != 0, a / torch.where(b != 0, b, torch.ones_like(b)), torch.zeros_like(a))


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

    def newest(self, age: int) -> list[Tensor]:
        """The difference ``age`` steps before the last one; zeros where there is none."""
        memory = self.rings[0].shape[1]
        slot = ((self.count - 1 - age) % memory)[:, None, None]
        there = (self.count > age)[:, None]
        found = [ring.gather(1, slot.expand(-1, 1, ring.shape[2]))[:, 0] for ring in self.rings]
        return [torch.where(there, row, torch.zeros_like(row)) for row in found]

    def quasi_newton(self, g: Tensor, scale: Tensor) -> Tensor:
        """−H g by the L-BFGS two-loop recursion over the pairs (dx, dg), H₀ = ``scale`` at first.

        Source: Nocedal and Wright, "Numerical optimization", algorithm 7.4.
        """
        q, terms = g.to(scale.dtype), []
        for age in range(self.rings[0].shape[1]):
            s, y = (row.to(scale.dtype) for row in self.newest(age))
            inverse = ratio(torch.ones_like(scale), (s * y).sum(dim=1))
            a = inverse * (s * q).sum(dim=1)
            q = q - a[:, None] * y
            terms.append((a, inverse, s, y))
        _, _, s, y = terms[0]
        fitted = ratio((s * y).sum(dim=1), (y * y).sum(dim=1))
        q = q * torch.where(fitted > 0, fitted, scale)[:, None]
        for a, inverse, s, y in reversed(terms):
            q = q + (a - inverse * (y * q).sum(dim=1))[:, None] * s
        return -q.to(g.dtype)

    def predict(self, dx: Tensor) -> list[Tensor]:
        """What the other quantities do when the first moves by ``dx``: least squares."""
        used = torch.arange(self.rings[0].shape[1], device=dx.device) < self.count[:, None]
        first = torch.where(used[..., None], self.rings[0], 0.0).double()
        length = torch.linalg.vector_norm(first, dim=2)
        unit = ratio(torch.ones_like(length), length)
        first = first * unit[..., None]
        eye = torch.eye(first.shape[1], dtype=first.dtype, device=first.device)
        gram = first @ first.mT + 1e-6 * eye
        c, _ = torch.linalg.solve_ex(gram, first @ dx.double()[..., None])
        weights = torch.nan_to_num(c[..., 0] * unit).to(dx.dtype)
        weights = torch.where(used, weights, 0.0)[:, None]
        return [(weights @ ring)[:, 0] for ring in self.rings[1:]]


def clip(step: Tensor, radius: Tensor) -> Tensor:
    """``step`` shortened to at most ``radius``, per problem."""
    length = norm(step)
    share = torch.where(length > radius, ratio(radius, length), torch.ones_like(length))
    return step * share[:, None].to(step.dtype)
