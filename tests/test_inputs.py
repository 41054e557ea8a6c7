"""A wrong input is refused at once, with what was expected, what came and what to do."""

import re
import sys
from functools import partial

import pytest
import torch

import implicitopt
from implicitopt import WarmStart, fixed_point, solve
from implicitopt.inputs import check_warm_start

B, N = 4, 2
NAN, INF = float("nan"), float("inf")


def f(z, x):
    return torch.tanh(0.5 * z + x)


def loss(z, x):
    return (z - 0.3).square().sum(-1) + 0.1 * x.square().sum(-1)


def zeros(*shape, dtype=torch.float64, device="cpu"):
    return torch.zeros(*shape, dtype=dtype, device=device)


def silent(function):
    """The function under no_grad, as a decorator forgotten somewhere."""
    return torch.no_grad()(function)


def at(index, value):
    x = zeros(B, N)
    x[index] = value
    return x


def earlier(x=None, **options):
    """A solution to start from."""
    return solve(f, loss, zeros(B, N) if x is None else x, max_steps=3, **options)


class Duck:
    """Has the methods of no protocol here."""


X0, Z0 = zeros(B, N), zeros(B, N)
META = zeros(B, N, device="meta")

# id, arguments of solve that differ from a good call, exception, then patterns that the message
# must match: what was expected, what came, what to do.
BAD = [
    # f and loss
    ("f is no function", {"f": 3}, TypeError, r"f must be callable as f\(z, x\)", "got 3", ""),
    ("loss is no function", {"loss": None}, TypeError, "loss must be callable", "got None", ""),
    ("f changes shape", {"f": lambda z, x: z[:, :1], "z0": Z0}, ValueError,
     r"shaped like z: expected \(4, 2\)", r"got \(4, 1\)", "return its next state, or pass a z0"),
    ("f broadcasts z", {"z0": zeros(1, N)}, ValueError,
     r"shaped like z: expected \(1, 2\)", r"got \(4, 2\)", "pass a z0 of that shape"),
    ("f returns nothing", {"f": lambda z, x: None, "z0": Z0}, ValueError,
     "return a state shaped like z", "got NoneType", "Make f return its next state"),
    ("f returns a number", {"f": lambda z, x: 1.0, "z0": Z0}, ValueError,
     "return a state shaped like z", "got float", "Make f return its next state"),
    ("f returns a tuple", {"f": lambda z, x: (f(z, x), 1), "z0": Z0}, ValueError,
     r"expected \(4, 2\)", r"got \(\(4, 2\), 'int'\)", "Make f return its next state"),
    ("f returns other keys", {
        "f": lambda z, x: {"b": z["a"]}, "loss": lambda z, x: loss(z["a"], x), "z0": {"a": Z0},
     }, ValueError, r"expected \{'a': \(4, 2\)\}", r"got \{'b': \(4, 2\)\}", "return its next"),
    ("f returns a list for a tuple", {
        "f": lambda z, x: [f(z[0], x)], "loss": lambda z, x: loss(z[0], x), "z0": (Z0,),
     }, ValueError, r"expected \(\(4, 2\),\)", r"got \[\(4, 2\)\]", "return its next state"),
    ("f changes dtype", {"f": lambda z, x: f(z, x).float()}, TypeError,
     "keep the dtype of z, torch.float64", "got torch.float32", "Convert the model"),
    ("f changes device", {"f": lambda z, x: f(z, x).to("meta")}, ValueError,
     "stay on the device of z, cpu", "got meta", r"\.to\('cpu'\)"),
    ("f has no gradient", {"f": silent(f)}, ValueError,
     "must be differentiable in z or x", "carries no gradient", r"Remove torch.no_grad\(\)"),
    ("f ignores both", {"f": lambda z, x: torch.ones_like(z)}, ValueError,
     "must be differentiable in z or x", "carries no gradient", "Remove"),
    ("f changes z in place", {"f": lambda z, x: z.mul_(0.5).add(x)}, ValueError,
     "leave its arguments as they are", "changed z in place", "out-of-place"),
    ("f changes x in place", {"f": lambda z, x: z * 0.5 + x.add_(1)}, ValueError,
     "leave its arguments as they are", "changed x in place", "clone x first"),
    ("f changes z through data", {"f": lambda z, x: z.data.add_(1) + z + x}, ValueError,
     "leave its arguments as they are", "changed z in place", "out-of-place"),
    ("f changes z under no_grad", {"f": lambda z, x: silent(z.add_)(1) * 0 + z + x}, ValueError,
     "leave its arguments as they are", "changed z in place", "out-of-place"),
    ("loss changes z in place", {"loss": lambda z, x: z.sub_(0.3).square().sum(-1)}, ValueError,
     "loss must leave its arguments", "changed z in place", "clone z first"),
    ("loss is a float", {"loss": lambda z, x: loss(z, x).sum().item()}, TypeError,
     r"a tensor of shape \(\) or \(4,\)", "got float", r"Leave out \.item\(\)"),
    ("loss keeps a dimension", {"loss": lambda z, x: loss(z, x)[:, None]}, ValueError,
     r"one value per problem, shape \(\) or \(4,\)", r"got \(4, 1\)", "Sum or average"),
    ("loss keeps the entries", {"loss": lambda z, x: z**2}, ValueError,
     r"shape \(\) or \(4,\)", r"got \(4, 2\)", "Sum or average over the other dimensions"),
    ("loss reduces the batch", {"loss": lambda z, x: (z**2).sum(0)}, ValueError,
     "loss returns 2 values, so dim 0 of every leaf of x0 must be 2", r"got shape \(4, 2\)",
     "Return one value per problem"),
    ("x0 has no batch", {
        "x0": zeros(()), "z0": zeros(N), "loss": lambda z, x: z**2 + x**2,
     }, ValueError, r"shape \(\);", r"got \(2,\)", "Sum or average"),
    ("loss is an integer", {"loss": lambda z, x: (z > 0).sum(-1)}, TypeError,
     "loss.* must be floating point", "got torch.int64", "outside of the loss"),
    ("loss is complex", {"loss": lambda z, x: loss(z, x) * 1j}, TypeError,
     "loss.* must be floating point", "got torch.complex128", "convert"),
    ("loss is coarser than x0", {"loss": lambda z, x: loss(z, x).float()}, TypeError,
     "as precise as x0, torch.float64", "got torch.float32", r"\.to\(torch.float64\)"),
    ("loss is elsewhere", {"loss": lambda z, x: loss(z, x).to("meta")}, ValueError,
     "stay on the device of x0, cpu", "got meta", r"\.to\('cpu'\)"),
    ("loss has no gradient", {"loss": silent(loss)}, ValueError,
     "must be differentiable in z or x", "carries no gradient", "Remove torch.no_grad"),
    ("loss is detached", {"loss": lambda z, x: loss(z.detach(), x.detach())}, ValueError,
     "must be differentiable in z or x", "carries no gradient", r"\.detach\(\)"),
    # x0
    ("x0 is missing", {"x0": None}, TypeError,
     "x0 must be a tensor or a pytree of tensors", "NoneType", "close over anything else"),
    ("x0 is a number", {"x0": 1.0}, TypeError,
     "x0 must be a tensor or a pytree", "float", "torch.as_tensor"),
    ("x0 is empty", {"x0": ()}, ValueError, "at least one tensor", r"got \(\)", "Pass a tensor"),
    ("x0 holds a string", {"x0": {"a": X0, "kind": "b"}}, TypeError,
     "x0 must be a tensor or a pytree", "str", "close over anything else"),
    ("x0 is integer", {"x0": torch.zeros(B, N, dtype=torch.int64)}, TypeError,
     "x0 must be floating point", "got torch.int64", r"\.to\(torch.float32\)"),
    ("x0 is boolean", {"x0": torch.zeros(B, N, dtype=torch.bool)}, TypeError,
     "x0 must be floating point", "got torch.bool", r"\.to\(torch.float32\)"),
    ("x0 is complex", {"x0": torch.zeros(B, N, dtype=torch.complex64)}, TypeError,
     "x0 must be floating point", "got torch.complex64", r"\.to\(torch.float32\)"),
    ("x0 is in 8 bits", {"x0": torch.zeros(B, N).to(torch.float8_e5m2)}, TypeError,
     "x0 must be floating point", "got torch.float8_e5m2", r"\.to\(torch.float32\)"),
    ("x0 is sparse", {"x0": X0.to_sparse()}, TypeError,
     "x0 must be dense", "torch.sparse_coo", r"\.to_dense\(\)"),
    ("x0 is of two dtypes", {"x0": (X0, X0.float())}, TypeError,
     "all of x0 must have one dtype", "torch.float64 and torch.float32", "Convert"),
    ("x0 is on two devices", {"x0": (X0, META)}, ValueError,
     "all of x0 must be on one device", "cpu and meta", r"\.to\('cpu'\)"),
    ("x0 holds no data", {"x0": META, "z0": META}, ValueError,
     "x0 must hold numbers", "device meta", "another device"),
    ("x0 is NaN", {"x0": at((2, 1), NAN)}, ValueError,
     "x0 must be finite", r"got nan at x0\[2, 1\]", "Check the data"),
    ("x0 is infinite", {"x0": at((3, 0), -INF)}, ValueError,
     "x0 must be finite", r"got -inf at x0\[3, 0\]", "Check the data"),
    ("a leaf of x0 is NaN", {"x0": {"a": [X0, at((1, 1), NAN)]}, "z0": Z0}, ValueError,
     "x0 must be finite", r"got nan at x0\['a'\]\[1\]\[1, 1\]", "Check the data"),
    ("x0 is of no problem", {"x0": zeros(0, N)}, ValueError,
     "at least one number", r"got shape \(0, 2\)", "Leave out the call"),
    ("x0 has no entries", {"x0": zeros(B, 0), "z0": Z0}, ValueError,
     "x0 must hold at least one number", r"got shape \(4, 0\)", ""),
    ("leaves of x0 disagree", {
        "x0": (X0, zeros(3, N)), "z0": Z0, "f": lambda z, x: f(z, x[0]) + x[1].sum(),
        "loss": lambda z, x: loss(z, x[0]),
     }, ValueError, "every leaf of x0 must be 4", r"got shape \(3, 2\)", "one value per problem"),
    # z0
    ("z0 is missing", {"f": lambda z, x: torch.tanh(z + x.sum(-1, keepdim=True).expand(B, 3))},
     ValueError, r"zeros shaped like x0, \(4, 2\), are no state of f",
     "f raises RuntimeError: The size", "Pass z0.* callable x0 -> z0"),
    ("z0 is missing, f has another shape", {"f": lambda z, x: x.sum(-1)}, ValueError,
     r"zeros shaped like x0, \(4, 2\)", r"f maps it to \(4,\)", "Pass z0"),
    ("z0 is a number", {"z0": 0.0}, TypeError, "z0 must be a tensor", "float", "torch.as_tensor"),
    ("z0 is integer", {"z0": torch.zeros(B, N, dtype=torch.int32)}, TypeError,
     "z0 must be floating point", "got torch.int32", r"\.to\(torch.float32\)"),
    ("z0 has another dtype", {"z0": Z0.float()}, TypeError,
     "z0 and x0 must have one dtype", "torch.float32 and torch.float64", "Convert z0"),
    ("z0 is elsewhere", {"z0": META}, ValueError,
     "z0 and x0 must be on one device", "meta and cpu", r"Move z0 with \.to\('cpu'\)"),
    ("z0 is NaN", {"z0": at((0, 1), NAN)}, ValueError,
     "z0 must be finite", r"nan at z0\[0, 1\]", "Check"),
    ("z0() is NaN", {"z0": lambda x: x + NAN}, ValueError, "z0 must be finite", "nan", "Check"),
    ("z0() returns nothing", {"z0": lambda x: [None]}, TypeError,
     "z0 must be a tensor or a pytree", "NoneType", ""),
    ("z0 has another batch", {
        "z0": zeros(3, N), "f": lambda z, x: f(z, x.mean()),
        "loss": lambda z, x: x.square().sum(-1) + z.sum(),
     }, ValueError,
     "every leaf of z0 must be 4", r"got shape \(3, 2\)", "one value per problem"),
    # project
    ("project is no function", {"project": 1.0}, TypeError,
     "project must be callable or None", "got 1.0", ""),
    ("project changes shape", {"project": lambda x: x[:, :1]}, ValueError,
     r"shaped like x0, \(4, 2\)", r"got \(4, 1\)", "Return the whole of x"),
    ("project returns nothing", {"project": lambda x: None}, ValueError,
     r"shaped like x0, \(4, 2\)", "got NoneType", "Return the whole of x"),
    ("project changes dtype", {"project": lambda x: x.float()}, TypeError,
     r"project\(x0\) and x0 must have one dtype", "torch.float32 and torch.float64", "Convert"),
    ("project is not idempotent", {"project": lambda x: x / 2, "x0": X0 + 1}, ValueError,
     r"project\(project\(x\)\) is project\(x\)", "moved a projected x0 by 2.5e-01", "L2Ball"),
    ("project is not finite", {"project": lambda x: x / 0}, ValueError,
     r"project\(x0\) must be finite", r"got nan at project\(x0\)\[0, 0\]", "Check"),
    ("project changes x in place", {"project": lambda x: x.clamp_(-1, 1), "x0": X0 + 2},
     ValueError, "project must leave its arguments", "changed x in place", "out-of-place"),
    ("radii do not fit", {"project": implicitopt.L2Ball(torch.ones(3))}, ValueError,
     r"radius must have shape \(\) or \(4,\)", r"got \(3,\)", "as many values as x has problems"),
    # options
    ("solver is unknown", {"solver": "newton"}, TypeError,
     "solver must be Adaptive", "'newton'", ""),
    ("solver is a class", {"solver": implicitopt.Joint}, TypeError,
     "solver must be Adaptive", "got <class", ""),
    ("solver is anything", {"solver": Duck()}, TypeError, "solver must be Adaptive", "got <", ""),
    ("adjoint is unknown", {"adjoint": "implicit"}, TypeError,
     r"adjoint must be Envelope\(\)", "'implicit'", ""),
    ("adjoint is a class", {"adjoint": implicitopt.Implicit}, TypeError,
     r"adjoint must be Envelope\(\)", "got <class", ""),
    ("maximize is no bool", {"maximize": "yes"}, TypeError,
     "maximize must be a bool", "got 'yes'", "leave it out for the default"),
    ("throw is no bool", {"throw": 1}, TypeError, "throw must be a bool", "got 1", "leave it out"),
    ("history is no bool", {"history": None}, TypeError, "must be a bool", "got None", "leave"),
    ("sample_iterate is no bool", {"sample_iterate": 3}, TypeError, "a bool", "got 3", "leave"),
    ("max_steps is 0", {"max_steps": 0}, ValueError, "an int of at least 1", "got 0", "leave it"),
    ("max_steps < 0", {"max_steps": -5}, ValueError, "an int of at least 1", "got -5", "leave it"),
    ("max_steps is a float", {"max_steps": 1e2}, TypeError, "an int", "got 100.0", "leave it out"),
    ("max_steps is a bool", {"max_steps": True}, TypeError, "an int", "got True", "leave it out"),
    ("tol < 0", {"tol": -1e-3}, ValueError, "tol must be a float of at least 0", "-0.001", "leave"),
    ("tol is NaN", {"tol": NAN}, ValueError, "a float of at least 0", "got nan", "leave it out"),
    ("tol is a string", {"tol": "1e-3"}, TypeError, "a float", "got '1e-3'", "leave it out"),
    ("select is unknown", {"select": "first"}, ValueError,
     r"select must be one of \['best', 'last', 'paper'\]", "got 'first'", "or a callable"),
    ("select is a class", {"select": implicitopt.Best}, TypeError,
     "select must be one of", "got <class", "or a callable"),
    ("select is None", {"select": None}, TypeError, "select must be one of", "None", "callable"),
    ("callback is no function", {"callback": []}, TypeError,
     "callback must be callable or None", r"got \[\]", ""),
    ("an unknown option", {"max_step": 3}, TypeError, "unexpected keyword", "max_step", ""),
    # warm_start
    ("warm_start is no solution", {"warm_start": X0}, TypeError,
     "warm_start must be a Solution", "got tensor", "WarmStart"),
    ("warm_start's x is a number", {"warm_start": WarmStart(1.0, Z0, Z0)}, TypeError,
     r"warm_start\.x must be a tensor", "float", "as_tensor"),
    ("warm_start's mu is of another kind", {"warm_start": WarmStart(X0, Z0, Z0.float())}, TypeError,
     r"warm_start\.mu and warm_start\.z must have one dtype", "float32", r"\.to\("),
    ("warm_start's z is of another kind", {"warm_start": WarmStart(X0, Z0.float(), Z0.float())},
     TypeError, "z0 and x0 must have one dtype", "float32", r"\.to\("),
]  # fmt: skip


