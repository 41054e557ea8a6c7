"""implicitopt beside its peers, on what they can do: the same problem to the same tolerance.

*Equilibria*: ``fixed_point`` against torchdeq (Anderson and Broyden forward, implicit gradient), 16
problems of 64 unknowns in float64, one easy and one non-normal. "to tol" is the evaluation of f at
which all problems first met ‖f(z) − z‖ ≤ 1e-6 (1 + ‖z‖), which one counter decides for everyone;
"in all" counts every call, those for the gradient included. The error is that of dL/dW against
dense linear algebra.

*Hypergradients*: ``solve`` with ``Implicit()`` against torchopt, jaxopt, optimistix and xitorch, on
ridge regression, logistic regression and an MLP, to 1e-8. "evaluations" are all calls of the
training loss (of f), counted in a run of their own; the error is that of the gradient in the weight
decays, against the closed form or the dense Hessian in float64.

Times are medians of interleaved calls in one run by time.perf_counter, shown over that of
implicitopt's; JAX's are without the time to compile. A peer that is not installed is named
as absent (``pip install ".[peers]"``).
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks import bilevel, equilibria
from benchmarks.accuracy import relative_error
from benchmarks.clock import interleaved

__all__ = ["PEERS", "measure", "table"]

PEERS = ("torchdeq", "torchopt", "jaxopt", "optimistix", "xitorch")


def importable(name: str) -> bool:
    """Whether a peer can be imported here."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(name)
    except Exception:  # a wheel built for another torch may raise anything
        return False
    return True


def quietly(call: Callable[[], Any]) -> Callable[[], Any]:
    """The call without its warnings: those of a peer are not ours to heed."""

    def run() -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return call()

    return run


def measure_equilibria(*, present: set[str], repeats: int, bar: Callable[..., Any]) -> dict:
    results: dict[str, dict[str, dict]] = {}
    contenders = equilibria.contenders(torchdeq="torchdeq" in present)
    for case, make in bar(equilibria.CASES.items(), desc="equilibria"):
        problem = make()
        z, grad = problem.known()
        rows, calls = {}, {}
        for name, solve in contenders.items():
            counter = equilibria.Counter(problem.f)
            calls[name] = quietly(partial(solve, problem, problem.f))
            try:
                found = quietly(partial(solve, problem, counter))()
            except Exception as raised:  # a peer's failure is a result
                rows[name], _ = {"failed": type(raised).__name__}, calls.pop(name)
                continue
            off = (problem.f(found.z, problem.W) - found.z).norm(dim=1) / (1 + found.z.norm(dim=1))
            rows[name] = {
                "to_tol": counter.reached,
                "in_all": counter.calls,
                "residual": off.max().item(),
                "state_error": relative_error(found.z, z),
                "gradient_error": relative_error(found.grad, grad),
            }
        for name, seconds in interleaved(calls, repeats=repeats).items():
            rows[name]["seconds"] = seconds
        results[case] = rows
    return results


def measure_hypergradients(*, present: set[str], repeats: int, bar: Callable[..., Any]) -> dict:
    results: dict[str, dict[str, dict]] = {}
    for case, make in bar(bilevel.PROBLEMS.items(), desc="hypergradients"):
        problem = make()
        rows: dict[str, dict] = {}
        calls = {}
        for name, (module, prepare) in bilevel.CONTENDERS.items():
            if module not in present:
                continue
            ticks: list[None] = []
            try:
                found = quietly(prepare(problem, partial(ticks.append, None)))()
                known = problem.known(found.w)
                if known is None:
                    rows[name] = {"failed": "found no stationary point"}
                    continue
                calls[name] = quietly(prepare(problem, None))
                rows[name] = {
                    "evaluations": len(ticks),
                    "products": found.products,
                    "residual": bilevel.stationarity(problem, found.w),
                    "gradient_error": relative_error(found.grad, known),
                }
            except Exception as raised:  # a peer's failure is a result
                rows[name] = {"failed": type(raised).__name__}
                calls.pop(name, None)
        for name, seconds in interleaved(calls, repeats=repeats).items():
            rows[name]["seconds"] = seconds
        results[case] = rows
    return results


def measure(*, quick: bool, bar: Callable[..., Any]) -> dict:
    """Every case with every contender that is installed; ``quick``: one repeat."""
    present = {name for name in PEERS if importable(name)} | {"implicitopt"}
    repeats = 1 if quick else 15
    return {
        "absent": [name for name in PEERS if name not in present],
        "equilibria": measure_equilibria(present=present, repeats=repeats, bar=bar),
        "hypergradients": measure_hypergradients(present=present, repeats=repeats, bar=bar),
    }


def table(results: dict) -> str:
    """Two Markdown tables; time over implicitopt's in the same run (its default's)."""
    lines = [
        "| equilibrium | solver | evaluations to tol | in all | residual | gradient error | time |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for case, rows in results["equilibria"].items():
        for name, row in rows.items():
            cells = cells_of(row, rows, ("to_tol", "in_all"))
            lines.append(f"| {case} | {name} | {cells} |")
    lines += [
        "",
        "| hypergradient | solver | evaluations | products | residual | gradient error | time |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for case, rows in results["hypergradients"].items():
        for name, row in rows.items():
            cells = cells_of(row, rows, ("evaluations", "products"))
            lines.append(f"| {case} | {name} | {cells} |")
    if results["absent"]:
        lines += ["", f"Not installed here: {', '.join(results['absent'])}."]
    return "\n".join(lines)


def cells_of(row: dict, rows: dict[str, dict], counts: tuple[str, str]) -> str:
    if "failed" in row:
        return f"failed: {row['failed']} | | | | "
    first = next(iter(rows.values()))
    shown = ["–" if row[key] is None else str(row[key]) for key in counts]
    shown += [f"{row['residual']:.0e}", f"{row['gradient_error']:.0e}"]
    return " | ".join([*shown, f"{row['seconds'] / first['seconds']:.2f}"])
