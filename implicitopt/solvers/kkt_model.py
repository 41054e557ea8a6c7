"""A model of the KKT system from secants, and the step to its solution.

With J = ∂f/∂(z, x), the Hessian H of L in (z, x) and E = (I, 0), Newton's step for the KKT system

    (J − E) s = −(f − z),     (J − E)ᵀ m + H s = −∇_{(z, x)} L,      s = (Δz, Δx),  m = Δμ

needs J and H, of which differences say (rows of S, Y, M, W, G; see ``kkt_secants``)

    J Sᵀ = Yᵀ,     M J = W − S C,     (∂²ℓ) Sᵀ = Gᵀ,     H = ∂²ℓ + C.

The model takes the smallest J with these: from the first, J₁ = Yᵀ P with P = (S Sᵀ + D)⁻¹ S; what
the second adds to it, E = W − M J₁, belongs to C within the span of S, where J₁ is known, and to J
outside of it. So both ends of J are known, states' responses and adjoints', and a step needs half
of the differences that it would with the states', adjoints' and inputs' differences in one piece.
The loss's Hessian has the smallest rank, Gᵀ (S Gᵀ)⁺ G; inputs not tried yet have curvature 1/α.

D, on the diagonal, is what an old difference may be wrong by: the square of the distance since,
times that of ``NONLINEAR``. It decides which of two contradicting differences counts. Less of it is
taken where f turns out to be straighter: where the newest y is what the others make of its s, or,
since that may be in a direction of which they know nothing, where both ends agree, M Yᵀ = W Sᵀ, as
they do for a linear f. The same for the loss, with S Gᵀ, symmetric where ∂²ℓ does not change.

States and adjoints are eliminated, each at its equilibrium as Δx has it. What is left is a
quadratic function of Δx, which is minimized: at one go, or, under a constraint, by projected
gradients. Where it has no minimum, its stationary point may lie uphill, and the step goes the
opposite way. All of it is done on products of the differences: the model is never formed.

Source: secants of both ends, Griewank and Walther 2002, and Schlenkrich, Griewank, Walther 2010
(adjoint Broyden updates). Projected gradients: Birgin, Martínez, Raydan 2000.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, bmm
from torch.nn.functional import pad

from implicitopt.kkt import Point, Sweep, norm, some
from implicitopt.solvers.kkt_secants import G, KKTSecants, M, S, W, Y
from implicitopt.solvers.secants import ratio

__all__ = ["Model"]

#: How much J may change, in relation to itself, over a distance of 1 + ‖(z, μ, x)‖; and the square
#: of that for the loss's Hessian, in which contradictions are worse.
NONLINEAR, LOSS_NONLINEAR = 1.0, 10.0
#: Directions of x count as tried from this share of a difference of x on, squared; a smaller one
#: where f and the loss are found to be straight.
TRIED = 1e-3
#: Added to the loss's products, against the largest.
FLAT = 1e-10
#: The least of the shares of ``NONLINEAR`` and its like, squared, and how fast they may fall.
STRAIGHT, STRAIGHTER = 1e-12, 1 / 16
#: And the most, of f's and of the loss's.
MOST_CURVED = 1.0, 30.0
#: f is curved at most so many times as much as its ends disagree: the square of M Yᵀ − W Sᵀ, in
#: relation, over the squared distance.
ENDS_DISAGREE = 10.0
#: What rounding makes of a difference counts so many times.
NOISE = 100.0
#: The loss is as curved as ``LOSS_NONLINEAR`` says where S Gᵀ is, in relation, so far from
#: symmetric, over the squared distance.
ASYMMETRIC = 0.3
#: Where a difference of adjoints is so many times that of states, squared and each in relation to
#: its block, what J leaves unexplained is as likely J's error as C.
ADJOINTS_DROWN = 0.1
#: And where it is so many times smaller, as on the way from an earlier solution, what it tells of J
#: drowns in C; less so where f is straight.
STATES_DROWN = 1e-3
#: α becomes one over the curvature met where it is so many times too large or too small.
FAR_OFF = 10.0
#: Projected gradients made under a constraint.
PROJECTED = 10


class Basis(NamedTuple):
    """What changes of x are written in: c vectors, those of x or, where x is longer, others.

    The others are R, the inputs of all differences s, w and g, and that of the loss's probe.
    """

    rows: Tensor  #: (B, 3, k, c) the differences' inputs in it
    products: Tensor | None  #: (B, c, c) of its vectors with each other; None: they are x's own
    grad: Tensor  #: (B, c, 1) with ∇ₓL

    def dual(self, v: Tensor) -> Tensor:
        """Products of its vectors with those that v's columns are in it."""
        return v if self.products is None else bmm(self.products, v)