def check_message(call, kind, expected, found, remedy):
    with pytest.raises(kind) as caught:
        call()
    assert type(caught.value) is kind
    message = str(caught.value)
    for pattern in (expected, found, remedy):
        assert re.search(pattern, message, re.DOTALL), f"no {pattern!r} in {message!r}"


@pytest.mark.parametrize(
    ("change", "kind", "expected", "found", "remedy"),
    [pytest.param(*row, id=name) for name, *row in BAD],
)
def test_solve_refuses(change, kind, expected, found, remedy):
    arguments = {"f": f, "loss": loss, "x0": X0.clone()} | change
    check_message(partial(solve, **arguments), kind, expected, found, remedy)


def spoilt():
    """An earlier solution with a problem that is NONFINITE."""
    bad = zeros(B, 1)
    bad[1] = NAN
    return solve(lambda z, x: f(z, x) + bad, loss, X0, max_steps=3)


def single():
    return solve(f, lambda z, x: loss(z, x).sum(), zeros(1, N), max_steps=3)


def other_structure():
    return solve(
        lambda z, x: f(z, x["a"]), lambda z, x: loss(z, x["a"]), {"a": X0}, Z0, max_steps=3
    )


def deeper():
    """Problems of two numbers, as in (B, N), in another shape."""
    return solve(f, lambda z, x: loss(z, x).sum(-1), zeros(B, 1, N), max_steps=3)


