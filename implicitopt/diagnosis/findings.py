"""One function for each thing `implicitopt.check` looks at, from a system and its start."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from implicitopt.diagnosis import measurements
from implicitopt.diagnosis.measurements import Directions
from implicitopt.diagnosis.report import Finding
from implicitopt.kkt import KKT, Point, norm

__all__ = [
    "contraction", "coupled", "derivatives", "finite", "plain", "projection", "reduced",
    "repeatable",
]  # fmt: skip

#: Steps of the plain iteration that are looked at.
STEPS = 20

_CONTRACT = (
    "Make f more contractive: train with jacobian_penalty, scale down its last normalization. An "
    "accelerator may still solve it, as may smaller steps, Joint(steps=StepSizes(z=0.5))."
)


def _listed(mask: Tensor) -> str:
    """The problems in ``mask``, in words."""
    found = mask.nonzero()[:, 0].tolist()
    if len(found) == len(mask):
        return "every problem" if len(mask) > 1 else "problem 0"
    some = ", ".join(map(str, found[:8])) + (", …" if len(found) > 8 else "")
    return f"problem{'s' if len(found) > 1 else ''} {some}"


def _relative(error: float) -> str:
    return f"{error:.0e}" if error else "rounding"


def finite(kkt: KKT, z: Tensor, x: Tensor) -> Finding:
    """f, the loss and their derivatives at the start."""
    sweep = kkt.sweep(Point(z, torch.ones_like(z), x))
    parts = {
        "f": sweep.f, "the loss": sweep.value[:, None], "a derivative in z": sweep.mu,
        "a derivative in x": sweep.grad,
    }  # fmt: skip
    for name, rows in parts.items():
        bad = ~torch.isfinite(rows).all(dim=1)
        if bool(bad.any()):
            return Finding(
                "finite start", False, f"{name} is NaN or infinite at f(z0, x0) in {_listed(bad)}",
                "Look at these problems' data. Norms, roots and group norm are singular at "
                "constant states: start from another z0, such as one drawn at random.",
            )  # fmt: skip
    return Finding("finite start", True, "f, the loss and their derivatives at f(z0, x0)")


def repeatable(kkt: KKT, z: Tensor, x: Tensor) -> Finding:
    """Dropout, and all else that makes a second call differ from the first.

    Near the start too: at zeros what is multiplied by noise may be zero.
    """
    generator = torch.Generator().manual_seed(0)
    near = [
        block + 0.1 * torch.randn(block.shape, generator=generator).to(block) for block in (z, x)
    ]
    looks = [
        (name, function, at)
        for at in ((z, x), (near[0], kkt.constrain(near[1])))
        for name, function in (("f", kkt.state_map), ("loss", kkt.objective))
    ]
    for name, function, at in looks:
        first, second = (function(*at).reshape(len(z), -1) for _ in range(2))
        change = norm(second - first) / (1 + norm(first))
        if bool((change > _small(z)).any()):
            return Finding(
                "repeatable", False,
                f"{name} changes by {change.max():.1e} when it is called again, in "
                f"{_listed(change > _small(z))}",
                "Call .eval() on the model (dropout), or draw what is random once, outside of "
                f"{name}.",
            )  # fmt: skip
    return Finding("repeatable", True, "f and the loss are the same when called again")


def _small(rows: Tensor) -> float:
    """A relative change that rounding does not explain."""
    return 100 * torch.finfo(rows.dtype).eps


def coupled(kkt: KKT, z: Tensor, x: Tensor, directions: Directions) -> Finding:
    """Batch norm, and all else that lets one problem change another."""
    if len(z) == 1:
        return Finding("coupling", None, "only one problem" + _perhaps_a_batch(kkt))
    functions: dict[str, tuple[Callable[..., Tensor], tuple[Tensor, ...]]] = {
        "f": (kkt.state_map, (z, x)),
        "loss": (kkt.objective, (z, x)),
    }
    if kkt.project is not None:
        functions["project"] = kkt.project, (x,)
    for name, (function, blocks) in functions.items():
        change = measurements.coupling(
            function, blocks, directions, size=10.0 if name == "project" else 1.0
        )
        affected = ~(change <= _small(z))  # NaN counts
        if bool(affected.any()):
            remedy = {
                "f": "Call .eval() on the model, or use group norm instead of batch norm. Or let "
                "the loss return one value, (): one problem.",
                "loss": "Let the loss reduce over all dimensions but the first; or over all, to "
                "(), for one problem.",
                "project": "Project each problem by itself, along all dimensions but the first.",
            }[name]
            return Finding(
                "coupling", False,
                f"{name} of {_listed(affected)} changes with the other problems, by "
                f"{change.max():.1e}",
                remedy,
            )  # fmt: skip
    return Finding("coupling", True, "no problem changes when the others do")


def _perhaps_a_batch(kkt: KKT) -> str:
    """What to say where the loss is one number though x and z share their first dimension."""
    shapes = [*kkt.x_layout.shapes, *kkt.z_layout.shapes]
    size = shapes[0][0] if shapes[0] else 1
    alike = all(len(shape) > 1 and shape[0] == size for shape in shapes)
    if kkt.x_layout.batched or size == 1 or not alike:
        return ""
    return (
        f", since the loss is one number. If dim 0 of x and z, {size}, is a batch, let it return "
        f'shape ({size},), with reduction="none" or by .mean over the other dimensions: else all '
        "share one step size and one status, and project acts on all of them together"
    )


def plain(kkt: KKT, z: Tensor, x: Tensor) -> Finding:
    """z ← f(z, x), without any acceleration."""
    last, residual, rate = measurements.plain_iteration(kkt, z, x, STEPS)
    value = kkt.objective(last, x)
    finite = torch.isfinite(residual) & torch.isfinite(value)
    name, worst = "plain iteration", int(rate.nan_to_num(nan=torch.inf).argmax())
    if not bool(finite.all()):
        return Finding(
            name, False,
            f"z ← f(z, x) gives NaN or infinity within {STEPS} steps in {_listed(~finite)}",
            _CONTRACT, rate,
        )  # fmt: skip
    detail = (
        f"{STEPS} steps z ← f(z, x) leave ‖f − z‖ / (1 + ‖z‖) at {residual.max():.1e} at "
        f"most; each multiplies it by {rate[worst]:.2f} in the slowest problem, {worst}"
    )
    if bool((rate < 1).all()):
        return Finding(name, True, detail, "", rate)
    return Finding(
        name, False, detail + f"; it does not shrink in {_listed(rate >= 1)}", _CONTRACT, rate
    )


def contraction(kkt: KKT, z: Tensor, x: Tensor, directions: Directions) -> Finding:
    """The spectral radius of ∂f/∂z where f is at rest."""
    state, residual = measurements.settle(kkt, z, x)
    radius = measurements.spectral_radius(kkt, state, x, directions)
    worst = int(radius.nan_to_num(nan=torch.inf).argmax())
    where = "the fixed point" if bool((residual <= 1e-2).all()) else "the best state found"
    detail = (
        f"the spectral radius of ∂f/∂z at {where} is about {radius.median():.2f} in the median, "
        f"{radius[worst]:.2f} at most (problem {worst}); ‖f − z‖ / (1 + ‖z‖) is "
        f"{residual.max():.1e} there"
    )
    ok = bool((radius < 1).all())
    return Finding("contraction", ok, detail, "" if ok else _CONTRACT, radius)


def derivatives(
    function: Callable[..., Tensor], name: str, z: Tensor, x: Tensor, directions: Directions
) -> Finding:
    """Of f or the loss, against differences; catches detach, and kinks at the start."""
    errors = {
        block: measurements.derivative_error(function, (z, x), which, directions)
        for which, block in enumerate(("z", "x"))
    }
    largest = max(float(error.nan_to_num(nan=torch.inf).max()) for error in errors.values())
    limit = measurements.attainable(z)
    wrong = [
        f"in {block}: off by {error.max():.0%} in {_listed(~(error <= limit))}"
        for block, error in errors.items()
        if not bool((error <= limit).all())
    ]
    title = f"derivatives of {name}"
    if not wrong:
        detail = f"agree with finite differences to {_relative(largest)} ({limit:.0e} would show)"
        return Finding(title, True, detail, "", largest)
    return Finding(
        title, False, "; ".join(wrong),
        f"Look in {name} for .detach(), .data, no_grad() and rounding; for a custom backward that "
        "is wrong; and for kinks at the start, such as relu at exactly 0 (harmless unless the "
        "solution is there too).",
        largest,
    )  # fmt: skip


def reduced(kkt: KKT, z: Tensor, x: Tensor, directions: Directions) -> Finding:
    """∇ₓL against differences of the loss at the fixed point."""
    error, solved = measurements.reduced_gradient_error(kkt, z, x, directions)
    name, limit = "reduced gradient", measurements.attainable(z)
    if not bool(solved.any()):
        return Finding(name, None, "cannot be told: no state and adjoint was solved accurately")
    largest = float(error[solved].max())
    left_out = "" if bool(solved.all()) else f"; {_listed(~solved)} left out, not solved accurately"
    wrong = solved & ~(error <= limit)
    if not bool(wrong.any()):
        detail = f"∇ₓL agrees with differences of ℓ(z(x), x) to {_relative(largest)}{left_out}"
        return Finding(name, True, detail, "", largest)
    return Finding(
        name, False, f"∇ₓL is off by {largest:.0%} in {_listed(wrong)}{left_out}",
        "If the derivatives above are right, f has several fixed points or kinks near this one: "
        "use a smooth activation, or another z0.",
        largest,
    )  # fmt: skip


def projection(kkt: KKT, x: Tensor, directions: Directions) -> Finding:
    """The nearest point of a convex set moves no two points apart."""
    assert kkt.project is not None
    ratio = measurements.expansion(kkt.project, x, directions)
    far = ~(ratio <= 1 + _small(x))
    if bool(far.any()):
        return Finding(
            "projection", False,
            f"project moves points apart, by up to {ratio.max():.2f}, in {_listed(far)}",
            "The nearest-point map of a convex set never does. Project onto a convex set, in the "
            "Euclidean norm, each problem by itself: see implicitopt.L2Ball.",
            ratio,
        )  # fmt: skip
    return Finding("projection", True, "keeps shapes, idempotent, moves no points apart", "", ratio)