class Probe(NamedTuple):
    """How ∇ℓ changes along a step s: by g, of which G says Gᵀ a."""

    g: tuple[Tensor, Tensor]  #: ``(B, n)`` and ``(B, d)``
    a: Tensor  #: (B, k, 1)
    with_d: Tensor  #: (B, 2k, 1) g's products with D, over states
    row: Tensor  #: (B, 1, c + 1) ⟨g − Gᵀ a, s⟩ of (Δx in the basis, 1)
    curvature: Tensor  #: (B, 1, 1) ⟨g − Gᵀ a, s⟩ of the step it was found along


class Move(NamedTuple):
    """A step in x, and what follows of it."""

    dx: Tensor  #: (B, d)
    w: Tensor  #: (B, c, 1) Δx's products with the basis
    back: Tensor  #: (B, n) Δz to the equilibrium at x as it is
    along: Tensor  #: (B, n) Δz that Δx adds


class Model:
    """The model at one iterate, all in products of unit differences, float64; k of each kind."""

    def __init__(self, secants: KKTSecants, sweep: Sweep, alpha: Tensor) -> None:
        """``alpha``, (B, 1): for x where no curvature has been met."""
        self.secants, self.k = secants, secants.filled
        off, adjoint_off, descent = Point.split(sweep.r, sweep.f.shape[1])
        self.tau = secants.tau
        self.residuals = Point(off, adjoint_off, descent / self.tau.to(descent.dtype))
        self.probed: Probe | None = None
        self._fit()
        self._reduce(alpha.double()[..., None])

    def _fit(self) -> None:
        """J = Dᵀ T V and how z and μ follow x, C, and the loss's Hessian.

        With D = (Y, M) and V = (S, W), states' equilibria change by Dᵀ Φ V_x along x, and the
        adjoints' by its transpose: Φ = (I − T V_z Dᵀ)⁻¹ T.
        """
        k, secants = self.k, self.secants
        states, inputs = secants.of_states[:, :, :k, :, :k], secants.of_inputs[:, :, :k, :, :k]
        s, m = secants.lengths[:, :, :k].unbind(1)
        m_over_s, units = ratio(m, s), secants.ratio[:, None]  # C is in those of μ over states'
        # Of s with s, w and g, over states and inputs.
        ss, sw, sg = (states[:, S, :, : G + 1] + inputs[:, S]).unbind(2)
        (my, mm), xx = states[:, M, :, Y:].unbind(2), inputs[:, S, :, S]
        self.x_unit = x_unit = _diagonal(xx).rsqrt().nan_to_num(posinf=0.0)
        xx = xx * (x_unit[:, :, None] * x_unit[:, None])
        distances = secants.distances(ss, mm) / secants.size[:, None].square()
        of_f, of_loss = (share[:, None] * distances for share in secants.curved.unbind(1))
        ridge = NONLINEAR**2 * of_f + secants.rounding  # D
        of_either = secants.bend.amax(dim=1, keepdim=True)
        shifts = (
            ridge,
            ridge + _drowned(STATES_DROWN * secants.curved[:, :1], ratio(s, m) / units),
            ridge + _drowned(ADJOINTS_DROWN, m_over_s * units),
            of_either * (TRIED + NONLINEAR**2 * distances) + secants.rounding,
            self._shift(sg, of_loss),
        )
        grams = torch.stack([ss, mm, ss, xx, torch.lerp(sg, sg.mT, 0.5)], dim=1)
        grams.diagonal(dim1=2, dim2=3).add_(torch.stack(shifts, dim=1))
        inv_s, inv_m, inv_c, self.tried, self.loss = torch.linalg.inv_ex(grams)[0].unbind(1)
        if k > 1:
            ends = torch.stack([my, sw.mT], dim=1)
            self._learn(distances, inv_s, states[:, Y, :, Y], sg, ends)
        known = torch.baddbmm(sw.mT, my, bmm(inv_s, ss), alpha=-1)  # E Sᵀ: C there
        curved = known * m_over_s[:, :, None]
        self.curvature = bmm(bmm(inv_c, torch.lerp(curved, curved.mT, 0.5)), inv_c)
        self.T = inv_s.new_zeros(len(ss), 2 * k, 2 * k)
        self.T[:, :k, :k], self.T[:, k:, k:] = inv_s, inv_m
        self.T[:, k:, :k] = bmm(inv_m, bmm(my + known, inv_s)).neg_()
        v_d = states[:, : W + 1, :, Y:].reshape(len(ss), 2 * k, 2 * k)
        self.sg_d = states[:, : G + 1 : G, :, Y:].reshape(len(ss), 2 * k, 2 * k)
        self.lu = _factors(bmm(self.T, v_d).neg_())

    def _learn(
        self, distances: Tensor, inv_s: Tensor, yy: Tensor, sg: Tensor, ends: Tensor
    ) -> None:
        """How curved f and the loss are by the newest difference, for the next step.

        ``a`` is what is left of the newest difference when the others have told all they know.
        ``ends``: M Yᵀ and W Sᵀ, (B, 2, k, k).
        """
        secants, at = self.secants, self.secants.newest
        a = inv_s[:, :, at, None] / inv_s[:, at, at, None, None]
        unlike = bmm(bmm(yy, a).mT, a)[:, 0, 0] / _diagonal(yy).amax(dim=1)
        of_f = unlike / (NONLINEAR**2 * (a[..., 0].square() * distances).sum(dim=1))
        apart = distances + distances[:, at, None]
        noise = NOISE * secants.noise
        noise = noise + noise[:, at, None]
        ends = torch.stack([ends[:, :, at], ends[..., at]], dim=2)
        off = (ends[:, 0] - ends[:, 1]).square() / (apart + noise.square())[:, None]
        disagree = off.sum(dim=(1, 2)) / ends.square().sum(dim=(1, 2, 3))
        of_f = torch.fmin(of_f, ENDS_DISAGREE * disagree)  # past NaN: there may be no adjoints
        size = _diagonal(sg).abs().sqrt()
        skew = (sg[:, at] - sg[:, :, at]).abs() / (size * size[:, at, None] * (apart + noise))
        of_loss = skew.nan_to_num(0.0, posinf=0.0).mean(dim=1) / ASYMMETRIC
        most_f, most_loss = MOST_CURVED
        found = torch.stack([of_f.clamp(max=most_f), of_loss.clamp(max=most_loss)], dim=1)
        found = found.nan_to_num(1.0).clamp_min(STRAIGHT)
        secants.curved = torch.maximum(found, STRAIGHTER * secants.curved)

    def _reduce(self, alpha: Tensor) -> None:
        """The quadratic function of Δx: gradient ∇ₓL + Bᵀ p and Hessian I/α + Bᵀ K B, B the basis.

        And what the step is made of, each as a function of (Δx in the basis, 1).
        """
        k, secants = self.k, self.secants
        self.basis = basis = self._basis()
        c = basis.rows.shape[3]
        off = secants.with_off[:, :, :k, None]
        of = torch.cat([basis.rows, off[:, : G + 1]], dim=3)  # (B, 3, k, c + 1)
        v = of[:, : W + 1].flatten(1, 2)
        self.forward = torch.linalg.lu_solve(*self.lu, bmm(self.T, v))
        # With states and adjoints at their equilibria: S s and G s.
        along = torch.baddbmm(of[:, : G + 1 : G].flatten(1, 2), self.sg_d, self.forward)
        s, g = along.split(k, dim=1)
        self.g_along = g
        self.back = torch.cat([bmm(self.curvature, s), bmm(self.loss, g)], dim=1)
        K_p = bmm(along[:, :, :c].mT, self.back)
        self.d_adjoint_off = secants.with_adjoint_off[:, Y:, :k].flatten(1)[..., None]
        p = torch.baddbmm(K_p[:, :, c:], self.forward[:, :, :c].mT, self.d_adjoint_off)
        tried = basis.rows[:, S] * self.x_unit[..., None]  # to unit length
        self.known_x = bmm(bmm(tried.mT, self.tried), tried)
        self.tried_x, self.first_alpha = tried.mT, alpha
        self._set(K_p[:, :, :c], p)

    def _basis(self) -> Basis:
        k, secants = self.k, self.secants
        d = secants.inputs.shape[3]
        grad = -self.residuals.x
        if d <= 3 * k:
            rows = secants.inputs[:, :k].transpose(1, 2).double()
            rows = rows * secants.counts[:, : G + 1, :k, None]
            return Basis(rows, None, grad.double()[..., None])
        products = secants.of_inputs[:, :, :k, :, :k].reshape(len(grad), 3 * k, 3 * k)
        eye = torch.eye(3 * k, 3 * k + 1, dtype=products.dtype, device=products.device)
        rows = eye.unflatten(0, (3, k)).expand(len(grad), -1, -1, -1)
        with_grad = pad(secants.with_grad[:, :, :k].flatten(1), (0, 1))
        return Basis(rows, pad(products, (0, 1, 0, 1)), with_grad[..., None])

    def probe(self, move: tuple[Tensor, Tensor], change: tuple[Tensor, Tensor]) -> None:
        """Learn how ∇ℓ changes along a step (Δz, Δx): a rank more for the loss's Hessian."""
        k, c, basis, secants = self.k, self.K.shape[1], self.basis, self.secants
        (s_z, s_x), (g_z, g_x) = move, change
        unit = torch.hypot(norm(s_z), norm(s_x)).reciprocal().nan_to_num(posinf=0.0)[:, None]
        s_z, s_x, g_z, g_x = (unit * block for block in (s_z, s_x, g_z, g_x))
        on_s, *on_d = secants.states_with(g_z, (S, Y, M)).split(k, dim=1)
        of_inputs = secants.inputs_with(g_x)
        on_s = (on_s + of_inputs[:, S])[..., None]
        with_d = torch.cat(on_d, dim=1)[..., None]
        a = bmm(self.loss, on_s)
        own = ((s_z * g_z).sum(dim=1) + (s_x * g_x).sum(dim=1)).double()[:, None, None]
        flat = torch.copysign(self.flat[..., None], own)
        curvature = torch.where(own == 0, 1.0, own + flat - bmm(on_s.mT, a))
        row = torch.baddbmm(bmm(with_d.mT, self.forward), a.mT, self.g_along, alpha=-1)
        row[:, 0, c] += (g_z * self.residuals.z).sum(dim=1)
        if basis.products is None:
            row[:, 0, :c] += g_x
        else:
            row[:, 0, c - 1] += 1.0
            with_g = torch.cat([of_inputs.flatten(1), (g_x * g_x).sum(dim=1, keepdim=True)], dim=1)
            basis.products[:, c - 1] = basis.products[:, :, c - 1] = with_g
            basis.grad[:, c - 1, 0] = -(g_x * self.residuals.x).sum(dim=1)
        found = bmm(row[:, :, :c].mT, row / curvature)
        self._set(self.met + found[:, :, :c], self.p + found[:, :, c:])
        self.probed = Probe((g_z, g_x), a, with_d, row, curvature)

    def solve(self, x: Tensor, project: Callable[[Tensor], Tensor] | None) -> Move:
        """The least of the quadratic function, with x + Δx in C.

        Where it curves downward Newton's step may lead up, to a saddle or a maximum: then it is
        made the other way, which leads down, and no less steeply as it goes on.
        """
        K, p, basis, alpha = self.K, self.p, self.basis, self.alpha
        c = K.shape[1]
        system = alpha * (K if basis.products is None else bmm(K, basis.products))
        _diagonal(system).add_(1.0)
        grad = basis.grad + basis.dual(p)
        w = torch.linalg.solve_ex(system.mT, grad)[0] * -alpha  # Δx's products with the basis
        if basis.products is None:
            dx = w[..., 0].to(x.dtype)
        else:
            dx = self._inputs(torch.baddbmm(p, K, w)) - self.residuals.x
            dx = (-alpha[:, 0] * dx).to(x.dtype)
        of_x = (self.residuals.x * dx).sum(dim=1, dtype=torch.float64)
        slope = (p * w).sum(dim=(1, 2)) - of_x
        if some(slope > 0):
            down = torch.where(slope > 0, -1.0, 1.0)[:, None]
            dx, w = down.to(dx.dtype) * dx, down[..., None] * w
        if project is not None:
            dx, w = self._projected(x, project, dx)
        forward = torch.cat([self.forward[:, :, c:], bmm(self.forward[:, :, :c], w)], dim=2).mT
        of_y, of_m = forward.split(self.k, dim=2)
        back, along = self.secants.combine({Y: of_y, M: of_m}).to(x.dtype).unbind(1)
        return Move(dx, w, self.residuals.z + back, along)

    def _projected(
        self, x: Tensor, project: Callable[[Tensor], Tensor], newton: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Δx and its products with the basis, by projected gradients from the projected ``newton``.

        Of Barzilai and Borwein's length, each ending where the quadratic function is least on it.
        """
        alpha, tau = self.alpha[:, 0].to(x.dtype), self.tau.to(x.dtype)

        def within(dx: Tensor) -> Tensor:
            return (project(x + dx / tau) - x) * tau

        grad = -self.residuals.x + self._in_x(self.p)
        dx = within(newton)
        change, w = self._curved(dx)
        better = ((2 * grad + change) * dx).sum(dim=1, keepdim=True) < 0
        dx, w, change = (torch.where(better, a, 0.0) for a in (dx, w[..., 0], change))
        grad, length = grad + change, alpha
        for _ in range(PROJECTED):
            move = within(dx - length * grad) - dx
            change, of_move = self._curved(move)
            square, curved = ((a * move).sum(dim=1, keepdim=True) for a in (move, change))
            # The slope is at least as steep as −‖move‖²/length, which knows no cancellation.
            share = torch.where(curved > 0, square / (length * curved), 1.0).clamp(max=1)
            dx, grad, w = dx + share * move, grad + share * change, w + share * of_move[..., 0]
            length = torch.where(curved > 0, square / curved, length)
        return dx, w[..., None].double()

    def _in_x(self, rho: Tensor) -> Tensor:
        found = rho[..., 0] if self.basis.products is None else self._inputs(rho)
        return found.to(self.residuals.x.dtype)

    def _curved(self, dx: Tensor) -> tuple[Tensor, Tensor]:
        """(I/α + Bᵀ K B) Δx, and B Δx."""
        if self.basis.products is None:
            w = dx.double()[..., None]
        else:
            w = self.secants.inputs_with(dx).flatten(1)
            last = (
                torch.zeros_like(w[:, :1])
                if self.probed is None
                else (self.probed.g[1] * dx).sum(dim=1, keepdim=True).double()
            )
            w = torch.cat([w, last], dim=1)[..., None]
        return dx / self.alpha[:, 0].to(dx.dtype) + self._in_x(bmm(self.K, w)), w

    def step(self, found: Move, share: Tensor) -> Point:
        """(Δz, Δμ, Δx), of which Δx, with what follows, only that share, ``(B, 1)``.

        Δμ = μ⁺ − μ + Vᵀ backward + Sᵀ sigma + Gᵀ h, over states.
        """
        k = self.k
        w = pad(found.w * share[..., None], (0, 0, 0, 1), value=1.0)
        sigma_h = bmm(self.back, w)
        rest = self.d_adjoint_off
        if self.probed is not None:
            along = bmm(self.probed.row, w) / self.probed.curvature
            sigma_h[:, k:] -= self.probed.a * along
            rest = rest + self.probed.with_d * along
        rest = torch.baddbmm(rest, self.sg_d.mT, sigma_h)
        sigma, h = sigma_h.mT.split(k, dim=2)
        of_s, of_w = (self.T.mT @ torch.linalg.lu_solve(*self.lu, rest, adjoint=True)).mT.split(
            k, dim=2
        )
        dmu = self.secants.combine({S: of_s + sigma, W: of_w, G: h})[:, 0]
        if self.probed is not None:
            dmu = dmu + (along[:, 0] * self.probed.g[0]).to(dmu.dtype)
        share = share.to(found.dx.dtype)
        return Point(
            found.back + share * found.along,
            self.residuals.mu + dmu.to(self.residuals.mu.dtype),
            share * found.dx,
        )

    def _inputs(self, rho: Tensor) -> Tensor:
        """Bᵀ rho, ``(B, c, 1) -> (B, d)``."""
        rho, last = rho[:, :-1], rho[:, -1]
        found = self.secants.combine_inputs(rho.unflatten(1, (3, -1))[..., 0])
        return found if self.probed is None else found + last * self.probed.g[1]

    def _shift(self, sg: Tensor, wrong: Tensor) -> Tensor:
        """What is added to S Gᵀ: a little, and by how much each may be wrong."""
        diagonal = _diagonal(sg)
        size = diagonal.abs()
        self.flat = FLAT * size.amax(dim=1, keepdim=True)
        shift = torch.copysign(self.flat, diagonal) + LOSS_NONLINEAR * wrong * size
        return torch.where(diagonal == 0, 1.0, shift)

    def _set(self, met: Tensor, p: Tensor) -> None:
        """Take in p and the curvature met, ``(B, c, c)``; where x has not been tried it is 1/α."""
        self.met, self.p, self.alpha = met, p, self._untried(met)
        self.K = met - self.known_x / self.alpha

    def _untried(self, met: Tensor) -> Tensor:
        """α: one over the largest curvature met along a difference of x, where that is far from it.

        The first α knows nothing of the units of x and of the loss.
        """
        alpha = self.first_alpha
        along = self.basis.dual(self.tried_x)
        most = (bmm(met, along) * along).sum(dim=1).amax(dim=1)[:, None, None]
        share = alpha * most
        far = ((share > FAR_OFF) | (share < 1 / FAR_OFF)) & (most > 0) & (share < math.inf)
        return torch.where(far, 1 / most, alpha)


def _drowned(weight: Tensor | float, larger: Tensor) -> Tensor:
    """What is added to D where a difference is so many times larger than the one that matters."""
    return (weight * larger.square()).nan_to_num(0.0).clamp(max=1e12)


def _factors(minus: Tensor) -> tuple[Tensor, Tensor]:
    """LU factors of I + ``minus``."""
    _diagonal(minus).add_(1.0)
    lu, pivots, _ = torch.linalg.lu_factor_ex(minus)
    return lu, pivots


def _diagonal(matrices: Tensor) -> Tensor:
    return matrices.diagonal(dim1=1, dim2=2)