WARM = [
    ("another batch", lambda: earlier(zeros(3, N)), r"of x0, \(4, 2\)", r"got \(3, 2\)"),
    ("another width", lambda: earlier(zeros(B, 3)), r"of x0, \(4, 2\)", r"got \(4, 3\)"),
    ("the width in two", deeper, r"\(4, 2\)", r"got \(4, 1, 2\)"),
    ("another dtype", lambda: earlier(X0.float()), "torch.float64", "got .* torch.float32"),
    ("another structure", other_structure, r"of x0, \(4, 2\)", r"got \{'a': \(4, 2\)\}"),
    ("one problem", single, r"of x0, \(4, 2\)", r"got \(1, 2\)"),
    ("a short mu", lambda: WarmStart(X0, Z0, Z0[:2]), r"of warm_start\.z, \(4, ", r"got \(2, "),
    ("NaN", spoilt, r"warm_start\.z must be finite", r"got nan at warm_start\.z\[1, 0\]"),
]
WARM = [pytest.param(*row, id=name) for name, *row in WARM]


@pytest.mark.parametrize(("make", "expected", "found"), WARM)
def test_warm_start_refused(make, expected, found):
    call = partial(check_warm_start, make(), X0)
    check_message(call, ValueError, expected, found, "warm_start.*(Leave it out|Check the data)")


