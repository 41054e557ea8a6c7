"""The histories of one-shot descent against dense BFGS updates and least squares."""

from __future__ import annotations

import pytest
import torch
from families import F64
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from implicitopt.solvers.secants import Secants


def bfgs_inverse(pairs: list[tuple[Tensor, Tensor]], scale: float, d: int) -> Tensor:
    """H after the updates of the pairs, oldest first, from the scaled identity."""
    if pairs:
        s, y = pairs[-1]
        scale = (s @ y / (y @ y)).item()
    H, eye = scale * torch.eye(d, dtype=F64), torch.eye(d, dtype=F64)
    for s, y in pairs:
        rho = 1 / (s @ y)
        H = (eye - rho * s.outer(y)) @ H @ (eye - rho * y.outer(s)) + rho * s.outer(s)
    return H


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    memory=st.integers(1, 6),
    pushes=st.integers(0, 12),
    d=st.integers(2, 9),
)
def test_the_quasi_newton_step_is_that_of_dense_bfgs(seed, memory, pushes, d):
    """Each problem has taken in other pairs, and one has forgotten what it had."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=F64, generator=generator)

    batch = 4
    root = normal(d, d)
    hessian = root @ root.T / d + torch.eye(d, dtype=F64)
    zero = torch.zeros(batch, d, dtype=F64)
    secants = Secants.empty(memory, zero, zero)
    kept: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(batch)]
    for push in range(pushes):
        if push == 5:
            secants.clear(torch.arange(batch) == 0)
            kept[0] = []
        old, new = normal(batch, d), normal(batch, d)
        mask = torch.rand(batch, generator=generator) < 0.7
        secants.push(mask, (new, old), (new @ hessian, old @ hessian))
        for at in mask.nonzero()[:, 0].tolist():
            s = new[at] - old[at]
            kept[at] = [*kept[at], (s, hessian @ s)][-memory:]
    g, scale = normal(batch, d), torch.linspace(0.1, 2, batch, dtype=F64)
    found = secants.quasi_newton(g, scale)
    for at in range(batch):
        expected = -bfgs_inverse(kept[at], scale[at].item(), d) @ g[at]
        torch.testing.assert_close(found[at], expected, rtol=1e-7, atol=1e-7)


@settings(deadline=None)
@given(seed=st.integers(0, 2**32 - 1), pushes=st.integers(1, 7))
def test_what_follows_x_linearly_is_predicted(seed, pushes):
    generator = torch.Generator().manual_seed(seed)
    batch, d, n = 3, 5, 8
    follow = torch.randn(d, n, dtype=F64, generator=generator)
    secants = Secants.empty(4, torch.zeros(batch, d, dtype=F64), torch.zeros(batch, n, dtype=F64))
    steps = torch.randn(pushes, batch, d, dtype=F64, generator=generator)
    everyone = torch.ones(batch, dtype=torch.bool)
    for step in steps:
        secants.push(everyone, (step, 0 * step), (step @ follow, 0 * step @ follow))
    seen = steps[-4:].transpose(0, 1)  # (B, at most 4, d)
    weights = torch.randn(batch, 1, seen.shape[1], dtype=F64, generator=generator)
    dx = (weights @ seen)[:, 0]  # within what was seen
    (found,) = secants.predict(dx)
    size = (dx @ follow).norm()
    assert (found - dx @ follow).norm() <= 1e-2 * size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_steps_are_as_exact_under_autocast_and_from_narrow_pairs(dtype):
    """Products of matrices that autocast, or a narrow dtype, rounded would spoil the curvature."""
    torch.manual_seed(0)
    old, new = torch.randn(2, 6, 3, 8).to(dtype)
    narrow, wide = (Secants.empty(4, *2 * [torch.zeros(3, 8, dtype=t)]) for t in (dtype, F64))
    for a, b in zip(old, new, strict=True):
        dg = (3 * (b - a)).to(dtype)
        for secants in (narrow, wide):
            kind = secants.rings[0].dtype
            pair = (((b - a).to(kind), 0 * a.to(kind)), (dg.to(kind), 0 * a.to(kind)))
            secants.push(torch.ones(3, dtype=torch.bool), *pair)
    g, scale = torch.randn(3, 8).to(dtype), torch.ones(3)
    with torch.autocast("cpu", torch.bfloat16):
        found = narrow.quasi_newton(g, scale)
    expected = wide.quasi_newton(g.double(), scale.double())
    rounding = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), expected, rtol=rounding, atol=rounding)


def test_nothing_seen_predicts_nothing_and_steps_down_the_gradient():
    x = torch.ones(2, 3, dtype=F64)
    secants = Secants.empty(4, x, x)
    assert torch.equal(
        secants.quasi_newton(x, torch.tensor([0.5, 2.0])), -x * x.new_tensor([[0.5], [2.0]])
    )
    assert torch.equal(secants.predict(x)[0], 0 * x)
