"""Malformed calls over the whole public interface, drawn at random from the tables of `odd`.

Each call must end in a right result or in an exception that says what was expected, what came and
what to do. A result is judged here by formulas that share no code with the library.

    python -m tests.reliability.malformed --calls 5000      # counts, and every call that fails
    python -m tests.reliability.malformed --only 1234       # one call again, with its traceback
"""

from __future__ import annotations

import argparse
import math
import random
import re
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import implicitopt as io
from tests.reliability import odd
from tests.reliability.odd import Problem, UsersError

LIBRARY = Path(io.__file__).parent
LONGEST = 30  # seconds of the processor, for one call
DOCUMENTED = (ValueError, TypeError, RuntimeError)
REMEDY = re.compile(
    r"\b(pass|use|convert|make|remove|return|leave|move|wrap|give|swap|reshape|squeeze|correct|"
    r"call|check|clone|sum|see|raise|count|get|choose|drop|solve|look)\b", re.IGNORECASE
)  # fmt: skip


class Wrong(AssertionError):
    """A call ended in neither a right result nor a documented exception."""


def demand(condition: bool, message: str) -> None:
    if not condition:
        raise Wrong(message)


# Exceptions


def kind_of(error: Exception) -> str:
    """Whose exception it is; raises `Wrong` for one that no user should see."""
    frames = traceback.extract_tb(error.__traceback__)
    files = [Path(frame.filename) for frame in frames]
    if isinstance(error, UsersError) or isinstance(error.__cause__, UsersError):
        return "the user's exception"
    inside = [k for k, file in enumerate(files) if LIBRARY in file.parents]
    users = [k for k, file in enumerate(files) if file == Path(odd.__file__)]
    called = [k for k, frame in enumerate(frames) if frame.name == "_call_impl"]
    if called and inside and called[-1] > inside[-1]:  # a module handed over as a callable
        return "the user's exception"
    if users and (not inside or users[-1] > inside[-1]):
        return "the user's exception"
    if isinstance(error, TypeError) and "<lambda>" in str(error):  # f takes other arguments
        return "the user's exception"
    text = f"{type(error).__name__}: {error}"
    if not inside:  # Python itself: an unknown option, or one too many
        known = isinstance(error, TypeError) and "argument" in str(error)
        demand(known, f"no exception of the library: {text}")
        return "refused by the signature"
    last = frames[-1]
    raised = inside[-1] == len(frames) - 1 and "raise" in _statement(last)
    demand(raised, f"not raised on purpose: {text} at {last.filename}:{last.lineno}")
    demand(isinstance(error, DOCUMENTED), f"of an undocumented kind: {text}")
    said = str(error)
    told = any(word in said for word in ("got", "was asked for", "; ", ": "))
    demand(told, f"no word of what came: {said}")
    demand(len(re.split(r"[.;:,] ", said)) > 1 and bool(REMEDY.search(said)), f"no remedy: {said}")
    return "refused with a remedy"


def _statement(frame: traceback.FrameSummary) -> str:
    lines = Path(frame.filename).read_text(encoding="utf-8").splitlines()
    assert frame.lineno is not None
    end = getattr(frame, "end_lineno", None) or frame.lineno
    return "\n".join(lines[frame.lineno - 1 : end])


# Results


def rows(tree: Any, batched: bool) -> Tensor:
    """The tree as a matrix, a row per problem, in float64."""
    flat = pytree.tree_leaves(tree)
    count = flat[0].shape[0] if batched else 1
    return torch.cat(
        [leaf.detach().double().reshape(count, -1) for leaf in flat if leaf.numel()], 1
    )


def plain(tree: Any, grad: bool = False) -> Any:
    return pytree.tree_map(lambda leaf: leaf.detach().clone().requires_grad_(grad), tree)


