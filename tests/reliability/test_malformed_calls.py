"""Every malformed call ends in a right result or in an exception that says what to do."""

from collections import Counter

import pytest
import torch

from implicitopt import Box, Implicit, L2Ball, Simplex, fixed_point, jacobian_penalty, kkt, solve
from tests.reliability import malformed
from tests.reliability.malformed import Wrong, kind_of, run


def make(numbers: range) -> Counter[str]:
    wrong, counts = [], Counter()
    for number in numbers:
        try:
            name, ended, _ = run(number)
            counts[name] += 1
            counts[ended] += 1
        except Wrong as error:
            wrong.append(str(error))
    assert not wrong, "\n".join(wrong)
    return counts


def test_malformed_calls():
    counts = make(range(200))
    assert min(counts[name] for name in malformed.CALLS) >= 3
    assert counts["refused with a remedy"] > 50
    assert counts["CONVERGED"] > 10


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
def test_thousands_of_malformed_calls(part):
    make(range(500 * part, 500 * (part + 1)))


def test_the_judge_sees_a_wrong_gradient_and_a_false_claim(monkeypatch):
    plain = kkt.KKT.lagrangian
    monkeypatch.setattr(kkt.KKT, "lagrangian", lambda self, point: 1.01 * plain(self, point))
    with pytest.raises(AssertionError, match="envelope gradient"):
        make(range(60))
    monkeypatch.undo()
    monkeypatch.setattr(kkt.Residuals, "total", property(lambda r: 0.1 * (r.z + r.mu + r.x)))
    with pytest.raises(AssertionError, match="CONVERGED at a KKT residual"):
        make(range(60))


def test_the_judge_sees_an_exception_that_was_not_meant(monkeypatch):
    monkeypatch.setattr(kkt, "norm", lambda rows: rows.no_such_method())
    with pytest.raises(AttributeError) as caught:
        solve(f, loss, X)
    with pytest.raises(Wrong, match="not raised on purpose"):
        kind_of(caught.value)


X = torch.zeros(3, 2, dtype=torch.float64)


def f(z, x):
    return torch.tanh(0.5 * z + x)


def loss(z, x):
    return ((z - 0.3) ** 2).sum(-1) + 0.01 * x.square().sum(-1)


def later(odd, plain=f, sound=5):
    """A function that is sound at its first calls."""
    calls = 0

    def state_map(z, x):
        nonlocal calls
        calls += 1
        return plain(z, x) if calls <= sound else odd(z, x)

    return state_map


def inference(x):
    with torch.inference_mode():
        return x.clone()


#: What these calls did before is in the comments.
MENDED = {
    "f of another shape later on": (  # broadcast against z: another equilibrium
        lambda: solve(later(lambda z, x: f(z, x).sum(-1, True)), loss, X),
        ValueError, r"f\(z, x\) must keep its structure and shapes .* got \[\(3, 1\)\]",
    ),
    "a loss of another shape later on": (  # a RuntimeError of torch's
        lambda: solve(f, later(lambda z, x: z, loss), X), ValueError, "loss.* must return 3 values",
    ),
    "f that writes on x later on": (  # wrote on the x of the user
        lambda: fixed_point(
            later(lambda z, x: f(z, x.add_(1)), sound=3), X.clone(), max_steps=50, tol=0.0
        ),
        ValueError, "it changed z or x in place",
    ),
    "the penalty of an f without a gradient": (  # a RuntimeError of torch's
        lambda: jacobian_penalty(lambda z, x: f(z, x).detach(), X, X),
        ValueError, "must be differentiable",
    ),
    "the penalty of an f of another shape": (  # a number
        lambda: jacobian_penalty(lambda z, x: f(z, x)[:1], X, X), ValueError, "shaped like z",
    ),
    "the penalty of an f that writes on x": (  # wrote on the x of the user
        lambda: jacobian_penalty(lambda z, x: f(z, x.add_(1)), X, X.clone()),
        ValueError, "it changed z or x in place",
    ),
    "the projection of what is sparse": (  # a RuntimeError of torch's
        lambda: L2Ball(1.0)(X.to_sparse()), TypeError, "x must be dense; got layout",
    ),
    "the projection of float8": (  # likewise
        lambda: L2Ball(1.0)(X.to(torch.float8_e4m3fn)), TypeError, "got a torch.float8_e4m3fn",
    ),
    "a total that float32 does not hold": (  # a RuntimeError of torch's
        lambda: Simplex(1e300)(X.float()), ValueError, "finite in torch.float32",
    ),
    "a projection that was not made": (  # an L2Ball where x should be
        lambda: solve(f, loss, X, project=L2Ball), TypeError, r"or an object such as L2Ball\(1.0\)",
    ),
    "a preconditioner that returns nothing": (  # an AttributeError
        lambda: solve(
            f, loss, X.clone() + 0 * X, adjoint=Implicit(precondition=lambda v: None)
        ).x.sum().backward(),
        TypeError, "precondition must return a tensor shaped like",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MENDED)
def test_what_was_accepted_or_failed_obscurely_is_refused(name):
    call, kind, message = MENDED[name]
    with pytest.raises(kind, match=message):
        call()


def test_a_bound_beyond_the_dtype_is_no_bound():
    x = torch.tensor([[2.0, -3.0]])
    assert torch.equal(Box(-1.0, 1e300)(x), torch.tensor([[2.0, -1.0]]))


def test_tensors_of_inference_mode_are_inputs():
    x = inference(X + 1)
    W = torch.full((2, 2), 0.3, dtype=torch.float64, requires_grad=True)
    z = fixed_point(lambda z, x: torch.tanh(0.5 * z + x @ W), x)
    penalty = jacobian_penalty(lambda z, x: torch.tanh(z @ W + x @ W), x, x)
    for out in (z, penalty):
        (grad,) = torch.autograd.grad(out.sum(), W)
        assert grad.norm() > 1e-3