@pytest.mark.parametrize(("make", "expected", "found"), WARM)
def test_solve_refuses_a_warm_start_from(make, expected, found):
    call = partial(solve, f, loss, X0, warm_start=make())
    check_message(call, ValueError, expected, found, "warm_start.*(Leave it out|Check the data)")


def test_warm_start_of_the_same_kind_is_taken():
    before = solve(f, loss, X0)
    check_warm_start(before, X0)
    again = solve(f, loss, X0, warm_start=before)
    assert again.converged.all()
    assert (again.steps < before.steps).all()


FIXED = [
    ("f is no function", {"f": None}, TypeError, "f must be callable", "None", ""),
    ("x is NaN", {"x": at((1, 0), NAN)}, ValueError, "x must be finite", r"x\[1, 0\]", "Check"),
    ("x is integer", {"x": torch.zeros(B, N, dtype=torch.int64)}, TypeError,
     "x must be floating point", "torch.int64", "Convert"),
    ("no problem", {"x": zeros(0, N)}, ValueError, "at least one number", r"\(0, 2\)", "Leave out"),
    ("z0 is missing", {"f": lambda z, x: x.sum(-1)}, ValueError,
     r"zeros shaped like x0?, \(4, 2\)", r"f maps it to \(4,\)", "Pass z0"),
    ("z0 has another dtype", {"z0": Z0.float()}, TypeError, "z0 and x must", "float32", "Convert"),
    ("f changes shape", {"f": lambda z, x: z[:, :1], "z0": Z0}, ValueError,
     r"expected \(4, 2\)", r"got \(4, 1\)", "return its next state"),
    ("f changes z in place", {"f": lambda z, x: z.mul_(0.5).add(x), "z0": Z0}, ValueError,
     "leave its arguments as they are", "changed z in place", "out-of-place"),
    ("f has no gradient", {"f": silent(f)}, ValueError, "differentiable", "no gradient", "Remove"),
    ("max_steps is 0", {"max_steps": 0}, ValueError, "of at least 1", "got 0", "leave it out"),
    ("tol is NaN", {"tol": NAN}, ValueError, "of at least 0", "got nan", "leave it out"),
    ("batched is no bool", {"batched": 1}, TypeError, "must be a bool", "got 1", "leave it out"),
    ("accelerator is a class", {"accelerator": implicitopt.Picard}, TypeError,
     r"object with the methods init\(v\)", "got <class", ""),
    ("accelerator is a name", {"accelerator": "anderson"}, TypeError,
     "object with the methods", "got 'anderson'", ""),
    ("adjoint_tol < 0", {"adjoint_tol": -1.0}, ValueError, "tol", "-1.0", ""),
    ("adjoint_max_steps is 0", {"adjoint_max_steps": 0}, ValueError, "max_steps", "got 0", ""),
    ("an unknown option", {"tolerance": 3}, TypeError, "unexpected keyword", "tolerance", ""),
    ("z0 is one number", {
        "f": lambda z, x: 0.5 * z + x.sum(), "z0": zeros(()), "batched": True,
     }, ValueError, "z0", r"\(\)", "batched=False"),
    ("leaves of z0 disagree", {
        "f": lambda z, x: (0.5 * z[0] + x, 0.5 * z[1] + x.sum()), "z0": (Z0, zeros(3, N)),
     }, ValueError, "z0", r"\(3, 2\)", "batched=False"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "kind", "expected", "found", "remedy"),
    [pytest.param(*row, id=name) for name, *row in FIXED],
)
def test_fixed_point_refuses(change, kind, expected, found, remedy):
    arguments = {"f": f, "x": X0.clone()} | change
    check_message(partial(fixed_point, **arguments), kind, expected, found, remedy)


