"""Optimization through equilibrium networks: minimize ℓ(z, x) subject to z = f(z, x)."""

from implicitopt.accelerators.anderson import Anderson
from implicitopt.accelerators.broyden import Broyden
from implicitopt.accelerators.picard import Picard
from implicitopt.adjoint.envelope import Envelope
from implicitopt.adjoint.implicit import AdjointWarning, FrozenInput, Implicit
from implicitopt.check import Report, check
from implicitopt.fixed_point import ConvergenceWarning, fixed_point
from implicitopt.kkt import Residuals
from implicitopt.penalties import jacobian_penalty
from implicitopt.plot import plot
from implicitopt.projections import Box, L2Ball, LinfBall, Simplex
from implicitopt.select import Best, Last, PaperRule
from implicitopt.solution import AdjointReport, Solution, SolveError, Status, WarmStart
from implicitopt.solve import solve
from implicitopt.solvers.adaptive import Adaptive
from implicitopt.solvers.joint import Joint, StepSizes
from implicitopt.solvers.nested import Nested, ProjectedGradient
from implicitopt.solvers.one_shot import OneShot
from implicitopt.solvers.sqp import SQP

__version__ = "0.1.0"

__all__ = [
    "SQP",
    "Adaptive",
    "AdjointReport",
    "AdjointWarning",
    "Anderson",
    "Best",
    "Box",
    "Broyden",
    "ConvergenceWarning",
    "Envelope",
    "FrozenInput",
    "Implicit",
    "Joint",
    "L2Ball",
    "Last",
    "LinfBall",
    "Nested",
    "OneShot",
    "PaperRule",
    "Picard",
    "ProjectedGradient",
    "Report",
    "Residuals",
    "Simplex",
    "Solution",
    "SolveError",
    "Status",
    "StepSizes",
    "WarmStart",
    "check",
    "fixed_point",
    "jacobian_penalty",
    "plot",
    "solve",
]
