"""What a solver's few sweeps a visit make of a decoder: ``python -m benchmarks.training``.

The quickstart's decoder is trained by ten sweeps of the joint iteration a visit, by ten of SQP, and
by six, which take as long. Its judge is the error per pixel of 64 held-out digits, whose codes the
default solver finds in 60 sweeps. Mean over the seeds, and each of them.

Options: ``--seeds N`` (default 4; a minute and a half each), ``--steps N``, ``--quiet``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from statistics import fmean
from typing import Any, NamedTuple

import torch
from tabulate import tabulate
from tqdm import tqdm

from benchmarks.clock import now
from benchmarks.decoders import LATENT, examples_module
from implicitopt import SQP, Joint

__all__ = ["Trained", "measure", "table"]

RUNS: dict[str, tuple[Callable[[], Any], int]] = {
    "Joint, 10": (Joint, 10), "SQP, 10": (SQP, 10), "SQP, 6": (SQP, 6),
}  # fmt: skip


class Trained(NamedTuple):
    seconds: float  #: of the process, for training
    error: float  #: per pixel of held-out digits


def measure(seeds: int, steps: int, *, bar: Callable[..., Any]) -> dict[str, list[Trained]]:
    """Solver and sweeps -> one decoder a seed."""
    found: dict[str, list[Trained]] = {name: [] for name in RUNS}
    for seed in bar(range(seeds), desc="training"):
        for name, (solver, sweeps) in RUNS.items():
            found[name].append(_trained(seed, steps, sweeps, solver(), bar))
    return found


def _trained(seed: int, steps: int, sweeps: int, solver: Any, bar: Callable[..., Any]) -> Trained:
    quickstart = examples_module("quickstart")
    torch.manual_seed(seed)
    images, held_out = quickstart.digits(seed)
    model = quickstart.Decoder(LATENT)
    begin = now()
    quickstart.train(model, images, steps, 64, 1e-2, bar, sweeps=sweeps, solver=solver)
    seconds, held_out = now() - begin, held_out[:64]
    found = quickstart.recover(model.requires_grad_(False), held_out)
    return Trained(seconds, (found - held_out).square().mean().item())


def table(found: dict[str, list[Trained]]) -> str:
    """A row per solver and number of sweeps."""
    rows = [
        [name, f"{fmean([t.seconds for t in each]):.0f}", f"{fmean([t.error for t in each]):.4f}",
         ", ".join(f"{t.error:.4f}" for t in each)]
        for name, each in found.items()
    ]  # fmt: skip
    header = ["solver, sweeps a visit", "seconds", "held-out error", "of each seed"]
    return tabulate(rows, header, tablefmt="github", disable_numparse=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__)
    parser.add_argument("--seeds", type=int, default=4, help="decoders each (default %(default)s)")
    parser.add_argument("--steps", type=int, default=170, help="of training (default %(default)s)")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    options = parser.parse_args()
    torch.set_num_threads(1)
    bar = partial(tqdm, disable=options.quiet, leave=False)
    print(table(measure(options.seeds, options.steps, bar=bar)))


if __name__ == "__main__":
    main()