OPTIONS = [
    (lambda: implicitopt.L2Ball(-1.0), ValueError, "radius must be finite and >= 0; got -1.0"),
    (lambda: implicitopt.LinfBall(NAN), ValueError, "radius must be finite and >= 0; got nan"),
    (lambda: implicitopt.Box(1.0, 0.0), ValueError, "lower must be <= upper"),
    (lambda: implicitopt.Simplex(0.0), ValueError, "total must be finite and > 0; got 0.0"),
    (lambda: implicitopt.Anderson("III"), ValueError, 'must be "I" or "II"; got \'III\''),
    (lambda: implicitopt.Anderson(memory=0), ValueError, "at least 1; got 0"),
    (lambda: implicitopt.Anderson(memory=2.0), TypeError, "must be an int of at least 1; got 2.0"),
    (lambda: implicitopt.Anderson(ridge=NAN), ValueError, "of at least 0 and below 1; got nan"),
    (lambda: implicitopt.Anderson(damping=0), ValueError, "above 0 and at most 1; got 0"),
    (lambda: implicitopt.Anderson(beta=1), TypeError, "unexpected keyword argument 'beta'"),
    (lambda: implicitopt.Broyden("ugly"), ValueError, 'must be "good" or "bad"; got \'ugly\''),
    (lambda: implicitopt.Broyden(memory=0), ValueError, "at least 1; got 0"),
    (lambda: implicitopt.Picard(2.5), ValueError, "above 0 and below 2; got 2.5"),
    (lambda: implicitopt.Picard(NAN), ValueError, "above 0 and below 2; got nan"),
    (lambda: implicitopt.StepSizes(z=0.0), ValueError, "above 0 and at most 1; got 0.0"),
    (lambda: implicitopt.StepSizes(mu=1.5), ValueError, "above 0 and at most 1; got 1.5"),
    (lambda: implicitopt.StepSizes(x=-0.2), ValueError, "must be a float above 0; got -0.2"),
    (lambda: implicitopt.StepSizes(x=NAN), ValueError, "must be a float above 0; got nan"),
    (lambda: implicitopt.StepSizes(y=1), TypeError, "unexpected keyword argument 'y'"),
    (lambda: implicitopt.Joint(implicitopt.Anderson), TypeError, "got <class"),
    (lambda: implicitopt.Joint(steps=0.5), TypeError, "must be StepSizes(...); got 0.5"),
    (lambda: implicitopt.Joint(memory=5), TypeError, "unexpected keyword argument 'memory'"),
    (lambda: implicitopt.Best(small=NAN), ValueError, "must be a float above 0; got nan"),
]


