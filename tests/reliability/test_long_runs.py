"""Thousands of solves in one process: its memory does not grow."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from implicitopt import FrozenInput, Implicit, L2Ball, OneShot, fixed_point, jacobian_penalty, solve

STATM = Path("/proc/self/statm")
ROOT = Path(__file__).parents[2]


def resident() -> int:
    """Pages of memory in use now."""
    return int(STATM.read_text(encoding="utf-8").split()[1])


def work(k: int) -> None:
    """A call as a training step makes it, every eighth alike; each frees all that it made."""
    batch = 1 + k % 5
    W = torch.full((16, 16), 0.03, requires_grad=True)

    def f(z, x):
        return torch.tanh(z @ W + x)

    def loss(z, x):
        return (z - 0.3).square().sum(-1) + 0.1 * x.square().sum(-1)

    x0 = torch.zeros(batch, 16)
    options = (
        {},
        {"adjoint": Implicit(max_steps=5)},
        {"adjoint": FrozenInput(max_steps=5)},
        {"solver": OneShot()},
        {"project": L2Ball(0.1)},
        {"history": True, "sample_iterate": True},
    )
    kind = k % 8
    if kind == 6:
        fixed_point(f, x0, max_steps=4).sum().backward()
    elif kind == 7:
        jacobian_penalty(f, x0, x0).sum().backward()
    else:
        sol = solve(f, loss, x0, max_steps=4, **options[kind])
        (sol.z.sum() if "adjoint" in options[kind] else sol.value.sum()).backward()


def growth(count: int, before: int) -> float:
    """The share by which resident memory grows in ``count`` calls, after ``before`` others."""
    import warnings

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for k in range(before):
        work(k)
    start = resident()
    for k in range(count):
        work(k)
    return resident() / start - 1


def growth_of_a_process(count: int, before: int) -> float:
    code = (
        "from tests.reliability.test_long_runs import growth; "
        f"print('growth', growth({count}, {before}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return float(done.stdout.split()[-1])


linux = pytest.mark.skipif(not STATM.exists(), reason="/proc tells the memory in use")


@linux
@pytest.mark.slow
def test_memory_is_flat_over_ten_thousand_solves():
    assert growth_of_a_process(10_000, 1000) <= 0.02
