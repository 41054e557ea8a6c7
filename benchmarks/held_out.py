"""What each solver makes of 64 held-out digits: ``python -m benchmarks.held_out``.

The quickstart's decoder and the first tutorial's, codes from 0, with 20 to 100 sweeps: mean, median
and largest loss at the codes' true equilibria, and how many are more than half above the lowest
loss of any solver. A median over a few images hides what this shows: a solver that is fast on most
and lost on some.

Options: ``--out FOLDER``, where the quickstart's decoder is, or is put once it is trained (the
other is trained each time, in a minute); ``--quiet``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor
from tqdm import tqdm

import implicitopt
from benchmarks.decoders import digits, of_tutorial
from benchmarks.problems import Setting
from benchmarks.profile import losses
from implicitopt import SQP, Adaptive, Joint, OneShot

__all__ = ["measure", "table"]

BUDGETS = (20, 40, 100)
SOLVERS: dict[str, Callable[[], Any]] = {
    "default": Adaptive, "SQP": SQP, "Joint": Joint, "OneShot": OneShot,
}  # fmt: skip


@torch.no_grad()
def measure(setting: Setting, *, bar: Callable[..., Any]) -> dict[str, Tensor]:
    """Solver and budget -> the loss of each problem at its input's true equilibrium."""
    found = {}
    for name in bar(SOLVERS, desc="held-out digits"):
        for steps in BUDGETS:
            sol = implicitopt.solve(*setting.arguments, solver=SOLVERS[name](), max_steps=steps)
            found[f"{name}, {steps}"] = losses(setting, sol.x)
    return found


def table(found: dict[str, Tensor]) -> str:
    """A row per solver and budget."""
    lowest = torch.stack([*found.values()]).amin(dim=0)
    rows = [
        [name, *(f"{v:.3f}" for v in (row.mean(), row.median(), row.max())),
         f"{int((row > 1.5 * lowest).sum())} of {len(row)}"]
        for name, row in found.items()
    ]  # fmt: skip
    header = ["solver, sweeps", "mean loss", "median", "largest", "half above the lowest"]
    return tabulate(rows, header, tablefmt="github", disable_numparse=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.held_out", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("out/benchmarks"), help="the decoder's")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    options = parser.parse_args()
    torch.set_num_threads(1)
    bar = partial(tqdm, disable=options.quiet, leave=False)
    decoders = {
        "quickstart": digits(options.out, steps=170, bar=bar, count=64),
        "first tutorial": of_tutorial(),
    }
    for name, arguments in decoders.items():
        print(f"The {name}'s decoder:\n\n{table(measure(Setting(arguments, None), bar=bar))}\n")


if __name__ == "__main__":
    main()
