"""What a solver's step costs over a bare sweep.

A bare sweep is f, its transposed product, and the loss with its gradient: ``KKT.sweep`` without
its norms. What it takes by ``torch.func.vjp`` is shown beside it. Solves of as many steps are timed
in turn with as many bare sweeps, and the medians of the ratios are shown. And counted, which no
other load disturbs: the tensor operations of a step, each a kernel to launch on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
from tabulate import tabulate
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.bare import bare
from benchmarks.clock import now
from benchmarks.families import linear_quadratic, tanh
from implicitopt import Adaptive, Anderson, Joint, OneShot
from implicitopt.iteration import iterate
from implicitopt.select import Best
from implicitopt.solve import _prepare

__all__ = ["mdeq", "measure", "operations", "table"]

#: The column of a sweep by ``torch.func.vjp``.
BY_FUNC = "torch.func.vjp"
#: The row of the table that is counted.
OPERATIONS = "tensor operations of a step, tanh"

SOLVERS: dict[str, Callable[[], Any]] = {
    "default": Adaptive,
    "Joint": Joint,
    "Joint, memory 20": lambda: Joint(Anderson(memory=20)),
    "Joint, memory 10": lambda: Joint(Anderson(memory=10)),
    "OneShot": OneShot,
}


def mdeq(batch: int, side: int, channels: tuple[int, ...] = (16, 32)) -> tuple[Any, ...]:
    """An untrained MDEQ decoder: the arguments of ``solve`` for random images."""
    from benchmarks.decoders import examples_module

    torch.manual_seed(0)
    decoder = examples_module("mdeq").Decoder(64, (1, side), channels).requires_grad_(False)
    target = torch.rand(batch, 1, side, side)

    def loss(z: Any, x: torch.Tensor) -> torch.Tensor:
        return ((decoder.image(z) - target) ** 2).sum((1, 2, 3)) + 0.05 * (x**2).sum(1)

    return decoder.f, loss, torch.zeros(batch, 64), decoder.start


def problems(quick: bool) -> dict[str, Callable[[], tuple[Any, ...]]]:
    """From small states, where the bookkeeping counts, to large ones, where memory does."""
    made: dict[str, Callable[[], tuple[Any, ...]]] = {
        "MDEQ decoder, n 6,144, B 16": partial(mdeq, 16, 16),
        "MDEQ decoder, n 18,816, B 16": partial(mdeq, 16, 28),
        "MDEQ decoder, n 6,144, B 1": partial(mdeq, 1, 16),
        "tanh, n 64, B 32": partial(tanh, "gauss"),
        "tanh, n 512, B 32": partial(tanh, "gauss", n=512),
        "linear, n 40, B 32": partial(linear_quadratic, 40, 12, 0.9),
    }
    return dict(list(made.items())[::3]) if quick else made


@torch.no_grad()
def ratios(arguments: tuple[Any, ...], steps: int, repeats: int) -> dict[str, Any]:
    """Per solver the median ratio of times, and the milliseconds of a bare sweep."""
    kkt, start, _ = _prepare(*arguments, None, False, None)
    solve = partial(iterate, kkt, start=start, max_steps=steps, tol=0, rule=Best())
    found: dict[str, list[float]] = {name: [] for name in SOLVERS}
    plain, by_func = [], []
    for _ in range(3):
        bare(kkt, start)
    for _ in range(repeats):
        begin = now()
        for _ in range(steps):
            bare(kkt, start, torch.func.vjp)
        by_func.append((now() - begin) / steps)
        for name, make in SOLVERS.items():
            begin = now()
            for _ in range(steps):
                bare(kkt, start)
            middle = now()
            solve(make())
            found[name].append((now() - middle) / (middle - begin))
            plain.append((middle - begin) / steps)
    times = {"ms": 1e3 * median(plain), BY_FUNC: median(by_func) / median(plain)}
    return times | {name: median(each) for name, each in found.items()}


class _Operations(TorchDispatchMode):
    """Counts the tensor operations that are called under it."""

    count = 0

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.count += 1
        return operation(*args, **(kwargs or {}))


@torch.no_grad()
def operations(arguments: tuple[Any, ...], solver: Any, between: tuple[int, int] = (20, 60)) -> int:
    """Tensor operations, views too, of a step of the solver with its sweep: a mean over steps."""
    kkt, start, _ = _prepare(*arguments, None, False, None)
    counts = []
    for steps in between:
        with _Operations() as seen:
            iterate(kkt, solver, start, max_steps=steps, tol=0, rule=Best())
        counts.append(seen.count)
    return round((counts[1] - counts[0]) / (between[1] - between[0]))


def measure(*, quick: bool, bar: Callable[..., Any]) -> dict[str, dict[str, float]]:
    """problem -> solver -> a step's time over a bare sweep's; "ms" is that of the sweep.

    And, under ``OPERATIONS``, solver -> operations of a step on a tanh map.
    """
    steps, repeats = (10, 1) if quick else (60, 5)
    found = {
        name: ratios(make(), steps, repeats)
        for name, make in bar(problems(quick).items(), desc="overhead")
    }
    found[OPERATIONS] = {name: operations(tanh("gauss"), make()) for name, make in SOLVERS.items()}
    return found


def table(found: dict[str, dict[str, float]]) -> str:
    """A row per problem."""
    rows = [
        [name, f"{row['ms']:.2f}", *(f"{row[column]:.2f}" for column in (BY_FUNC, *SOLVERS))]
        for name, row in found.items()
        if name != OPERATIONS
    ]
    rows.append([OPERATIONS, "", "", *(str(found[OPERATIONS][solver]) for solver in SOLVERS)])
    header = ["a step over a bare sweep", "bare, ms", BY_FUNC, *SOLVERS]
    return tabulate(rows, header, tablefmt="github", disable_numparse=True)
