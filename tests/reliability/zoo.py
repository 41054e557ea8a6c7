"""Hard problems whose answers are known on paper: what the default solver says of each.

python -m tests.reliability.zoo        # the table of docs/reliability.md
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

import implicitopt
from implicitopt import Box, L2Ball, Simplex, Solution, Status, solve
from tests.reliability.malformed import kkt_residual

F64 = torch.float64
TOL, STEPS = 1e-6, 400


@dataclass(frozen=True)
class Hard:
    """One problem, or a batch of one kind.

    Attributes:
        values: the loss at every stationary point, to within ``gap``; the best one first. Empty:
            there is none, or none at a finite point, and CONVERGED would be false.
        statuses: what the default solver may say.
        reached: the loss that the returned iterate must be down to, whatever the status.
        slack: a claim's residual may be so many times the tolerance at the end; more where
            neighbours, by which f is another, go on after a problem has ended.
    """

    kind: str
    name: str
    f: Callable[[Tensor, Tensor], Tensor]
    loss: Callable[[Tensor, Tensor], Tensor]
    x0: Tensor
    values: Sequence[float] | None
    statuses: str
    reached: float | None = None
    z0: Tensor | None = None
    gap: float = 1e-6
    slack: float = 1.01
    options: dict[str, Any] = field(default_factory=dict)


class Found(NamedTuple):
    """What became of it."""

    sol: Solution
    residual: Tensor  # by autograd on f and the loss, not by the library's own formula


def rows(*values: Any, dtype: torch.dtype = F64) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def half(z: Tensor, x: Tensor) -> Tensor:
    """z = 2x at the fixed point."""
    return 0.5 * z + x


def to(target: float, weight: float = 0.1) -> Callable[[Tensor, Tensor], Tensor]:
    """(z − target)² + weight x², summed."""
    return lambda z, x: (z - target).square().sum(-1) + weight * x.square().sum(-1)


def rosenbrock(z: Tensor, x: Tensor) -> Tensor:
    return (1 - z[:, 0]) ** 2 + 100 * (z[:, 1] - z[:, 0] ** 2) ** 2


def himmelblau(z: Tensor, x: Tensor) -> Tensor:
    a, b = z[:, 0], z[:, 1]
    return (a**2 + b - 11) ** 2 + (a + b**2 - 7) ** 2


def beale(z: Tensor, x: Tensor) -> Tensor:
    a, b = z[:, 0], z[:, 1]
    parts = ((1.5, b), (2.25, b**2), (2.625, b**3))
    return sum((c - a + a * p) ** 2 for c, p in parts)  # type: ignore[return-value]


def powell(z: Tensor, x: Tensor) -> Tensor:
    a, b, c, d = z.unbind(-1)
    return (a + 10 * b) ** 2 + 5 * (c - d) ** 2 + (b - 2 * c) ** 4 + 10 * (a - d) ** 4


def hilbert(n: int) -> Tensor:
    i = torch.arange(n, dtype=F64)
    return 1 / (i[:, None] + i + 1)


def rotation(scale: float, angle: float) -> Tensor:
    c, s = scale * math.cos(angle), scale * math.sin(angle)
    return torch.tensor([[c, -s], [s, c]], dtype=F64)


def identity(z: Tensor, x: Tensor) -> Tensor:
    return x + 0 * z


def linear_answer(J: Tensor, target: float, weight: float) -> float:
    """min ‖z − target‖² + weight ‖x‖² with z = J z + x, so that x = (I − J) z."""
    n = len(J)
    A = torch.eye(n, dtype=F64) - J
    t = torch.full((n,), target, dtype=F64)
    z = torch.linalg.solve(torch.eye(n, dtype=F64) + weight * A.T @ A, t)
    return ((z - t).square().sum() + weight * (A @ z).square().sum()).item()


SPIRAL, STEEP = rotation(1.5, 1.0), rotation(0.9999, 2.0)
SHEAR = torch.tensor([[0.9, 1e3], [0.0, 0.9]], dtype=F64)
SHEARED = linear_answer(SHEAR, 1.0, 0.1)
H = hilbert(6)
CONVERGED, NOT = "CONVERGED", "MAX_STEPS STALLED NONFINITE"
ANY = f"{CONVERGED} {NOT}"
NONE = rows([0.0])

ZOO = [
    # Maps that do not contract: the fixed point is there, plain iteration runs away from it.
    Hard("not contractive", "z = 2z + x", lambda z, x: 2 * z + x, to(1.0), NONE,
         [0.1 / 1.1], CONVERGED),
    Hard("not contractive", "z = −z + x", lambda z, x: x - z, to(1.0), NONE,
         [0.4 / 1.4], CONVERGED),
    Hard("not contractive", "z = −5z + x", lambda z, x: x - 5 * z, to(1.0, 0.01), NONE,
         [0.36 / 1.36], CONVERGED),
    Hard("not contractive", "a spiral outwards, 1.5 a turn of 1 rad",
         lambda z, x: z @ SPIRAL.T + x, to(1.0), rows([0.0, 0.0]),
         [linear_answer(SPIRAL, 1.0, 0.1)], CONVERGED),
    Hard("not contractive", "the logistic map, r = 4, chaotic",
         lambda z, x: 4 * z * (1 - z) + x,
         lambda z, x: (z - 0.7).square().sum(-1) + x.square().sum(-1),
         NONE, None, CONVERGED, z0=rows([0.3])),
    Hard("barely contractive", "a spiral inwards, 0.9999 a turn of 2 rad",
         lambda z, x: z @ STEEP.T + x, to(1.0), rows([0.0, 0.0]),
         [linear_answer(STEEP, 1.0, 0.1)], CONVERGED),
    Hard("barely contractive", "z = 0.9999 z + x", lambda z, x: 0.9999 * z + x, to(1.0), NONE,
         [1e-9 / (1 + 1e-9)], CONVERGED, gap=1e-5),
    Hard("not normal", "a shear by 1000, so that ‖Jᵏ‖ grows first",
         lambda z, x: z @ SHEAR.T + x, to(1.0), rows([0.0, 0.0]), [SHEARED], CONVERGED, gap=1e-4),
    # Singular Jacobians
    Hard("singular at the solution", "z = z + x: feasible only where x = 0",
         lambda z, x: z + x, lambda z, x: (z - 1).square().sum(-1), NONE, [0.0], CONVERGED,
         gap=1e-4),
    Hard("singular at the solution", "z = z − z³ + x, so that z = ∛x, at x = 0",
         lambda z, x: z - z**3 + x, lambda z, x: z.square().sum(-1) + x.square().sum(-1),
         rows([0.3]), [0.0], ANY, z0=rows([0.7]), gap=1e-2),
    Hard("singular at the solution", "z = z² + x at the fold x = 1/4, beyond which there is none",
         lambda z, x: z**2 + x, lambda z, x: -x.sum(-1), NONE, [-0.25], ANY, gap=1e-4),
    Hard("singular at the solution", "z = z: every state is a fixed point",
         lambda z, x: z + 0 * x, to(1.0), rows([0.5]), None, NOT, z0=rows([0.3])),
    # No fixed point
    Hard("no fixed point", "z = z + 1 + x²", lambda z, x: z + 1 + x**2, to(1.0), NONE, [], NOT),
    Hard("no fixed point", "z = √(z² + 1) + x²", lambda z, x: (z**2 + 1).sqrt() + x**2, to(1.0),
         NONE, [], NOT),
    Hard("no fixed point", "z = eᶻ + x²", lambda z, x: z.exp() + x**2, to(1.0), NONE, [], NOT),
    Hard("no fixed point", "z = −sign(z), jumping over it",
         lambda z, x: torch.where(z > 0, -1.0, 1.0) + 0 * z + x**2, to(1.0), NONE, [], NOT),
    # Several
    Hard("several fixed points", "z = tanh(3z) + x, z near 1 or near −1",
         lambda z, x: (3 * z).tanh() + x, to(0.9, 1.0), rows([0.0], [0.0]), None, CONVERGED,
         z0=rows([0.5], [-0.5])),
    Hard("several fixed points", "z = sin(3z) + x", lambda z, x: (3 * z).sin() + x, to(0.5, 1.0),
         rows([0.1]), None, ANY, z0=rows([2.0])),
    Hard("several fixed points", "Newton's square root, z = (z + x/z)/2 = ±√x",
         lambda z, x: 0.5 * (z + x / z), lambda z, x: (z - 3).square().sum(-1), rows([4.0], [0.1]),
         [0.0], CONVERGED, z0=rows([1.0], [1.0])),
    # Losses
    Hard("flat loss", "a constant", half, lambda z, x: 0 * z.sum(-1) + 2, rows([0.7]), [2.0],
         CONVERGED),
    Hard("flat loss", "one of two coordinates does not count", half,
         lambda z, x: (z[:, 0] - 1) ** 2, rows([0.0, 0.4]), [0.0], CONVERGED),
    Hard("flat loss", "(z − 1)⁴", half, lambda z, x: ((z - 1) ** 4).sum(-1), NONE, [0.0], CONVERGED,
         reached=1e-6),
    Hard("flat loss", "Powell's singular function", identity, powell,
         rows([3.0, -1.0, 0.0, 1.0]), [0.0], CONVERGED, reached=1e-4, gap=1e-4),
    Hard("flat loss", "plateaus of a sigmoid: −σ(z − 30)", half,
         lambda z, x: -torch.sigmoid(z - 30).sum(-1), NONE, [-1.0, 0.0], ANY),
    Hard("unbounded loss", "−z", half, lambda z, x: -z.sum(-1), NONE, [], NOT, reached=-1e3),
    Hard("unbounded loss", "−x², stationary at its maximum", half,
         lambda z, x: -x.square().sum(-1), rows([0.1]), [0.0], NOT, reached=-1e3),
    Hard("unbounded loss", "x³, stationary at x = 0", half, lambda z, x: (x**3).sum(-1),
         rows([0.5]), [0.0], ANY),
    Hard("not attained", "e^(−z), least at infinity", half, lambda z, x: (-z).exp().sum(-1), NONE,
         [0.0], ANY, gap=1e-3),
    Hard("not attained", "1/z on z > 0", half, lambda z, x: (1 / z).sum(-1), rows([1.0]), [0.0],
         ANY, gap=1e-2),
    # Discontinuous
    Hard("discontinuous f", "a jump of 0.1 at x = 0.3, past it the optimum",
         lambda z, x: 0.5 * z + x + torch.where(x > 0.3, 0.1, 0.0), to(1.0), NONE,
         [0.8**2 * 0.1 / 4.1], CONVERGED),
    Hard("discontinuous f", "a jump that the optimum lies on", lambda z, x:
         0.5 * z + x + torch.where(x > 0.4, 1.0, -1.0), to(1.0, 0.0), NONE, None, NOT),
    Hard("discontinuous f", "rounded to multiples of 0.1", lambda z, x:
         0.5 * z + x + ((10 * x).round() / 10 - x).detach(), to(1.0), NONE, None, ANY),
    Hard("discontinuous loss", "a step of 1 below x = 0.4", half,
         lambda z, x: (z - 1).square().sum(-1) + 0.1 * x.square().sum(-1) + (x < 0.4).sum(-1),
         NONE, [0.1 / 4.1, 1 + 0.1 / 4.1], CONVERGED),
    # Scales
    Hard("stiff", "blocks of z at 1e8 and 1e−8",
         lambda z, x: 0.5 * z + x * rows(1e8, 1e-8),
         lambda z, x: (z[:, 0] / 1e8 - 1) ** 2 + (z[:, 1] * 1e8 - 1) ** 2,
         rows([0.0, 0.0]), [0.0], CONVERGED),
    Hard("stiff", "blocks of x at 1e4 and 1e−4", lambda z, x: 0.5 * z + x * rows(1e4, 1e-4),
         lambda z, x: (z - 1).square().sum(-1), rows([0.0, 0.0]), [0.0], ANY, gap=1.1),
    Hard("stiff", "curvatures 1e8 and 1", half,
         lambda z, x: 1e8 * (z[:, 0] - 1) ** 2 + (z[:, 1] - 1) ** 2, rows([0.0, 0.0]), [0.0],
         CONVERGED),
    Hard("stiff", "a target of 1e12", half, to(1e12, 0.0), NONE, [0.0], CONVERGED, gap=1e13),
    Hard("stiff", "Hilbert's matrix, condition 1e7", half,
         lambda z, x: (z @ H - H.sum(1)).square().sum(-1), torch.zeros(1, 6, dtype=F64), [0.0],
         CONVERGED, gap=1e-6),
    Hard("stiff", "Rosenbrock's valley", identity, rosenbrock, rows([-1.2, 1.0]), [0.0], CONVERGED),
    Hard("stiff", "Beale's function", identity, beale, rows([1.0, 1.0]), [0.0, 14.203125],
         CONVERGED),
    # Batch norm: problems that are coupled are one problem
    Hard("batch norm", "z normalized over the batch, a loss for the whole batch",
         lambda z, x: 0.5 * (z - z.mean(0)) / (1 + z.std(0, correction=0)) + x,
         lambda z, x: (z - rows([0.1], [0.5], [-0.2])).square().sum() + 0.1 * x.square().sum(),
         torch.zeros(3, 1, dtype=F64), None, CONVERGED),
    Hard("batch norm", "the same, with a loss for each problem, which is a mistake",
         lambda z, x: 0.5 * (z - z.mean(0)) / (1 + z.std(0, correction=0)) + x,
         lambda z, x: (z - rows([0.1], [0.5], [-0.2])).square().sum(-1) + 0.1 * x.square().sum(-1),
         torch.zeros(3, 1, dtype=F64), None, ANY, slack=10.0),
    # Saddles and several minima
    Hard("saddle", "(z² − 1)², from near its maximum", half,
         lambda z, x: (z**2 - 1).square().sum(-1), rows([1e-3]), [0.0, 1.0], CONVERGED),
    Hard("saddle", "(z² − 1)², from its maximum, which is stationary", half,
         lambda z, x: (z**2 - 1).square().sum(-1), NONE, [0.0, 1.0], CONVERGED),
    Hard("saddle", "a² − b² in a box", half, lambda z, x: z[:, 0] ** 2 - z[:, 1] ** 2,
         rows([0.5, 0.01]), [-4.0, 0.0], CONVERGED, options={"project": Box(-1.0, 1.0)}),
    Hard("saddle", "the largest eigenvalue: max zᵀ diag(3, 2, 1) z on a ball", half,
         lambda z, x: (z.square() * rows(3.0, 2.0, 1.0)).sum(-1), rows([0.01, 0.3, 0.3]),
         [12.0, 8.0, 4.0, 0.0], CONVERGED, gap=1e-4,
         options={"project": L2Ball(1.0), "maximize": True}),
    Hard("saddle", "Himmelblau's four minima", identity, himmelblau,
         rows([0.0, 0.0], [-1.0, 2.0], [-3.0, -3.0], [3.0, -2.0]),
         [0.0, 181.616522, 178.337238, 104.015205, 67.719289, 13.311915], CONVERGED, gap=5e-4),
    # Kinks
    Hard("kink", "|z − 1|, least at the kink", half,
         lambda z, x: (z - 1).abs().sum(-1) + 0.1 * x.square().sum(-1), NONE, None, NOT,
         reached=0.05),
    Hard("kink", "ReLU, alive", lambda z, x: torch.relu(0.5 * z + x), to(1.0), rows([0.5]),
         [0.1 / 4.1], CONVERGED),
    Hard("kink", "ReLU, dead: the gradient is 0", lambda z, x: torch.relu(0.5 * z + x),
         to(1.0, 0.0), rows([-1.0]), [0.0, 1.0], CONVERGED),
    Hard("kink", "ReLU, least at the kink", lambda z, x: torch.relu(0.5 * z + x), lambda z, x:
         (z + 1).square().sum(-1) + 0.1 * (x - 1).square().sum(-1), rows([1.0]), None, NOT,
         reached=1.11),
    Hard("kink", "z = |z|/2 + x, at z = 0", lambda z, x: 0.5 * z.abs() + x, to(0.0, 1.0),
         rows([0.4]), [0.0], CONVERGED),
    Hard("kink", "the larger of two pieces, on the ridge where they meet", half,
         lambda z, x: torch.maximum((z - 1) ** 2, (z + 1) ** 2).sum(-1), rows([0.3]), None, NOT,
         reached=1.05),
    Hard("kink", "√|x|, of infinite slope at the optimum", half,
         lambda z, x: x.abs().sqrt().sum(-1), rows([0.5]), None, ANY),
    # NaN
    Hard("NaN beyond a region", "√(1 − x²), and the loss pulls to x = 2",
         lambda z, x: 0.5 * z + (1 - x**2).sqrt(), lambda z, x: (x - 2).square().sum(-1), NONE, [],
         NOT, reached=1.5),
    Hard("NaN beyond a region", "z − log z", half, lambda z, x: (z - z.log()).sum(-1), rows([0.05]),
         [1.0], CONVERGED),
    Hard("NaN beyond a region", "max log z + log(1 − z)", half,
         lambda z, x: (z.log() + (1 - z).log()).sum(-1), rows([0.01]), [-math.log(4)], CONVERGED,
         options={"maximize": True}),
    Hard("NaN beyond a region", "e^(e^z) overflows a step away", half,
         lambda z, x: z.exp().exp().sum(-1) - 40 * z.sum(-1), NONE, None, ANY, reached=-10.0),
    Hard("NaN at the start", "x/|x| at x = 0", lambda z, x: 0.5 * z + x / x.abs(), to(1.0), NONE,
         [], "NONFINITE"),
    Hard("NaN at the start", "z/‖z‖ at z = 0",
         lambda z, x: z / (2 * z.norm(dim=1, keepdim=True)) + x, to(1.0), rows([0.0, 0.0]), [],
         "NONFINITE"),
    # Constraints
    Hard("constraint", "a vertex of the simplex", half,
         lambda z, x: (z * rows(3.0, 1.0, 2.0)).sum(-1),
         # tol allows z to be 2 (1 + ‖(z, μ, x)‖) tol away from 2x, and the loss that times ‖w‖.
         rows([0.3, 0.3, 0.4]), [2.0], CONVERGED, gap=7e-5, options={"project": Simplex()}),
    Hard("constraint", "a ball of radius 0", half, to(1.0), rows([0.3]), [1.0], CONVERGED,
         options={"project": L2Ball(0.0)}),
    Hard("constraint", "a multiplier of 0: the free optimum lies on the boundary", half,
         to(1.0, 0.0), NONE, [0.0], CONVERGED, options={"project": Box(-0.5, 0.5)}),
    Hard("constraint", "unbounded but for the ball", half, lambda z, x: -z.sum(-1),
         rows([0.0, 0.0]),
         [-2 * math.sqrt(2)], CONVERGED, options={"project": L2Ball(1.0)}),
    Hard("precision", "float32, with a loss 1e6 above 0", half,
         lambda z, x: 1e6 + (z - 1).square().sum(-1), rows([0.0], dtype=torch.float32), [1e6],
         CONVERGED, gap=1.0),
]  # fmt: skip


def find(problem: Hard, **options: Any) -> Found:
    """The default solver's word on it, and the KKT residual by another formula."""
    options = {"max_steps": STEPS, "tol": TOL, "history": True, **problem.options, **options}
    if problem.x0.dtype == torch.float32:
        options["tol"] = 1e-4
    sol = solve(problem.f, problem.loss, problem.x0, problem.z0, **options)
    residual = kkt_residual(
        problem.f, problem.loss, sol, options.get("project"), options.get("maximize", False)
    )
    return Found(sol, residual)


def main() -> None:
    print("| kind | problem | status | loss | optimum | KKT residual | steps |")
    print("|---|---|---|--:|--:|--:|--:|")
    for problem in ZOO:
        sol, residual = find(problem)
        statuses = sol.status.reshape(-1).tolist()
        named = ", ".join(sorted({Status(code).name for code in statuses}))
        finite = torch.isfinite(residual)
        worst = f"{residual[finite].max():.0e}" if bool(finite.any()) else "–"
        values = ", ".join(f"{v:.4g}" for v in sol.value.detach().reshape(-1).tolist())
        if problem.values:
            known = f"{problem.values[0]:.4g}"
        else:
            known = "not in closed form" if problem.values is None else "none"
        name = problem.name.replace("|", "\\|")
        print(
            f"| {problem.kind} | {name} | {named} | {values} | {known} | {worst} "
            f"| {int(sol.steps.max())} |"
        )
    print(
        f"\n{len(ZOO)} problems, implicitopt {implicitopt.__version__}, torch {torch.__version__}"
    )


if __name__ == "__main__":
    main()