@pytest.mark.parametrize(("make", "kind", "text"), OPTIONS)
def test_options_refuse(make, kind, text):
    with pytest.raises(kind, match=re.escape(text)):
        make()


class Broken(Exception):
    """What a model of the user's own raises."""


def broken(z, x):
    raise Broken("the 7th file is missing")


@pytest.mark.parametrize(
    "call",
    [
        lambda: solve(broken, loss, X0, Z0),
        lambda: solve(f, broken, X0),
        lambda: solve(f, loss, X0, lambda x: broken(x, x)),
        lambda: solve(f, loss, X0, project=lambda x: broken(x, x)),
        lambda: solve(f, loss, X0, callback=lambda progress: broken(0, 0)),
        lambda: solve(f, loss, X0, select=lambda new, kept: broken(0, 0)),
        lambda: fixed_point(broken, X0, Z0),
    ],
    ids=["f", "loss", "z0", "project", "callback", "select", "fixed_point"],
)
def test_exceptions_of_the_user_pass_untouched(call):
    with pytest.raises(Broken, match=r"\Athe 7th file is missing\Z") as caught:
        call()
    assert caught.value.__cause__ is None


def test_exception_of_f_is_the_cause_where_z0_was_guessed():
    with pytest.raises(ValueError, match="f raises Broken: the 7th file") as caught:
        solve(broken, loss, X0)
    assert isinstance(caught.value.__cause__, Broken)


