"""How many sweeps each solver needs, over families of problems: ``python -m benchmarks.sweeps``.

Counts sweeps to a relative KKT residual of 1e-6 in float64, 32 problems a family, at most 300
sweeps. Options: ``--quick`` (five families), ``--quiet`` (no progress), ``--json FILE``.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import implicitopt
from benchmarks.families import Problem, families
from benchmarks.paper import paper
from implicitopt import SQP, Adaptive, Anderson, Broyden, Joint, OneShot

TOL, MAX_STEPS = 1e-6, 300

SOLVERS: dict[str, Callable[[], Any]] = {
    "Adaptive (default)": Adaptive,
    "SQP": SQP,
    "Joint": Joint,
    "OneShot": OneShot,
    "paper": lambda: paper(damped=False),
    "paper, damped": lambda: paper(damped=True),
    "Joint, Anderson II": lambda: Joint(Anderson("II")),
    "Joint, Broyden": lambda: Joint(Broyden("good")),
}

#: family -> solver -> sweeps of each problem, None where MAX_STEPS were not enough
Counts = dict[str, dict[str, list[int | None]]]


def count(problem: Problem, solver: Any) -> list[int | None]:
    """Sweeps to TOL of each problem of a family."""
    with torch.no_grad():
        sol = implicitopt.solve(*problem, solver=solver, tol=TOL, max_steps=MAX_STEPS)
    pairs = zip(sol.steps.tolist(), sol.converged.tolist(), strict=True)
    return [steps if converged else None for steps, converged in pairs]


def measure(*, quick: bool, progress: bool) -> Counts:
    """Every family with every solver."""
    counts: Counts = {}
    for family, make in families(quick=quick).items():
        counts[family] = {}
        for name, solver in SOLVERS.items():
            counts[family][name] = count(make(), solver())
            if progress:
                print(f"{family:28} {name:20} {cell(counts[family][name])}", file=sys.stderr)
    return counts


def cell(sweeps: list[int | None]) -> str:
    """'median / worst / unsolved', the first two over all problems; – where not reached."""
    ranked = sorted(math.inf if n is None else n for n in sweeps)
    middle, worst = ranked[(len(ranked) - 1) // 2], ranked[-1]
    shown = ["–" if n == math.inf else str(n) for n in (middle, worst)]
    return f"{shown[0]:>3} / {shown[1]:>3} / {sum(n is None for n in sweeps):2}"


def geometric_mean(counts: Counts, solver: str) -> float:
    """Over all problems of all families; an unsolved problem counts MAX_STEPS."""
    logs = [math.log(MAX_STEPS if n is None else n) for row in counts.values() for n in row[solver]]
    return math.exp(sum(logs) / len(logs))


def share_within(counts: Counts, solver: str, factor: float) -> float:
    """Of all problems, those that it solves in ``factor`` times the fewest sweeps of any solver."""
    good = total = 0
    for row in counts.values():
        for at, sweeps in enumerate(row[solver]):
            fewest = min((n for each in row.values() if (n := each[at]) is not None), default=0)
            good += sweeps is not None and sweeps <= factor * fewest
            total += 1
    return good / total


def table(counts: Counts) -> str:
    """The counts as a Markdown table."""
    rows = [["median / worst / unsolved", *SOLVERS]]
    rows += [[family, *(cell(row[name]) for name in SOLVERS)] for family, row in counts.items()]
    unsolved = [sum(row[name].count(None) for row in counts.values()) for name in SOLVERS]
    total = sum(len(row[next(iter(SOLVERS))]) for row in counts.values())
    rows.append([f"unsolved of {total}", *map(str, unsolved)])
    means = [f"{geometric_mean(counts, name):.1f}" for name in SOLVERS]
    rows.append(["geometric mean", *means])
    shares = [f"{100 * share_within(counts, name, 1.25):.1f}" for name in SOLVERS]
    rows.append(["% within 1.25 × the fewest", *shares])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(
            text.ljust(width) if at == 0 else text.rjust(width)
            for at, (text, width) in enumerate(zip(row, widths, strict=True))
        ) + " |"
        for row in rows
    ]  # fmt: skip
    rule = "|" + "|".join(
        "-" * (width + 2) if at == 0 else "-" * (width + 1) + ":" for at, width in enumerate(widths)
    )
    return "\n".join([lines[0], rule + "|", *lines[1:]])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sweeps", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="five families only")
    parser.add_argument("--quiet", action="store_true", help="no line for each measurement")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every count to FILE")
    options = parser.parse_args()
    counts = measure(quick=options.quick, progress=not options.quiet)
    if options.json:
        options.json.write_text(json.dumps(counts, indent=1, ensure_ascii=False), encoding="utf-8")
    print(table(counts))


if __name__ == "__main__":
    main()
