"""The most memory that a solve holds at once, over a bare sweep's.

Bytes of tensors as torch's profiler sees them allocated and freed on the CPU; a bare sweep is as in
``benchmarks.overhead``. "vectors over" is the difference in states, (z, μ, x) of the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from tabulate import tabulate
from torch.profiler import ProfilerActivity, profile

from benchmarks.bare import bare
from benchmarks.clock import one_thread
from benchmarks.overhead import SOLVERS, mdeq
from implicitopt import OneShot
from implicitopt.iteration import iterate
from implicitopt.select import Best
from implicitopt.solve import _prepare

__all__ = ["measure", "peak", "table"]

KINDS = {**SOLVERS, "OneShot(4, 4)": lambda: OneShot(memory=4, inner_memory=4)}
STEPS = 45  # so that every window is full


def peak(call: Callable[[], object]) -> int:
    """Bytes on top of those held when the call begins."""
    call()  # what is made once is not counted
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        call()
    events = watched.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    now = most = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most


@torch.no_grad()
def measure(*, quick: bool, bar: Callable[..., Any]) -> dict[str, Any]:
    """Megabytes of a state and of a bare sweep, and per solver its ratio and vectors over."""
    with one_thread():
        kkt, start, _ = _prepare(*mdeq(4 if quick else 16, 16), None, False, None)
        state = sum(block.numel() * block.element_size() for block in start)
        sweep = peak(partial(bare, kkt, start))
        found: dict[str, Any] = {"state, MB": state / 1e6, "bare sweep, MB": sweep / 1e6}
        for name, make in bar(KINDS.items(), desc="memory"):
            solve = partial(iterate, kkt, start=start, max_steps=STEPS, tol=0, rule=Best())
            most = peak(lambda make=make, solve=solve: solve(make()))  # type: ignore[misc]
            found[name] = {
                "over a bare sweep": most / sweep,
                "vectors over": (most - sweep) / state,
            }
        return found


def table(found: dict[str, Any]) -> str:
    """A row per solver."""
    rows = [
        [name, f"{row['over a bare sweep']:.2f}", f"{row['vectors over']:.1f}"]
        for name, row in found.items()
        if isinstance(row, dict)
    ]
    sizes = f"a state {found['state, MB']:.2f} MB, a bare sweep {found['bare sweep, MB']:.1f} MB"
    header = [sizes, "peak over a bare sweep's", "vectors over"]
    return tabulate(rows, header, tablefmt="github", disable_numparse=True)