def kkt_residual(f: Any, loss: Any, sol: Any, project: Any, maximize: bool) -> Tensor:
    """The relative KKT residual of a solution, per problem, by autograd on f and the loss."""
    z, x, mu = plain(sol.z, True), plain(sol.x, True), plain(sol.mu)
    image, value = f(z, x), loss(z, x)
    batched = value.dim() == 1
    sign = -1.0 if maximize else 1.0
    pairs = list(zip(*map(pytree.tree_leaves, (mu, image, z)), strict=True))
    total = sign * (value.sum() + sum((m * (i - a)).sum() for m, i, a in pairs))
    flat = pytree.tree_leaves(z) + pytree.tree_leaves(x)
    grads = torch.autograd.grad(total, flat, allow_unused=True)
    grads = [torch.zeros_like(a) if g is None else g for a, g in zip(flat, grads, strict=True)]
    many = len(pytree.tree_leaves(z))
    at = [leaf.detach() for leaf in pytree.tree_leaves(x)]
    spec = pytree.tree_flatten(x)[1]
    moved = pytree.tree_unflatten([a - g for a, g in zip(at, grads[many:], strict=True)], spec)
    if project is not None:
        own = isinstance(project, (io.L2Ball, io.LinfBall, io.Box, io.Simplex))
        moved = project(moved, batched=batched) if own else project(moved)
    blocks = (
        rows(image, batched) - rows(z, batched),
        rows(grads[:many], batched),
        rows(x, batched) - rows(moved, batched),
    )
    size = torch.cat([rows(t, batched) for t in (z, mu, x)], 1).norm(dim=1)
    return torch.cat(blocks, 1).norm(dim=1) / (1 + size)


def judge_solution(
    p: Problem, f: Any, loss: Any, x0: Any, options: dict, sol: Any, pure: bool
) -> str:
    """The solution is what its status says; returns its statuses."""
    repr(sol)
    x, z = pytree.tree_leaves(sol.x), pytree.tree_leaves(sol.z)
    given = [leaf.shape for leaf in pytree.tree_leaves(x0)]
    demand([leaf.shape for leaf in x] == given, "x is not shaped as x0")
    demand(pytree.tree_structure(sol.x) == pytree.tree_structure(x0), "x has other containers")
    demand(all(a.shape == b.shape for a, b in zip(z, pytree.tree_leaves(sol.mu), strict=True)),
           "mu is not shaped as z")  # fmt: skip
    status = sol.status.reshape(-1)
    demand(set(status.tolist()) <= set(io.Status),
           "an unknown status")  # fmt: skip
    batched = sol.value.dim() == 1
    sound = status != 3
    for tree, name in ((sol.x, "x"), (sol.z, "z"), (sol.mu, "mu")):
        finite = torch.isfinite(rows(tree, batched)).all(1)
        demand(
            bool(finite[sound].all()), f"{name} is not finite though its status is not NONFINITE"
        )
    value = sol.value.detach().reshape(-1)
    demand(bool(torch.isfinite(value[sound]).all()), "the value is not finite")
    dtype = x[0].dtype
    rounding = 1e3 * torch.finfo(dtype).eps
    project, maximize = options.get("project"), bool(options.get("maximize", False))
    if pure and bool(sol.converged.any()):
        residual = kkt_residual(f, loss, sol, project, maximize)
        done = status == 0
        worst = residual[done].max().item()
        demand(worst <= 1.01 * sol.tol + rounding, f"CONVERGED at a KKT residual of {worst:.1e}")
    if pure and bool(sound.any()):
        again = loss(plain(sol.z), plain(sol.x)).detach().reshape(-1)
        near = (again - value).abs() <= rounding * (1 + value.abs())
        demand(bool(near[sound].all()), "value is not the loss at (z, x)")
    if sol.value.requires_grad and pure:
        judge_gradient(p, f, loss, sol, sound)
    names = Counter(io_status(code) for code in status.tolist())
    return " ".join(sorted(names)) if len(names) == 1 else "several statuses"


def io_status(code: int) -> str:
    return ("CONVERGED", "MAX_STEPS", "STALLED", "NONFINITE")[code]


