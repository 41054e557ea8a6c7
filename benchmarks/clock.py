"""Times that can be compared: several calls measured in turn, in one run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch

__all__ = ["interleaved", "now", "one_thread"]


def now() -> float:
    """A clock: CPU time where there is one thread, which other load does not add to; else time."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread, whatever the caller has."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def interleaved(calls: Mapping[str, Callable[[], object]], *, repeats: int) -> dict[str, float]:
    """Median seconds of each call: one unmeasured round, then ``repeats`` rounds of all of them.

    Each round begins with another call, so that a machine that slows down favours none.
    """
    names = list(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    for name in names:
        calls[name]()
    for at in range(repeats):
        first = at % len(names)
        for name in names[first:] + names[:first]:
            start = time.perf_counter()
            calls[name]()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds) for name, seconds in times.items()}
