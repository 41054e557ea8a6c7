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
times that of ``NONLINEAR``. It decides which of two contradicting differences counts.

All is done on products of the differences: the model is never formed.

Source: secants of both ends, Griewank and Walther 2002, and Schlenkrich, Griewank, Walther 2010
(adjoint Broyden updates).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor

from implicitopt.kkt import Point, Sweep, norm
from implicitopt.solvers.kkt_secants import G, KKTSecants, M, S, W, Y
from implicitopt.solvers.secants import ratio

__all__ = ["Model"]

#: How much J may change, in relation to itself, over a distance of 1 + ‖(z, μ, x)‖; and the square
#: of that for the loss's Hessian, in which contradictions are worse.
NONLINEAR, LOSS_NONLINEAR = 2.0, 30.0
#: Directions of x count as tried from this share of a difference of x on, squared.
TRIED = 1e-2
#: Added to the loss's products, against the largest.
FLAT = 1e-6
#: Where a difference of adjoints is so many times that of states, squared and each in relation to
#: its block, what J leaves unexplained is as likely J's error as C.
ADJOINTS_DROWN = 0.2
#: α becomes one over the curvature met where it is so many times too large or too small.
FAR_OFF = 10.0


class Basis(NamedTuple):
    """What changes of x are written in: x itself, or, where x is longer, R = (s, w, g)'s inputs."""

    rows: Tensor  #: (B, 3, q, c) R in it
    products: Tensor  #: (B, c, c) of its vectors with each other
    grad: Tensor  #: (B, c, 1) with ∇ₓL


