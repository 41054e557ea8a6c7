"""Units of z, μ and x in which the blocks of the KKT system's matrix are alike.

With L the Lagrangian, J = ∂f/∂z and B = ∂f/∂x, the system of an implicit derivative has the matrix

    H = ( L_zz    Jᵀ − I   L_zx )
        ( J − I   0        B    )
        ( L_xz    Bᵀ       L_xx )

whose upper left and lower right are in the loss's units, and B in those of z over x. Where the loss
is large, or x small, what a derivative comes from is in rows of H w − c that count for nothing
beside ∇ₓL's, and a residual relative to ‖c‖ may be tiny with w all wrong. With D = diag(d, 1/d, e),
of one number for each block, the rows of D H D are of one size: J − I is left as it is, D takes
the loss's units from L_zz, and the larger of L_xx and BᵀL_zz B becomes 1.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from implicitopt.kkt import Point, norm

__all__ = ["balance"]

#: The largest power of two among units: their products with a float32 must not overflow.
LARGEST = 40


def balance(product: Callable[[Tensor], Tensor], like: Tensor, n: int) -> Tensor:
    """D of each problem, ``(B, 2n + d)``, in at least float32, from two products with H.

    One with random numbers for z, the other for x: of Gaussian w, ‖A w‖ is about ‖A‖ (Frobenius).
    They are the same for every problem, so that neighbours do not matter. The units are powers of
    two, with which nothing is rounded.
    """
    wide = torch.promote_types(like.dtype, torch.float32)
    sizes = n, n, like.shape[1] - 2 * n
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(1, like.shape[1], generator=generator).to(like).expand_as(like)
    zeros = [like.new_zeros(len(like), size) for size in sizes]
    of_z, _, of_x = probe.split(sizes, dim=1)

    def answer(w: Point, length: Tensor) -> Point:
        found = Point.split(product(w.joined()).to(wide), n)
        return Point(*(norm(block) / length for block in found))

    in_z = answer(Point(of_z, zeros[1], zeros[2]), norm(of_z))
    in_x = answer(Point(zeros[0], zeros[1], of_x), norm(of_x))
    loss = torch.where(_usable(in_z.z), in_z.z, 1.0)
    of_state, of_input = -_half_log(in_z.z), -_half_log(torch.hypot(in_x.x, loss * in_x.mu**2))
    exponents = torch.stack([of_state, -of_state, of_input], dim=1).to(wide)
    lengths = torch.tensor(sizes, device=like.device)
    return torch.exp2(exponents).repeat_interleave(lengths, dim=1, output_size=sum(sizes))


def _usable(size: Tensor) -> Tensor:
    return (size > 0) & size.isfinite()


def _half_log(size: Tensor) -> Tensor:
    """log₂ of the root, a whole number; 0 where it is of no use."""
    half = (torch.where(_usable(size), size, 1.0).log2() / 2).round()
    return half.clamp(-LARGEST, LARGEST)
