"""On a GPU: eager, with f in CUDA graphs, and with f compiled; host syncs counted.

Problems: MDEQ small (branches [24, 24], 28×28 images), an attack in the unit ball at batch 1 and
96, 80 sweeps; MDEQ large (branches [32, 64, 128, 256], 64×64 images, codes of length 128), the
inversion of a decoder at batch 48, 40 sweeps. Weights are as they are initialized: the time of a
sweep does not depend on them. float32.

Measured, in medians of interleaved calls in one run by time.perf_counter, with the device
synchronized before and after: a bare sweep (f, its transposed product, and the loss's gradient),
and solves by ``OneShot()``, ``Joint()`` and the default, run to their limit of sweeps (tol=0).
Syncs are those that torch.cuda.set_sync_debug_mode reports over a solve of the default, the checks
of the inputs included.

Without a CUDA device the result says so, and nothing is measured.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

import implicitopt
from benchmarks.bare import bare_of
from benchmarks.clock import interleaved
from benchmarks.decoders import examples_module
from benchmarks.graphed import Graphed

__all__ = ["CASES", "MODES", "SOLVERS", "Case", "measure", "table"]

#: Of the paper's tables, on its GPU; not of the same weights, nor always of the same batch.
PAPER = (
    "Table 2, MNIST attack: 80 steps 1,401 ms, 20 PGD steps 4,360 ms. "
    "Table 3, CelebA decoder, 48 images: 40 steps 862 ms, 100 steps 2,156 ms, 40 Adam 7,659 ms. "
    "Table 7: 100 steps 11,836 ms, 20 PGD steps 28,948 ms."
)

SOLVERS: dict[str, Callable[[], Any]] = {
    "OneShot": implicitopt.OneShot,
    "Joint": implicitopt.Joint,
    "Adaptive (default)": implicitopt.Adaptive,
}


class Case(NamedTuple):
    """A batch of problems, and how many sweeps they are given."""

    f: Callable[[Any, Tensor], Any]
    loss: Callable[[Any, Tensor], Tensor]
    x0: Tensor
    z0: Any
    options: dict[str, Any]
    steps: int

    def solve(self, solver: Any) -> implicitopt.Solution:
        with torch.no_grad():
            return implicitopt.solve(
                self.f, self.loss, self.x0, self.z0, solver=solver, tol=0.0, max_steps=self.steps,
                **self.options,
            )  # fmt: skip


def ready(model: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    return model.to(device).eval().requires_grad_(False)


def attack(batch: int, device: torch.device, steps: int = 80) -> Case:
    """MDEQ small: the change of an image, in the unit ball, that a classifier takes worst."""
    Classifier = examples_module("mdeq").Classifier

    torch.manual_seed(0)
    model = ready(Classifier((1, 28), (24, 24)), device)
    images = torch.rand(batch, 1, 28, 28).to(device)
    labels = torch.randint(10, (batch,)).to(device)

    def f(z: Any, change: Tensor) -> Any:
        return model.f(z, images + change)

    def loss(z: Any, change: Tensor) -> Tensor:
        return cross_entropy(model.logits(z), labels, reduction="none")

    options = {"maximize": True, "project": implicitopt.L2Ball(1.0)}
    return Case(f, loss, torch.zeros_like(images), model.start(images), options, steps)


def inversion(batch: int, device: torch.device, steps: int = 40) -> Case:
    """MDEQ large: the codes of given images."""
    Decoder = examples_module("mdeq").Decoder

    torch.manual_seed(0)
    model = ready(Decoder(128, (3, 64), (32, 64, 128, 256)), device)
    images = torch.rand(batch, 3, 64, 64).to(device)
    x0 = torch.zeros(batch, 128, device=device)

    def loss(z: Any, x: Tensor) -> Tensor:
        misfit = (model.image(z) - images).square().flatten(1).sum(1)
        return 0.5 * misfit + 0.05 * x.square().sum(1)

    return Case(model.f, loss, x0, model.start(x0), {}, steps)


CASES: dict[str, Callable[[torch.device], Case]] = {
    "MDEQ small, batch 1": partial(attack, 1),
    "MDEQ small, batch 96": partial(attack, 96),
    "MDEQ large, batch 48": partial(inversion, 48),
}

#: How f is run.
MODES: dict[str, Callable[[Case], Case]] = {
    "eager": lambda case: case,
    "CUDA graphs": lambda case: case._replace(f=Graphed(case.f, case.z0, case.x0)),
    "torch.compile": lambda case: case._replace(f=torch.compile(case.f)),
}


def waited(call: Callable[[], object]) -> Callable[[], None]:
    """The call, from an idle device to an idle device."""

    def run() -> None:
        torch.cuda.synchronize()
        call()
        torch.cuda.synchronize()

    return run


@contextmanager
def syncs_counted() -> Iterator[list[int]]:
    """Yields a list that holds the number of host syncs once the block has ended."""
    found: list[int] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found.append(sum("synchronizing" in str(warning.message) for warning in caught))


def measure_case(case: Case, *, repeats: int) -> dict[str, dict]:
    rows: dict[str, dict] = {}
    calls: dict[tuple[str, str], Callable[[], None]] = {}
    for mode, change in MODES.items():
        rows[mode] = {"steps": case.steps}
        try:
            changed = change(case)
            # A mode that cannot run shows here: nothing else may hide a wrong result.
            found = changed.solve(implicitopt.OneShot())
            rows[mode]["value"] = found.value.mean().item()
            with syncs_counted() as syncs:
                changed.solve(implicitopt.Adaptive())
            rows[mode]["syncs"] = syncs[0]
        except Exception as raised:
            rows[mode] = {"steps": case.steps, "failed": type(raised).__name__}
            continue
        calls[mode, "sweep"] = waited(bare_of(changed))
        for name, make in SOLVERS.items():
            calls[mode, name] = waited(partial(changed.solve, make()))
    timed = interleaved({f"{mode}\n{what}": call for (mode, what), call in calls.items()},
                        repeats=repeats)  # fmt: skip
    for key, seconds in timed.items():
        mode, what = key.split("\n")
        rows[mode].setdefault("milliseconds", {})[what] = 1e3 * seconds
    return rows


def measure(*, quick: bool, bar: Callable[..., Any]) -> dict:
    """Every case in every mode; ``quick``: MDEQ small at batch 1 only, with three repeats."""
    if not torch.cuda.is_available():
        return {"device": None, "cases": {}}
    device = torch.device("cuda")
    names = list(CASES)[: 1 if quick else None]
    with torch.random.fork_rng():
        cases = {
            name: measure_case(CASES[name](device), repeats=3 if quick else 11)
            for name in bar(names, desc="gpu")
        }
    return {"device": torch.cuda.get_device_name(device), "cases": cases}


def table(results: dict) -> str:
    """A Markdown table: milliseconds on the card named, and ratios to bare sweeps and to eager."""
    if results["device"] is None:
        return "no CUDA device"
    lines = [
        f"On one {results['device']}; times in milliseconds.",
        "",
        "| problem | f | sweep | sweeps | "
        + " | ".join(f"{name} | / its sweeps" for name in SOLVERS)
        + " | eager / this, default | syncs |",
        "|---|---|---:|---:|" + "---:|---:|" * len(SOLVERS) + "---:|---:|",
    ]
    for case, rows in results["cases"].items():
        for mode, row in rows.items():
            if "failed" in row:
                lines.append(f"| {case} | {mode} | failed: {row['failed']} |")
                continue
            ms, eager = row["milliseconds"], rows["eager"].get("milliseconds")
            cells = [f"{ms['sweep']:.2f}", str(row["steps"])]
            for name in SOLVERS:
                cells += [f"{ms[name]:.1f}", f"{ms[name] / (row['steps'] * ms['sweep']):.2f}"]
            last = list(SOLVERS)[-1]
            cells.append("–" if eager is None else f"{eager[last] / ms[last]:.2f}")
            lines.append(f"| {case} | {mode} | " + " | ".join([*cells, str(row["syncs"])]) + " |")
    return "\n".join([*lines, "", f"The paper's times: {PAPER}"])