def judge_gradient(p: Problem, f: Any, loss: Any, sol: Any, sound: Tensor) -> None:
    """The gradient of the value in W is ∂L/∂W at the solution, where every problem is sound."""
    (found,) = torch.autograd.grad(sol.value.sum(), p.W, retain_graph=True, allow_unused=True)
    if found is None or not bool(sound.all()):
        clean = found is None or not bool(torch.isnan(found).any()) or not bool(sound.any())
        demand(clean, "a failed problem's NaN in W")
        return
    z, x, mu = plain(sol.z), plain(sol.x), plain(sol.mu)
    image = f(z, x)
    pairs = zip(*map(pytree.tree_leaves, (mu, image, z)), strict=True)
    total = loss(z, x).sum() + sum((m * (i - a)).sum() for m, i, a in pairs)
    (known,) = torch.autograd.grad(total, p.W, allow_unused=True)
    known = torch.zeros_like(found) if known is None else known
    off = (found - known).double().norm() / (1 + known.double().norm())
    bound = 1e3 * torch.finfo(found.dtype).eps
    demand(bool(off <= bound), f"the envelope gradient is off by {off:.1e}")


def in_set(constraint: Any, x: Tensor, image: Tensor) -> bool:
    """Whether ``image`` lies in C and no random point of C is nearer to x, row by row."""
    x, image = x.double(), image.double()
    slack = 1e-2 if image.abs().max() > 1e3 else 1e-4
    scale = 1 + x.abs().amax(1)
    if isinstance(constraint, (io.L2Ball, io.LinfBall)):
        order = 2 if isinstance(constraint, io.L2Ball) else math.inf
        center = 0.0 if constraint.center is None else constraint.center
        radius = torch.as_tensor(constraint.radius).double()
        away = torch.linalg.vector_norm(image - center, ord=order, dim=1)
        return bool((away <= radius + slack * scale).all())
    if isinstance(constraint, io.Box):
        low, up = (
            torch.as_tensor(b, dtype=torch.float64) for b in (constraint.lower, constraint.upper)
        )
        inside = (image >= low - slack * scale[:, None]) & (image <= up + slack * scale[:, None])
        return bool(inside.all())
    total = torch.as_tensor(constraint.total).double()
    nonnegative = bool((image >= -slack).all())
    return nonnegative and bool(((image.sum(1) - total).abs() <= slack * scale * x.shape[1]).all())


# Calls