@dataclass
class Model:
    """The model at one iterate, all in products of unit differences, float64; k of each kind."""

    secants: KKTSecants
    sweep: Sweep
    alpha: Tensor  # (B, 1) float64: for x where no curvature has been met

    def __post_init__(self) -> None:
        self.k = self.secants.filled
        self.residuals = Point.split(self.sweep.r, self.sweep.f.shape[1])
        self.wrong = self.secants.distances() / self.sweep.sizes.whole.double()[:, None] ** 2
        self.ridge = NONLINEAR**2 * self.wrong + self.secants.rounding  # D
        self._look(self.k)
        self._equilibria()

    def probe(self, move: tuple[Tensor, Tensor], change: tuple[Tensor, Tensor]) -> None:
        """Learn how the loss's gradient changes along (Δz, Δx)."""
        self.secants.probe(move, change, self.sweep)
        self._look(self.k + 1)

    def _look(self, count: int) -> None:
        """At the first ``count`` slots: their lengths, and their inputs."""
        self.raw = self.secants.products(count)
        squares = _diagonal(self.raw.states[:, S, :, S]) + _diagonal(self.raw.inputs[:, S, :, S])
        s, m = _unit(squares), _unit(_diagonal(self.raw.states[:, M, :, M]))
        self.units = torch.stack([s, m, s, s, m], dim=1)
        self.basis = self._basis(self.units[:, :3])
        self.g_d = torch.cat([self._states(G, Y, count), self._states(G, M, count)], dim=2)

    def _basis(self, units: Tensor) -> Basis:
        rows, _, q = units.shape
        d = self.secants.inputs.shape[3]
        if d <= 3 * q:
            inputs = self.secants.inputs[:, :q].transpose(1, 2).double() * units[..., None]
            eye = torch.eye(d, dtype=inputs.dtype, device=inputs.device).expand(rows, d, d)
            return Basis(inputs, eye, -self.residuals.x.double()[..., None])
        eye = torch.eye(3 * q, dtype=units.dtype, device=units.device).expand(rows, -1, -1)
        products = self.raw.inputs * units[..., None, None] * units[:, None, None]
        grad = (self.raw.grad * units).flatten(1)[..., None]
        return Basis(eye.unflatten(1, (3, q)), products.flatten(3).flatten(1, 2), grad)

    def _states(self, a: int, b: int, count: int | None = None) -> Tensor:
        """⟨a, b⟩ over states: of the first ``count`` of kind a with all k of kind b."""
        count = count or self.k
        raw = self.raw.states[:, a, :count, b, : self.k]
        return raw * self.units[:, a, :count, None] * self.units[:, b, None, : self.k]

    def _whole(self, a: int, b: int) -> Tensor:
        """⟨a, b⟩ over states and inputs."""
        raw = self.raw.states[:, a, :, b] + self.raw.inputs[:, a, :, b]
        return raw * self.units[:, a, :, None] * self.units[:, b, None]

    def _equilibria(self) -> None:
        """How z and μ follow x: Φ, with J = Dᵀ T V, D = (Y, M), V = (S, W), Φ = (I − T V_z Dᵀ)⁻¹ T.

        Along x the states' equilibria change by Dᵀ Φ V_x, the adjoints' by its transpose.
        """
        k = self.k
        s, m = self.units[:, S], self.units[:, M]
        ss, my = self._whole(S, S), self._states(M, Y)
        inv_s, inv_m = _inverse(ss, s, self.ridge), _inverse(self._states(M, M), m, self.ridge)
        known = self._whole(W, S) - my @ (inv_s @ ss)  # E Sᵀ: C there
        curved = known * ratio(s, m)[:, :, None]
        inv_c = _inverse(ss, s, self.ridge + self._unsure(s, m))
        self.curvature = inv_c @ (0.5 * (curved + curved.mT)) @ inv_c
        self.T = inv_s.new_zeros(len(ss), 2 * k, 2 * k)
        self.T[:, :k, :k], self.T[:, k:, k:] = inv_s, inv_m
        self.T[:, k:, :k] = -inv_m @ ((my + known) @ inv_s)
        self.s_d = torch.cat([self._states(S, Y), self._states(S, M)], dim=2)
        w_d = torch.cat([self._states(W, Y), self._states(W, M)], dim=2)
        self.lu = _factors(self.T @ torch.cat([self.s_d, w_d], dim=1).neg_())
        raw, units = self.raw, self.units
        self.tried, self.lengths = self._tried()
        self.v_off = (raw.off[:, S : W + 1] * units[:, S : W + 1]).flatten(1)[..., None]
        self.d_adjoint_off = (raw.adjoint_off[:, Y:] * units[:, Y:]).flatten(1)[..., None]

    def response(self) -> tuple[Tensor, Tensor]:
        """(Δz, Δx) to the solution of the model."""
        forward, _, _, rho, alpha = self._coefficients()
        return self._states_move(forward), self._inputs_move(rho, alpha)

    def step(self) -> Point:
        """(Δz, Δμ, Δx) to the solution of the model."""
        forward, sigma, h, rho, alpha = self._coefficients()
        dmu = self._adjoints_move(sigma, h)
        return Point(self._states_move(forward), dmu, self._inputs_move(rho, alpha))

    def _coefficients(self) -> tuple[Tensor, ...]:
        """What the step is made of: see ``_states_move``, ``_adjoints_move``, ``_inputs_move``."""
        k, basis = self.k, self.basis
        v_x = basis.rows[:, : W + 1, :k].flatten(1, 2)
        count = v_x.shape[2]
        both = torch.linalg.lu_solve(*self.lu, self.T @ torch.cat([v_x, self.v_off], dim=2))
        # With states and adjoints at their equilibria: S s = Ŝ Δx + s₀, G s = Ĝ Δx + g₀.
        s, g = self.s_d @ both, self.g_d @ both
        s[:, :, :count] += basis.rows[:, S, :k]
        g[:, :, :count] += basis.rows[:, G]
        s[:, :, count] += self.raw.off[:, S, :k] * self.units[:, S, :k]
        g[:, :, count] += self.raw.off[:, G] * self.units[:, G]
        sigma, h = self.curvature @ s, self._loss(g)
        # The reduced Hessian, I/α + K, and gradient, g + p, in the basis.
        K_p = torch.cat([s, g], dim=1)[:, :, :count].mT @ torch.cat([sigma, h], dim=1)
        K, p = K_p[:, :, :count], K_p[:, :, count:]
        p = p + both[:, :, :count].mT @ self.d_adjoint_off
        tried = basis.rows[:, S, :k] * self.lengths[..., None]
        alpha = self._untried(K, tried @ basis.products)
        K = K - (tried.mT @ self.tried @ tried) / alpha
        eye = torch.eye(count, dtype=K.dtype, device=K.device)
        system = eye + alpha * (K @ basis.products)
        rhs = -alpha * (K @ (basis.grad + basis.products @ p))
        rho = p + torch.linalg.solve_ex(system, rhs)[0]  # Δx = −α (g + basisᵀ ρ)
        dx = -alpha * (basis.grad + basis.products @ rho)
        forward, sigma, h = (
            part[:, :, count:] + part[:, :, :count] @ dx for part in (both, sigma, h)
        )
        return forward, sigma, h, -alpha * rho, alpha

    def _states_move(self, forward: Tensor) -> Tensor:
        """Δz = f − z + Dᵀ forward."""
        of_y, of_m = forward[..., 0].split(self.k, dim=1)
        units = self.units[:, :, : self.k]
        moved = self.secants.combine({Y: of_y * units[:, Y], M: of_m * units[:, M]})
        return self.residuals.z + moved.to(self.residuals.z)

    def _adjoints_move(self, sigma: Tensor, h: Tensor) -> Tensor:
        """Δμ = μ⁺ − μ + Vᵀ backward + Sᵀ sigma + Gᵀ h, over states."""
        k, units = self.k, self.units
        rest = self.d_adjoint_off + self.g_d.mT @ h + self.s_d.mT @ sigma
        backward = self.T.mT @ torch.linalg.lu_solve(*self.lu, rest, adjoint=True)
        of_s, of_w = (backward[:, :k] + sigma)[..., 0], backward[:, k:, 0]
        moved = self.secants.combine(
            {S: of_s * units[:, S, :k], W: of_w * units[:, W, :k], G: h[..., 0] * units[:, G]}
        )
        return self.residuals.mu + moved.to(self.residuals.mu)

    def _inputs_move(self, rho: Tensor, alpha: Tensor) -> Tensor:
        """Δx = −α ∇ₓL + basisᵀ ρ."""
        descent = self.residuals.x
        if rho.shape[1] == descent.shape[1]:
            inputs = rho[..., 0]
        else:
            of_each = rho.unflatten(1, (3, -1))[..., 0]
            inputs = self.secants.combine_inputs(of_each * self.units[:, :3])
        return (alpha[:, 0] * descent + inputs).to(descent)

    def _loss(self, g_s: Tensor) -> Tensor:
        """(S Gᵀ)⁺ of its argument: the coefficients of (∂²ℓ) s, given G s."""
        products = self._whole(S, G)
        products = 0.5 * (products + products.mT)
        diagonal = _diagonal(products)
        flat = FLAT * diagonal.abs().amax(dim=1, keepdim=True)
        probes = products.shape[1] - self.k  # just made
        wrong = LOSS_NONLINEAR * torch.nn.functional.pad(self.wrong, (0, probes))
        shift = torch.copysign(flat, diagonal) + wrong * diagonal.abs()
        shift = torch.where(diagonal == 0, 1.0, shift)
        return cast(Tensor, torch.linalg.solve_ex(products + torch.diag_embed(shift), g_s)[0])

    def _unsure(self, s: Tensor, m: Tensor) -> Tensor:
        """What is added to D for C: where adjoints moved more than states, J's errors drown it.

        C is in units of μ over those of the state.
        """
        size = self.sweep.sizes.state.double() / norm(self.secants.mu).double()
        larger = s * _length(m) * size[:, None]
        return (ADJOINTS_DROWN * larger**2).nan_to_num(0.0).clamp(max=1e12)

    def _untried(self, K: Tensor, along: Tensor) -> Tensor:
        """α: one over the largest curvature met along a difference of x, where that is far from it.

        The first α knows nothing of the units of x and of the loss.
        """
        alpha = self.alpha[:, 0]
        most = ((along @ K) * along).sum(dim=2).amax(dim=1)
        met = alpha * most
        far = ((met > FAR_OFF) | (met < 1 / FAR_OFF)) & (most > 0) & (met < math.inf)
        return torch.where(far, 1 / torch.where(far, most, 1.0), alpha)[:, None, None]

    def _tried(self) -> tuple[Tensor, Tensor]:
        """(X Xᵀ + …)⁻¹ of the differences of x, X, to unit length; and their lengths until then.

        Between two X it is the directions of x that they span.
        """
        raw = self.raw.inputs[:, S, :, S]
        unit = _unit(_diagonal(raw))
        inverse = _inverse(raw * unit[:, :, None] * unit[:, None], unit, TRIED + self.ridge)
        return inverse, unit * _length(self.units[:, S])


def _length(unit: Tensor) -> Tensor:
    return ratio(torch.ones_like(unit), unit)


def _factors(minus: Tensor) -> tuple[Tensor, Tensor]:
    """LU factors of I + ``minus``."""
    _diagonal(minus).add_(1.0)
    lu, pivots, _ = torch.linalg.lu_factor_ex(minus)
    return lu, pivots


def _diagonal(matrices: Tensor) -> Tensor:
    return matrices.diagonal(dim1=1, dim2=2)


def _unit(squares: Tensor) -> Tensor:
    """One over the length; 0 where there is none."""
    return torch.where(squares > 0, squares.rsqrt(), 0.0)


def _inverse(products: Tensor, unit: Tensor, ridge: Tensor) -> Tensor:
    """Of the products with their ridge; differences of no length are left out."""
    diagonal = torch.where(unit > 0, ridge, 1.0)
    return cast(Tensor, torch.linalg.inv_ex(products + torch.diag_embed(diagonal))[0])
