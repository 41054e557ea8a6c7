"""Families of problems whose solutions, and derivatives of them, are known independently.

Nothing here uses the library: solutions come from dense linear algebra, from bisection on a
multiplier or from a long unrolled loop, and their derivatives from autograd through those.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

F64 = torch.float64


class Known(NamedTuple):
    """The solution of a batch of problems: (B, d), (B, n), (B, n) and (B,)."""

    x: Tensor
    z: Tensor
    mu: Tensor
    value: Tensor


def relative(found: Tensor, known: Tensor) -> float:
    """‖found − known‖ / (1 + ‖known‖), in float64."""
    found, known = found.detach().to(F64), known.detach().to(F64)
    return (torch.linalg.vector_norm(found - known) / (1 + torch.linalg.vector_norm(known))).item()


def worst(found: Sequence[Tensor], known: Sequence[Tensor]) -> float:
    """The largest of the relative errors of several tensors, NaN if any is NaN."""
    return torch.tensor([relative(a, b) for a, b in zip(found, known, strict=True)]).max().item()


def contraction(n: int, rho: float, measure: str, generator: torch.Generator) -> Tensor:
    """A random n × n matrix whose spectral radius, or whose 2-norm, is ``rho``."""
    matrix = torch.randn(n, n, dtype=F64, generator=generator)
    if measure == "radius":
        return matrix * (rho / torch.linalg.eigvals(matrix).abs().max())
    return matrix * (rho / torch.linalg.matrix_norm(matrix, ord=2))


@dataclass
class LinearQuadratic:
    """f = Az + Bx + c and ℓ = ½‖Wz + b − y‖² + ½λ‖x‖², for each row of a batch.

    A, B, W, b and λ are shared, c and y belong to one problem each. λ = exp(log_lam) is computed
    once, outside f and the loss: they capture a tensor that is not a leaf.
    """

    A: Tensor
    B: Tensor
    c: Tensor
    W: Tensor
    b: Tensor
    y: Tensor
    log_lam: Tensor

    @classmethod
    def draw(
        cls, n: int, d: int, batch: int, rho: float, measure: str, seed: int
    ) -> LinearQuadratic:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=F64, generator=generator)

        outputs = max(1, n // 2)
        problem = cls(
            A=contraction(n, rho, measure, generator),
            B=normal(n, d) / d**0.5,
            c=normal(batch, n),
            W=normal(outputs, n) / n**0.5,
            b=normal(outputs),
            y=normal(batch, outputs),
            log_lam=0.3 * normal(1)[0] - 1.0,
        )
        for parameter in problem.parameters:
            parameter.requires_grad_()
        problem.lam = problem.log_lam.exp()
        return problem

    @property
    def parameters(self) -> tuple[Tensor, ...]:
        return (self.A, self.B, self.c, self.W, self.b, self.log_lam)

    def to(self, dtype: torch.dtype) -> LinearQuadratic:
        tensors = (self.A, self.B, self.c, self.W, self.b, self.y, self.log_lam)
        copy = LinearQuadratic(*(t.detach().to(dtype) for t in tensors))
        copy.lam = copy.log_lam.exp()
        return copy

    def f(self, z: Tensor, x: Tensor) -> Tensor:
        return z @ self.A.T + x @ self.B.T + self.c

    def loss(self, z: Tensor, x: Tensor) -> Tensor:
        misfit = z @ self.W.T + self.b - self.y
        return 0.5 * (misfit**2).sum(-1) + 0.5 * self.lam * (x**2).sum(-1)

    def start(self) -> tuple[Tensor, Tensor]:
        """Zeros for x0 and z0."""
        return self.c.new_zeros(len(self.c), self.B.shape[1]), torch.zeros_like(self.c).detach()

    def reduced(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """G, h, H, q: z = Gx + h, and the reduced loss ½xᵀHx + qᵀx plus a constant."""
        eye = torch.eye(len(self.A), dtype=self.A.dtype)
        G = torch.linalg.solve(eye - self.A, self.B)
        h = torch.linalg.solve(eye - self.A, self.c.T).T
        WG = self.W @ G
        H = WG.T @ WG + self.lam * torch.eye(self.B.shape[1], dtype=self.A.dtype)
        return G, h, H, (h @ self.W.T + self.b - self.y) @ WG

    def known(self, radius: Tensor | None = None) -> Known:
        """The solution, differentiable to every order; with ``radius``, that with ‖x‖ ≤ radius."""
        G, h, H, q = self.reduced()
        if radius is None:
            x = torch.linalg.solve(H, -q.T).T
        else:
            x = torch.stack([_in_ball(H, row, radius) for row in q])
        z = x @ G.T + h
        pull = (z @ self.W.T + self.b - self.y) @ self.W
        mu = torch.linalg.solve((torch.eye(len(self.A), dtype=F64) - self.A).T, pull.T).T
        return Known(x, z, mu, self.loss(z, x))

    def sensitivity(self) -> float:
        """‖K⁻¹‖₂ of the KKT matrix K: a residual r moves the unconstrained solution by K⁻¹ r."""
        A, B, W = (t.detach() for t in (self.A, self.B, self.W))
        n, d = B.shape
        eye = torch.eye(n, dtype=F64)
        K = torch.zeros(2 * n + d, 2 * n + d, dtype=F64)
        K[:n, :n] = W.T @ W
        K[:n, n : 2 * n], K[n : 2 * n, :n] = A.T - eye, A - eye
        K[n : 2 * n, 2 * n :], K[2 * n :, n : 2 * n] = B, B.T
        K[2 * n :, 2 * n :] = self.lam.detach() * torch.eye(d, dtype=F64)
        return 1 / torch.linalg.svdvals(K).min().item()


def _in_ball(H: Tensor, q: Tensor, radius: Tensor) -> Tensor:
    """argmin ½xᵀHx + qᵀx over ‖x‖ ≤ radius: (H + νI)x = −q, with ν ≥ 0 found by bisection."""
    eye = torch.eye(len(H), dtype=H.dtype)

    def at(nu: Tensor) -> Tensor:
        return torch.linalg.solve(H + nu * eye, -q)

    zero = torch.zeros((), dtype=H.dtype)
    with torch.no_grad():
        if torch.linalg.vector_norm(at(zero)) <= radius:
            inside = True
        else:
            inside, low, high = False, zero, torch.linalg.vector_norm(q) / radius
            for _ in range(100):
                middle = (low + high) / 2
                if torch.linalg.vector_norm(at(middle)) > radius:
                    low = middle
                else:
                    high = middle
            nu = (low + high) / 2
    if inside:
        return at(zero)
    # Newton steps that do not move ν, and give it its first three derivatives.
    for _ in range(2):
        x = at(nu)
        slope = -2 * (x * torch.linalg.solve(H + nu * eye, x)).sum()
        nu = nu - ((x * x).sum() - radius**2) / slope
    return at(nu)


class TanhMap(nn.Module):
    """f(z, x) = tanh(Wz + Ux + b + s): ‖W‖₂ = 0.5 and a buffer s."""

    def __init__(self, n: int, d: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.W = nn.Parameter(contraction(n, 0.5, "norm", generator))
        self.U = nn.Parameter(torch.randn(n, d, dtype=F64, generator=generator) / d**0.5)
        self.b = nn.Parameter(0.3 * torch.randn(n, dtype=F64, generator=generator))
        self.register_buffer("s", 0.3 * torch.randn(n, dtype=F64, generator=generator))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(z @ self.W.T + x @ self.U.T + self.b + self.s)


class Head(nn.Module):
    """A two-layer perceptron on the state; the loss is its misfit and a ridge on x."""

    def __init__(self, n: int, outputs: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed + 1)
        self.V1 = nn.Parameter(torch.randn(6, n, dtype=F64, generator=generator) / n**0.5)
        self.V2 = nn.Parameter(torch.randn(outputs, 6, dtype=F64, generator=generator) / 6**0.5)

    def forward(self, z: Tensor) -> Tensor:
        return torch.tanh(z @ self.V1.T) @ self.V2.T


class TanhProblem(NamedTuple):
    f: TanhMap
    head: Head
    loss: Callable[[Tensor, Tensor], Tensor]
    x0: Tensor
    z0: Tensor
    theta: dict[str, Tensor]  # everything that must get a gradient

    @classmethod
    def draw(cls, n: int = 5, d: int = 3, batch: int = 2, seed: int = 0) -> TanhProblem:
        generator = torch.Generator().manual_seed(seed + 2)
        f, head = TanhMap(n, d, seed), Head(n, 2, seed)
        leaf = torch.tensor(1.1, dtype=F64, requires_grad=True)
        lam = leaf.square()  # captured by the loss, and not a leaf
        f.s = f.s.requires_grad_()
        target = torch.randn(batch, 2, dtype=F64, generator=generator).requires_grad_()

        def loss(z: Tensor, x: Tensor) -> Tensor:
            misfit = ((head(z) - target) ** 2).sum(-1)
            return 0.5 * misfit + 0.5 * lam * (x**2).sum(-1)

        theta = {
            **dict(f.named_parameters()), **dict(head.named_parameters()),
            "buffer": f.s, "captured": leaf, "target": target,
        }  # fmt: skip
        x0 = 0.1 * torch.randn(batch, d, dtype=F64, generator=generator)
        return cls(f, head, loss, x0, torch.zeros(batch, n, dtype=F64), theta)


def unrolled(
    f: Callable[[Tensor, Tensor], Tensor],
    loss: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    z: Tensor,
    *,
    steps: int,
    step_size: float = 0.15,
    project: Callable[[Tensor], Tensor] | None = None,
    sign: float = 1.0,
) -> Known:
    """The plain augmented iteration, written out as a loop that autograd can follow to any order.

    z⁺ = f(z, x), μ⁺ = (∂f/∂z)ᵀμ + ∂ℓ/∂z, x⁺ = P(x − α((∂f/∂x)ᵀμ + ∂ℓ/∂x)); raises if it has not
    come to rest, so that no test compares with an unfinished reference.
    """
    mu = torch.zeros_like(z)
    for _ in range(steps):
        # Clones: μ's graph holds z, which tanh keeps for its derivative, and must not be seen here.
        z_in, x_in = (t.clone() if t.requires_grad else t.clone().requires_grad_() for t in (z, x))
        image = f(z_in, x_in)
        lagrangian = sign * loss(z_in, x_in).sum() + (mu * image).sum()
        mu_next, g = torch.autograd.grad(lagrangian, (z_in, x_in), create_graph=True)
        x_next = x_in - step_size * g
        if project is not None:
            x_next = project(x_next)
        moved = max((a - b).abs().max().item() for a, b in ((image, z), (mu_next, mu), (x_next, x)))
        z, mu, x = image, mu_next, x_next
    if not moved < 1e-12:
        raise AssertionError(f"the reference still moves by {moved:.1e}; unroll it further")
    return Known(x, z, sign * mu, loss(z, x))
