"""What one hard problem costs a batch of 64, with and without ``solve(..., subset=...)``.

An untrained MDEQ decoder's own images are easy targets where codes are held short. The hard one is
noise, matched in the 1-norm, whose kinks keep it from its tolerance: it makes ten times the sweeps
of the others, and ends there. The solver is the joint iteration, then descent. The time of the
batch with it over that of the batch without is shown, in turn, medians.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from tabulate import tabulate

import implicitopt
from benchmarks.clock import now
from benchmarks.decoders import examples_module
from implicitopt import Adaptive, Joint

__all__ = ["measure", "table"]

TOL = 1e-3
#: What the hard one makes of the others' sweeps.
TIMES = 10

#: Of the decoders' images: what a sweep of one problem costs beside one of 64 depends on it.
SIDES = (16, 28)


def measure(*, quick: bool, bar: Callable[..., Any]) -> list[dict[str, float]]:
    """Per decoder the sweeps of both batches, and the times' ratios."""
    return [
        _measure(side, 8 if quick else 64, 1 if quick else 5, bar)
        for side in (SIDES[:1] if quick else SIDES)
    ]


@torch.no_grad()
def _measure(side: int, batch: int, repeats: int, bar: Callable[..., Any]) -> dict[str, float]:
    torch.manual_seed(0)
    decoder = examples_module("mdeq").Decoder(32, (1, side), (16, 32)).requires_grad_(False)
    codes = 0.5 * torch.randn(batch, 32)
    easy = decoder.image(
        implicitopt.fixed_point(decoder.f, codes, decoder.start, max_steps=300, tol=1e-5)
    )

    def run(target: torch.Tensor, noise: torch.Tensor, steps: int, leave: bool) -> Any:
        def of(rows: torch.Tensor) -> tuple[Any, Any]:
            goal, kinked = target[rows], noise[rows]

            def loss(z: Any, x: torch.Tensor) -> torch.Tensor:
                off = (decoder.image(z) - goal).flatten(1)
                misfit = torch.where(kinked[:, None], 10 * off.abs(), off**2).sum(1)
                return misfit + torch.where(kinked, 1e-4, 2.0) * (x**2).sum(1)

            return decoder.f, loss

        begin = now()
        sol = implicitopt.solve(
            *of(torch.arange(len(target))), torch.zeros(len(target), 32), decoder.start,
            tol=TOL, max_steps=steps, subset=of if leave else None, solver=Adaptive(Joint()),
        )  # fmt: skip
        return sol, now() - begin

    none, last = torch.zeros(batch, dtype=torch.bool), torch.arange(batch) == batch - 1
    sweeps = int(run(easy, none, 300, False)[0].steps.max())
    hard = torch.cat([easy[:-1], torch.rand_like(easy[-1:])])
    ratios: dict[str, list[float]] = {"all stay": [], "finished leave": []}
    for _ in bar(range(repeats), desc="stragglers"):
        base = run(easy, none, TIMES * sweeps, False)[1]
        for name, leave in (("all stay", False), ("finished leave", True)):
            sol, seconds = run(hard, last, TIMES * sweeps, leave)
            ratios[name].append(seconds / base)
    steps = sol.steps
    return {
        "batch": batch,
        "states": decoder.cell.flatten(decoder.start(codes[:1])).shape[1],
        "sweeps without": sweeps,
        "sweeps of the hard one": int(steps[-1]),
        "sweeps of the others": int(steps[:-1].max()),
        **{name: median(each) for name, each in ratios.items()},
    }


def table(found: list[dict[str, float]]) -> str:
    """A row per decoder."""
    rows = [[f"{v:.2f}" if isinstance(v, float) else v for v in row.values()] for row in found]
    return tabulate(rows, list(found[0]), tablefmt="github", disable_numparse=True)