class Draw:
    """What one call is made of; ``odd`` lists its oddities."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        torch.manual_seed(seed)
        dtype = self.rng.choice([torch.float32, torch.float64, torch.float64])
        self.problem = Problem(
            seed % 97, self.rng.choice([1, 2, 3]), self.rng.choice([1, 2, 4]), dtype,
            scalar=self.rng.random() < 0.15,
        )  # fmt: skip
        self.odd: list[str] = []
        self.pure = True

    def chance(self, share: float) -> bool:
        return self.rng.random() < share

    def named(self, label: str, table: dict[str, Any]) -> Any:
        name = self.rng.choice(list(table))
        self.odd.append(f"{label} {name}")
        return name, table[name]

    def junk(self, label: str) -> Any:
        value = self.rng.choice(odd.JUNK)
        self.odd.append(f"{label}={value!r}")
        return value

    def f(self, share: float) -> Any:
        if not self.chance(share):
            return self.problem.f
        name, make = self.named("f", odd.STATE_MAPS)
        self.pure &= name not in odd.IMPURE | odd.COUPLED
        return make(self.problem, self.problem.f)

    def loss(self, share: float) -> Any:
        if not self.chance(share):
            return self.problem.loss
        name, make = self.named("loss", odd.LOSSES)
        self.pure &= name not in odd.IMPURE_LOSSES | odd.COUPLED
        return make(self.problem, self.problem.loss)

    def tree(self, label: str, share: float) -> Any:
        x = self.problem.x()
        return self.named(label, odd.INPUTS)[1](x) if self.chance(share) else x

    def accelerator(self, odd_share: float = 0.3) -> Any:
        kind = self.rng.choice([io.Anderson, io.Broyden, io.Picard])
        names = list(vars(kind()))
        if not self.chance(odd_share):
            return kind()
        return kind(**{name: self.junk(f"{kind.__name__}.{name}") for name in self.some(names)})

    def some(self, names: list[str]) -> list[str]:
        return self.rng.sample(names, self.rng.randint(1, min(2, len(names))))

    def solver(self, odd_too: bool = True) -> Any:
        choice = self.rng.randrange(8) if odd_too else 8
        if choice == 0:
            return self.junk("solver")
        if choice == 1:
            return io.Joint(self.accelerator(), **self.options("Joint", ["steps", "reach"]))
        if choice == 2:
            return io.Joint(steps=io.StepSizes(**self.options("StepSizes", ["z", "mu", "x"], 1.0)))
        if choice == 3:
            return io.OneShot(**self.options("OneShot", ["memory", "inner_memory", "accuracy"]))
        if choice == 4:
            return io.Adaptive(**self.options("Adaptive", ["first", "one_shot", "patience"]))
        if choice == 5:
            names = ["optimizer", "accelerator", "inner_steps", "inner_tol", "warm"]
            return io.Nested(**self.options("Nested", names))
        if choice == 6:
            lr = self.junk("lr") if self.chance(0.7) else 0.1
            return io.Nested(partial(io.ProjectedGradient, lr=lr), inner_steps=5)
        if choice == 7:
            broken = self.rng.choice([odd.raising, lambda params: None, torch.optim.LBFGS,
                                      partial(torch.optim.SGD, lr=1e3)])  # fmt: skip
            self.odd.append("an odd optimizer")
            return io.Nested(broken, inner_steps=5)
        return self.rng.choice([None, io.Joint(), io.OneShot(), io.Adaptive(patience=3),
                                io.Nested(inner_steps=5)])  # fmt: skip

    def options(self, label: str, names: list[str], share: float = 0.7) -> dict[str, Any]:
        if not self.chance(share):
            return {}
        return {name: self.junk(f"{label}.{name}") for name in self.some(names)}

    def adjoint(self) -> Any:
        kind = self.rng.choice([io.Envelope, io.Implicit, io.FrozenInput, None])
        if kind is None:
            return self.junk("adjoint")
        if kind is io.Envelope:
            return kind()
        names = ["tol", "max_steps", "precondition"][: 3 if kind is io.Implicit else 2]
        return kind(**self.options(kind.__name__, names, 0.4))

    def constraint(self) -> Any:
        name = self.rng.choice(["L2Ball", "LinfBall", "Box", "Simplex", "own", "junk"])
        if name == "junk":
            return self.junk("project")
        if name == "own":
            return self.named("project", {
                "raises": odd.raising, "zero": lambda x: pytree.tree_map(torch.zeros_like, x),
                "shrinks": lambda x: pytree.tree_map(lambda a: 0.5 * a - 1, x),
                "in place": lambda x: pytree.tree_map(lambda a: a.clamp_(-0.1, 0.1), x),
                "None": lambda x: None, "NaN": lambda x: pytree.tree_map(lambda a: a * odd.NAN, x),
                "other shape": lambda x: pytree.tree_map(lambda a: a[..., :1], x),
                "detached": lambda x: pytree.tree_map(lambda a: a.detach().clamp(-0.1, 0.1), x),
                "float64": lambda x: pytree.tree_map(Tensor.double, x),
            })[1]  # fmt: skip
        kind = getattr(io, name)
        bounds = ["lower", "upper"] if name == "Box" else [
            "total" if name == "Simplex" else "radius"
        ]  # fmt: skip
        arguments = {b: self.bound(f"{name}.{b}") for b in bounds}
        if name.endswith("Ball") and self.chance(0.3):
            arguments["center"] = self.bound(f"{name}.center")
        return kind(**arguments)

    def bound(self, label: str) -> Any:
        p = self.problem
        if self.chance(0.4):
            return self.junk(label)
        return self.rng.choice([
            0.5, 1.0, 1, torch.full((p.batch,), 0.3), torch.full((p.batch, p.n), 0.7),
            torch.full((p.n,), 2.0, dtype=torch.float64), torch.tensor(0.25), p.target,
            torch.full((p.batch, 1), 0.5), torch.full((7,), 1.0), torch.full((p.batch,), odd.NAN),
        ])  # fmt: skip


def call_solve(d: Draw) -> str:
    """One or two things are odd, seldom more: most calls must get past the first check."""
    p = d.problem
    places = ["f", "loss", "x0", "z0", "solver", "adjoint", "project", "warm_start", "callback",
              "option", "nothing"]  # fmt: skip
    weights = [5, 4, 4, 2, 3, 1, 2, 1, 1, 2, 1]
    where = set(d.rng.choices(places, weights, k=d.rng.choice([1, 1, 2, 3])))
    f, loss, x0 = d.f("f" in where), d.loss("loss" in where), d.tree("x0", "x0" in where)
    z0 = d.tree("z0", 1) if "z0" in where else None
    if "z0" in where and d.chance(0.2):
        z0 = d.rng.choice([odd.raising, lambda x: None, lambda x: x, lambda x: "z"])
        d.odd.append("a callable z0")
    options: dict[str, Any] = {"max_steps": d.rng.choice([1, 2, 13, 40])}
    if "solver" in where or d.chance(0.3):
        options["solver"] = d.solver("solver" in where)
    if "adjoint" in where:
        options["adjoint"] = d.adjoint()
    elif d.chance(0.3):
        options["adjoint"] = d.rng.choice([io.Implicit(), io.FrozenInput()])
    if "project" in where:
        options["project"] = d.constraint()
    elif d.chance(0.2):
        options["project"] = d.rng.choice([io.L2Ball(0.1), io.Box(-0.1, 0.2), io.LinfBall(0.1)])
    if "option" in where:
        name = d.rng.choice(["maximize", "max_steps", "tol", "select", "warm_start", "callback",
                             "throw", "history", "sample_iterate", "unknown"])  # fmt: skip
        options[name] = d.junk(name)
    for name in ("maximize", "history", "sample_iterate", "throw"):
        if d.chance(0.1):
            options[name] = True
    if "warm_start" in where:
        options["warm_start"] = io.WarmStart(*(d.tree(f"warm {n}", 0.4) for n in ("x", "z", "mu")))
    if "callback" in where:
        options["callback"] = d.rng.choice([odd.raising, lambda progress: True, lambda a, b: None])
        d.odd.append("an odd callback")
    before = [_bits(tree) for tree in (x0, z0)]
    with d.rng.choice([torch.enable_grad(), torch.enable_grad(), torch.no_grad()]):
        sol = io.solve(f, loss, x0, z0, **options)
    demand([_bits(tree) for tree in (x0, z0)] == before, "x0 or z0 was changed")
    found = judge_solution(p, f, loss, x0, options, sol, d.pure)
    if isinstance(options.get("adjoint"), (io.Implicit, io.FrozenInput)):
        differentiate(p, sol)
    return found


def differentiate(p: Problem, sol: Any) -> None:
    """Backward through z: finite, and an adjoint that failed has warned."""
    out = sum(leaf.sum() for leaf in pytree.tree_leaves(sol.z))
    if not out.requires_grad:
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        (grad,) = torch.autograd.grad(out, p.W, allow_unused=True)
    told = any(issubclass(w.category, io.AdjointWarning) for w in caught)
    status = sol.adjoint.status
    if status is None:
        return
    demand(told or bool((status == 0).all()), "an adjoint failed without a warning")
    if bool((sol.status != 3).all()) and grad is not None:
        demand(told or bool(torch.isfinite(grad).all()), "a gradient that is not finite")


def _bits(tree: Any) -> Any:
    if callable(tree) and not isinstance(tree, Tensor):
        return None
    return [
        (leaf._version if not leaf.is_inference() else 0, repr(leaf.shape))
        + ((leaf.detach().reshape(-1).tolist().__repr__(),) if _dense(leaf) else ())
        for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)
    ]  # fmt: skip


def _dense(leaf: Tensor) -> bool:
    return leaf.layout == torch.strided and leaf.device.type == "cpu"


def call_fixed_point(d: Draw) -> str:
    p = d.problem
    where = set(d.rng.choices(["f", "x", "z0", "accelerator", "option"], [5, 4, 2, 3, 2], k=2))
    f, x = d.f("f" in where and d.chance(0.7)), d.tree("x", 0.7 * ("x" in where))
    z0 = d.tree("z0", 0.7) if "z0" in where else None
    options: dict[str, Any] = {"max_steps": d.rng.choice([1, 5, 40])}
    if "accelerator" in where:
        options["accelerator"] = d.accelerator(0.6)
    if "option" in where:
        name = d.rng.choice(["tol", "max_steps", "adjoint_tol", "adjoint_max_steps", "batched",
                             "accelerator"])  # fmt: skip
        options[name] = d.junk(name)
    before = _bits(x)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        z = io.fixed_point(f, x, z0, **options)
    told = any(issubclass(w.category, io.ConvergenceWarning) for w in caught)
    demand(_bits(x) == before, "x was changed")
    if d.pure and not told:
        with torch.no_grad():
            batched = options.get("batched", True)
            at, image = rows(z, batched), rows(f(plain(z), plain(x)), batched)
        dtype = pytree.tree_leaves(z)[0].dtype
        default = {torch.float64: 1e-6, torch.float32: 1e-4}.get(dtype, 1e-2)
        tol = default if options.get("tol") is None else float(options["tol"])
        off = ((image - at).norm(dim=1) / (1 + at.norm(dim=1))).max().item()
        demand(
            off <= 1.01 * tol + 1e3 * torch.finfo(dtype).eps, f"no warning at a residual {off:.1e}"
        )
    out = sum(leaf.sum() for leaf in pytree.tree_leaves(z))
    if out.requires_grad and not told:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            (grad,) = torch.autograd.grad(out, p.W, allow_unused=True)
        quiet = not any(issubclass(w.category, io.AdjointWarning) for w in caught)
        if quiet and grad is not None:
            demand(bool(torch.isfinite(grad).all()), "a gradient that is not finite, unwarned")
    return "warned: not converged" if told else "CONVERGED"


def call_check(d: Draw) -> str:
    share = d.rng.choice([0.0, 0.4, 0.8])
    f, loss, x0 = d.f(share), d.loss(share), d.tree("x0", 0.7 - share)
    z0 = None if d.chance(0.7) else d.tree("z0", 0.6)
    options = {"project": d.constraint()} if d.chance(0.3) else {}
    if d.chance(0.1):
        options["seed"] = d.junk("seed")
    report = io.check(f, loss, x0, z0, quiet=True, **options)
    str(report)
    demand(isinstance(report.ok, bool), "report.ok is no bool")
    return "report: ok" if report.ok else "report: something is off"


def call_penalty(d: Draw) -> str:
    p = d.problem
    share = d.rng.choice([0.0, 0.4, 0.8])
    f, z, x = d.f(share), d.tree("z", 0.7 - share), d.tree("x", 0.5 * (0.7 - share))
    options = {n: d.junk(n) for n in ("probes", "batched") if d.chance(0.15)}
    if type(options.get("probes")) is int:
        options["probes"] = min(options["probes"], 5)
    batched = options.get("batched", True)
    before = [_bits(z), _bits(x)]
    value = io.jacobian_penalty(f, z, x, **options)
    demand([_bits(z), _bits(x)] == before, "z or x was changed")
    first = pytree.tree_leaves(z)[0]
    expected = (first.shape[0],) if batched else ()
    demand(tuple(value.shape) == expected, f"a penalty of shape {tuple(value.shape)}")
    demand(not bool((value < 0).any()), "a negative penalty")
    if value.requires_grad:
        torch.autograd.grad(value.sum(), p.W, allow_unused=True)
    return "a number per problem"


def call_projection(d: Draw) -> str:
    constraint = d.constraint()
    x = d.tree("x", 0.6)
    if isinstance(x, Tensor) and x.dtype == d.problem.dtype and d.chance(0.5) and _dense(x):
        x = x.detach() + 3 * torch.randn(x.shape).to(x.dtype)
    own = isinstance(constraint, (io.L2Ball, io.LinfBall, io.Box, io.Simplex))
    if not own:
        raise UsersError("not one of the library's")
    batched = d.chance(0.85)
    before = _bits(x)
    image = constraint(x, batched=batched)
    demand(_bits(x) == before, "x was changed")
    bounds = [v for v in vars(constraint).values() if isinstance(v, Tensor)]
    if not all(map(_dense, pytree.tree_leaves(x))):
        return "a point of C"
    a, b = rows(x, batched), rows(image, batched)
    demand(a.shape == b.shape, "another shape")
    finite = torch.isfinite(a).all(1)
    simple = isinstance(x, Tensor) and batched and x.dim() == 2 and not any(v.dim() for v in bounds)
    if simple and bool(finite.all()) and len(a) and max(a.abs().max(), b.abs().max()) < 1e20:
        demand(in_set(constraint, a, b), "the image lies outside of C")
        again = rows(constraint(image, batched=batched), batched)
        eps = torch.finfo(x.dtype).eps
        scale = 1 + a.abs().max() + b.abs().max()
        demand(bool((again - b).abs().max() <= 1e2 * eps * scale), "not idempotent")
    return "a point of C"


def call_constructor(d: Draw) -> str:
    """An object that is accepted must serve on a sound problem."""
    p, what = d.problem, d.rng.randrange(5)
    options: dict[str, Any] = {"max_steps": 60, "tol": 1e-3}
    if what == 0:
        options["solver"] = d.solver()
    elif what == 1:
        options["solver"] = io.Joint(d.accelerator(1.0))
    elif what == 2:
        options["adjoint"] = d.adjoint()
    elif what == 3:
        options["select"] = io.Best(d.junk("Best.small"))
    else:
        rule = d.rng.choice([io.Last, io.PaperRule, io.Best])
        options["select"] = d.rng.choice([rule(), rule])
    sol = io.solve(p.f, p.loss, p.x(), **options)
    found = judge_solution(p, p.f, p.loss, p.x(), options, sol, True)
    if isinstance(options.get("adjoint"), (io.Implicit, io.FrozenInput)):
        differentiate(p, sol)
    return found


CALLS: dict[str, tuple[Callable[[Draw], str], int]] = {
    "solve": (call_solve, 10),
    "fixed_point": (call_fixed_point, 4),
    "check": (call_check, 1),
    "jacobian_penalty": (call_penalty, 2),
    "projections": (call_projection, 3),
    "constructors": (call_constructor, 3),
}


def run(number: int) -> tuple[str, str, list[str]]:
    """Make one call: the name called, how it ended, what was odd. Raises `Wrong`."""
    d = Draw(number)
    name = d.rng.choices(list(CALLS), [weight for _, weight in CALLS.values()])[0]
    begin = time.process_time()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                ended = CALLS[name][0](d)
            except Wrong:
                raise
            except Exception as error:
                ended = kind_of(error)
        demand(time.process_time() - begin < LONGEST, "it took too long")
    except Wrong as wrong:
        raise Wrong(
            f"call {number}, {name} with {', '.join(d.odd) or 'nothing odd'}: {wrong}"
        ) from (wrong.__context__)
    return name, ended, d.odd


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--calls", type=int, default=5000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--only", type=int)
    options = parser.parse_args()
    if options.only is not None:
        print(run(options.only))
        return
    counts: dict[str, Counter[str]] = {name: Counter() for name in CALLS}
    failed = 0
    for number in range(options.first, options.first + options.calls):
        try:
            name, ended, _ = run(number)
            counts[name][ended] += 1
        except Wrong as wrong:
            failed += 1
            print(wrong)
    for name, endings in counts.items():
        print(f"{name}: {sum(endings.values())} calls")
        for ended, count in endings.most_common():
            print(f"    {count:5d}  {ended}")
    print(
        f"{failed} of {options.calls} calls ended in neither a right result nor a documented error"
    )


if __name__ == "__main__":
    main()