@pytest.mark.parametrize(
    "change",
    [{"f": lambda z, x: x.mul_(0.5) + z}, {"project": lambda x: x.clamp_(0, 1)}],
    ids=["f", "project"],
)
def test_the_arguments_of_a_refused_call_are_unchanged(change):
    """f was tried on the tensors of x0 themselves, and an in-place projection changed them."""
    x0 = X0 + 2
    with pytest.raises(ValueError, match="in place"):
        solve(**({"f": f, "loss": loss, "x0": x0} | change))
    assert torch.equal(x0, X0 + 2)


def test_a_callable_z0_may_write_on_its_argument():
    x0 = X0 + 2
    solve(f, loss, x0, lambda x: x.mul_(0.5), max_steps=3)
    assert torch.equal(x0, X0 + 2)


def test_inference_mode_is_refused():
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"torch.no_grad\(\) instead"):
        solve(f, loss, X0)


def same(a, b):
    return torch.equal(a.x, b.x) and torch.equal(a.z, b.z) and torch.equal(a.value, b.value)


def test_good_calls_that_look_odd():
    """Inputs of another make, same numbers: the same solution, bit for bit."""
    x0 = torch.linspace(-1, 1, B * N, dtype=torch.float64).reshape(B, N)
    go = partial(solve, f, loss, max_steps=20)
    plain = go(x0)
    with torch.inference_mode():
        inference = x0.clone()
    strided = x0.repeat_interleave(2, dim=1)[:, ::2]
    assert not strided.is_contiguous()
    assert same(plain, go(strided))
    assert same(plain, go(x0.t().contiguous().t()))
    for asking in (x0.clone().requires_grad_(), torch.nn.Parameter(x0)):
        with pytest.warns(UserWarning, match=r"Pass x0\.detach\(\)"):
            assert same(plain, go(asking))
        with torch.no_grad():
            assert same(plain, go(asking))
    assert same(plain, go(inference))
    assert same(plain, go(x0, torch.zeros_like))
    assert same(plain, go(x0, torch.zeros(1, 1, dtype=x0.dtype).expand(B, N)))
    row = x0[:1]
    assert same(go(row.repeat(B, 1)), go(row.expand(B, N)))


def test_numbers_of_other_kinds_are_options():
    np = pytest.importorskip("numpy")
    plain = solve(f, loss, X0, max_steps=5, tol=0.0)
    assert same(plain, solve(f, loss, X0, max_steps=np.int64(5), tol=np.float32(0)))
    assert same(plain, solve(f, loss, X0, max_steps=5, tol=0))


def test_leaves_of_size_zero():
    def tree_f(z, x):
        return {"a": f(z["a"], x), "none": z["none"]}

    sol = solve(tree_f, lambda z, x: loss(z["a"], x), X0, {"a": Z0, "none": zeros(B, 0, 3)})
    plain = solve(f, loss, X0, Z0)
    assert sol.z["none"].shape == (B, 0, 3)
    torch.testing.assert_close(sol.x, plain.x)
    assert sol.converged.tolist() == plain.converged.tolist()


def test_f_may_return_its_argument():
    for sol in (solve(lambda z, x: z, loss, X0), solve(lambda z, x: x, loss, X0)):
        assert torch.isfinite(sol.x).all()
    # With z = x the problem is the loss at (x, x), least at x = 0.3 / 1.1.
    torch.testing.assert_close(sol.x, torch.full_like(X0, 0.3 / 1.1), rtol=0, atol=1e-5)


def test_a_loss_wider_than_x0_is_allowed():
    sol = solve(f, lambda z, x: loss(z, x).double(), X0.float(), max_steps=5)
    assert sol.value.dtype == torch.float32


def test_autocast_may_narrow_f_and_loss():
    W = 0.5 * torch.eye(N)

    def cast_f(z, x):
        return torch.tanh(z @ W + x)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        sol = solve(cast_f, lambda z, x: (z @ W).sum(-1).square(), torch.ones(B, N), max_steps=3)
    assert sol.x.dtype == sol.z.dtype == sol.value.dtype == torch.float32


def test_containers_of_the_user_survive():
    x0 = {"a": X0.clone()}

    def popping(z, x):
        return f(z, x.pop("a"))

    sol = solve(popping, lambda z, x: loss(z, x["a"]), x0, Z0, max_steps=3)
    assert set(x0) == set(sol.x) == {"a"}


def test_nested_containers_come_back():
    from torch.utils import _pytree as pytree

    x0 = {"b": [X0, (X0 + 1,)], "a": X0}
    sol = solve(
        lambda z, x: f(z, x["a"] + x["b"][0] + x["b"][1][0]), lambda z, x: loss(z, x["a"]), x0, Z0,
        max_steps=3,
    )  # fmt: skip
    assert pytree.tree_structure(sol.x) == pytree.tree_structure(x0)


def test_torchs_errors_in_f_say_what_it_was_called_with():
    if sys.version_info < (3, 11):
        pytest.skip("exceptions have no notes before Python 3.11")
    W = torch.eye(3)
    with pytest.raises(RuntimeError) as caught:
        solve(lambda z, x: z @ W + x, lambda z, x: z.sum(1), torch.zeros(4, 3), torch.zeros(4, 2))
    (note,) = caught.value.__notes__
    assert "f(z, x) with z (4, 2) torch.float32 and x (4, 3) torch.float32" in note
    with pytest.raises(RuntimeError) as caught:
        solve(lambda z, x: 0.5 * z + x, lambda z, x: (z @ W[:2]).sum(1), torch.zeros(4, 3))
    assert "loss(z, x) with z (4, 3)" in caught.value.__notes__[0]
