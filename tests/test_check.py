"""check() finds what is wrong, and only that; its numbers agree with dense linear algebra."""

import pytest
import torch

import implicitopt
from implicitopt.check import Report, check

B, N, D = 6, 10, 3
PROBLEMS = {"batched": lambda value: value, "single": torch.sum}


@pytest.fixture(params=[torch.float64, torch.float32], ids=str)
def problem(request):
    """A random tanh map with ‖W‖ = 0.8, a least-squares loss, and a start that is no solution."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(request.param)

    W = 0.8 * torch.linalg.qr(randn(N, N)).Q
    U, target = randn(D, N) / D**0.5, torch.tanh(randn(B, N))

    def f(z, x):
        return torch.tanh(z @ W + x @ U)

    def loss(z, x):
        return 0.5 * (z - target).square().sum(-1) + 0.05 * x.square().sum(-1)

    return f, loss, randn(B, D), randn(B, N)


def failures(report):
    return {finding.name for finding in report.findings if finding.ok is False}


@pytest.mark.parametrize("count", PROBLEMS)
def test_a_sound_problem_passes(problem, count):
    f, loss, x0, z0 = problem
    report = check(f, lambda z, x: PROBLEMS[count](loss(z, x)), x0, z0, quiet=True)
    assert report.ok, str(report)
    assert report.coupled is (False if count == "batched" else None)
    limit = torch.finfo(x0.dtype).eps ** 0.5
    assert report.gradient_error < limit
    assert report.reduced_gradient_error < limit
    assert all(finding.remedy == "" for finding in report.findings)


def test_pytrees(problem):
    f, loss, x0, z0 = problem

    def tree_f(z, x):
        image = f(torch.cat((z["a"].flatten(1), z["b"]), dim=1), x[0] + x[1])
        return {"a": image[:, :4].reshape(-1, 2, 2), "b": image[:, 4:]}

    def tree_loss(z, x):
        return loss(torch.cat((z["a"].flatten(1), z["b"]), dim=1), x[0]) + x[1].square().sum(-1)

    start = {"a": z0[:, :4].reshape(-1, 2, 2), "b": z0[:, 4:]}
    report = check(tree_f, tree_loss, (x0, 0.1 * x0), start, quiet=True)
    assert report.ok, str(report)


@pytest.mark.parametrize("count", PROBLEMS)
def test_contraction_is_the_spectral_radius(problem, count):
    f, loss, x0, z0 = problem
    report = check(f, lambda z, x: PROBLEMS[count](loss(z, x)), x0, z0, quiet=True)
    z = z0
    for _ in range(300):
        z = f(z, x0)
    jacobians = torch.func.vmap(torch.func.jacrev(f))(z, x0)
    radii = torch.linalg.eigvals(jacobians).abs().amax(dim=1)
    expected = radii if count == "batched" else radii.max().reshape(1)
    torch.testing.assert_close(report.contraction, expected, rtol=0.1, atol=0)


def test_rate_of_a_linear_map_is_its_factor():
    factors = torch.tensor([[0.3], [0.9], [1.2]])
    report = check(
        lambda z, x: factors * z + x, lambda z, x: (z**2).sum(-1), torch.ones(3, 2), quiet=True
    )
    torch.testing.assert_close(report.rate, factors[:, 0], rtol=1e-3, atol=0)
    torch.testing.assert_close(report.contraction, factors[:, 0], rtol=1e-3, atol=0)
    assert failures(report) == {"plain iteration", "contraction"}
    assert "problem 2" in report["plain iteration"].detail
    assert "jacobian_penalty" in report["contraction"].remedy


def test_batch_norm_is_found_coupled(problem):
    f, loss, x0, z0 = problem
    norm = torch.nn.BatchNorm1d(N, track_running_stats=False, dtype=x0.dtype)
    report = check(lambda z, x: f(norm(z), x), loss, x0, z0, quiet=True)
    assert report.coupled is True
    assert ".eval()" in report["coupling"].remedy
    group = torch.nn.GroupNorm(2, N, dtype=x0.dtype)
    assert check(lambda z, x: f(group(z), x), loss, x0, z0, quiet=True).coupled is False


def test_batch_norm_with_running_statistics_is_found(problem):
    f, loss, x0, z0 = problem
    norm = torch.nn.BatchNorm1d(N, dtype=x0.dtype)
    report = check(lambda z, x: f(norm(z), x), loss, x0, z0, quiet=True)
    assert report.coupled is True
    assert ".eval()" in report["finite start"].remedy  # torch.func refuses the running mean
    norm.eval()
    assert check(lambda z, x: f(norm(z), x), loss, x0, z0, quiet=True).coupled is False


@pytest.mark.parametrize("where", ["f", "loss", "project"])
def test_coupling_is_attributed(problem, where):
    f, loss, x0, z0 = problem
    parts = {"f": f, "loss": loss, "project": None}
    parts |= {
        "f": {"f": lambda z, x: f(z, x) + 0.01 * z.roll(1, dims=0)},
        "loss": {"loss": lambda z, x: loss(z, x) + 0.1 * z.mean().square()},
        "project": {"project": lambda x: x / x.norm().clamp(min=1)},
    }[where]
    report = check(parts["f"], parts["loss"], x0, z0, project=parts["project"], quiet=True)
    assert report.coupled is True
    assert report["coupling"].detail.startswith(f"{where} of ")


def test_coupling_of_single_problems_is_named(problem):
    f, loss, x0, z0 = problem

    def leak(z, x):
        image = f(z, x)
        return torch.cat((image[:1], image[1:2] + 0.1 * z[:1], image[2:]))

    report = check(leak, loss, x0, z0, quiet=True)
    assert "f of problem 1 changes" in report["coupling"].detail


@pytest.mark.parametrize("where", ["f", "loss"])
def test_dropout_is_found(problem, where):
    f, loss, x0, z0 = problem
    drop = torch.nn.Dropout(0.2)
    noisy = {
        "f": (lambda z, x: f(drop(z), x), loss),
        "loss": (f, lambda z, x: loss(drop(z), x)),
    }[where]
    report = check(*noisy, x0, z0, quiet=True)
    assert failures(report) == {"repeatable"}
    assert f"{where} changes" in report["repeatable"].detail
    assert report.coupled is None
    drop.eval()
    assert check(*noisy, x0, z0, quiet=True).ok


def test_dropout_is_found_where_it_changes_nothing_at_the_start():
    """f(0, 0) is 0, whatever is dropped."""
    drop, zeros = torch.nn.Dropout(0.2), torch.zeros(4, 6)
    report = check(
        lambda z, x: drop(torch.tanh(0.5 * z + x)),
        lambda z, x: (z - 1).square().sum(-1),
        zeros,
        zeros,
        quiet=True,
    )
    assert failures(report) == {"repeatable"}


class _WrongBackward(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(z):
        return 0.5 * z

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        return 0.6 * grad


def _under_no_grad(z):
    with torch.no_grad():
        return z * 1


@pytest.mark.parametrize(
    ("spoil", "block"),
    [
        (lambda z, x: (z.detach(), x), "z"),
        (lambda z, x: (z, x.detach()), "x"),
        (lambda z, x: (_under_no_grad(z), x), "z"),
        (lambda z, x: (_WrongBackward.apply(z), x), "z"),
        (lambda z, x: (z, x + (x.round() - x).detach()), "x"),  # straight through
    ],
    ids=["detach z", "detach x", "no_grad", "wrong backward", "straight-through rounding"],
)
@pytest.mark.parametrize("where", ["f", "loss"])
def test_wrong_derivatives_are_found(problem, spoil, block, where):
    f, loss, x0, z0 = problem
    parts = {
        "f": (lambda z, x: f(*spoil(z, x)), loss),
        "loss": (f, lambda z, x: loss(*spoil(z, x))),
    }[where]
    report = check(*parts, x0, z0, quiet=True)
    other = {"f": "loss", "loss": "f"}[where]
    assert report[f"derivatives of {where}"].ok is False
    assert report[f"derivatives of {other}"].ok is True
    assert report[f"derivatives of {where}"].detail.startswith(f"in {block}: off by")
    assert f"in {'x' if block == 'z' else 'z'}" not in report[f"derivatives of {where}"].detail
    assert report.gradient_error > 0.1
    assert report.reduced_gradient_error > 1e-3


def test_a_kink_at_the_start_is_found():
    def f(z, x):
        return torch.relu(0.5 * z + x)

    report = check(f, lambda z, x: ((z - 1) ** 2).sum(-1), torch.zeros(2, 3), quiet=True)
    assert report["derivatives of f"].ok is False
    assert "kinks" in report["derivatives of f"].remedy


def test_relu_away_from_kinks_passes(problem):
    _, loss, x0, z0 = problem
    W = 0.5 * torch.eye(N, dtype=x0.dtype).roll(1, dims=0)

    def f(z, x):
        return torch.relu(z @ W + x.sum(-1, keepdim=True))

    report = check(f, loss, x0, z0, quiet=True)
    assert report.ok, str(report)


def test_non_finite_start_names_the_problems(problem):
    f, loss, x0, z0 = problem
    bad = torch.zeros(B, 1, dtype=x0.dtype)
    bad[2], bad[4] = float("nan"), float("inf")
    report = check(lambda z, x: f(z, x) + bad, loss, x0, z0, quiet=True)
    assert failures(report) == {"finite start"}
    assert report["finite start"].detail.startswith("f is NaN or infinite")
    assert "problems 2, 4" in report["finite start"].detail


def test_infinite_derivative_at_the_start():
    report = check(
        lambda z, x: 0.5 * z + x, lambda z, x: z.abs().sqrt().sum(-1), torch.zeros(2, 3), quiet=True
    )
    assert failures(report) == {"finite start"}
    assert "derivative in z" in report["finite start"].detail


def test_divergence_of_the_plain_iteration():
    report = check(
        lambda z, x: z**3 + x, lambda z, x: (z**2).sum(-1), torch.tensor([[0.1], [3.0]]), quiet=True
    )
    assert "NaN or infinity" in report["plain iteration"].detail
    assert "problem 1" in report["plain iteration"].detail


@pytest.mark.parametrize(
    ("project", "name"),
    [
        (lambda x: x / x.norm(dim=-1, keepdim=True), "projection"),  # a sphere: not convex
        (lambda x: x / 2, "inputs"),  # not idempotent
        (lambda x: x[:, :1], "inputs"),
        (lambda x: x.clamp_(0, 1), "inputs"),
    ],
    ids=["sphere", "halving", "shape", "in place"],
)
def test_bad_projections_are_found(problem, project, name):
    f, loss, x0, z0 = problem
    given = x0.clone()
    report = check(f, loss, x0, z0, project=project, quiet=True)
    assert failures(report) == {name}, str(report)
    assert torch.equal(x0, given)


@pytest.mark.parametrize(
    "project",
    [
        implicitopt.L2Ball(0.5), implicitopt.LinfBall(0.5), implicitopt.Box(0.0, 1.0),
        implicitopt.Simplex(), lambda x: x.clamp(0, 1),
    ],
    ids=["L2Ball", "LinfBall", "Box", "Simplex", "callable"],
)  # fmt: skip
@pytest.mark.parametrize("count", PROBLEMS)
def test_good_projections_pass(problem, project, count):
    f, loss, x0, z0 = problem
    count = PROBLEMS[count]
    report = check(f, lambda z, x: count(loss(z, x)), x0, z0, project=project, quiet=True)
    assert report.ok, str(report)
    assert report["projection"].value.max() < 1 + 1e-4


def _missing(z, x):
    raise LookupError("the 7th file is missing")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"f": None}, "TypeError: f must be callable"),
        ({"f": _missing}, "LookupError: the 7th file is missing"),
        ({"loss": _missing}, "LookupError: the 7th file is missing"),
        ({"x0": torch.ones(B, D, dtype=torch.int64)}, "TypeError: x0 must be floating point"),
        ({"x0": torch.full((B, D), float("nan"))}, "ValueError: x0 must be finite"),
        ({"z0": None}, "ValueError: z0 was not given"),
        ({"loss": lambda z, x: z**2}, "ValueError: loss must return one value per problem"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_solve_refuses_is_a_finding(problem, change, text):
    f, loss, x0, z0 = problem
    report = check(**({"f": f, "loss": loss, "x0": x0, "z0": z0} | change), quiet=True)
    assert failures(report) == {"inputs"}
    assert report["inputs"].detail.startswith(text)
    assert report.contraction is report.rate is report.coupled is report.gradient_error is None


def test_an_exception_later_on_is_a_finding(problem):
    f, loss, x0, z0 = problem
    calls = []

    def fails_later(z, x):
        calls.append(1)
        if len(calls) > 8:
            raise LookupError("gone")
        return f(z, x)

    report = check(fails_later, loss, x0, z0, quiet=True)
    assert not report.ok
    assert "LookupError: gone" in str(report)


def test_report_is_printed_unless_quiet(problem, capsys):
    report = check(*problem)
    assert capsys.readouterr().out == f"{report}\n"
    lines = str(report).split("\n")
    assert lines[-1] == "All is well."
    assert max(map(len, lines)) <= 100
    assert all(line == line.rstrip() for line in lines)
    starts = [line.index(finding.detail[:10]) for line, finding in _paired(lines, report)]
    assert len(set(starts)) == 1  # aligned
    check(*problem, quiet=True)
    assert capsys.readouterr().out == ""


def _paired(lines, report):
    heads = [line for line in lines[:-1] if line[:4].strip()]
    return zip(heads, report.findings, strict=True)


def test_same_seed_same_report_and_no_side_effects(problem):
    f, loss, x0, z0 = problem
    given = x0.clone(), z0.clone()
    state = torch.random.get_rng_state()
    first = check(f, loss, x0, z0, quiet=True, seed=3)
    assert str(first) == str(check(f, loss, x0, z0, quiet=True, seed=3))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(x0, given[0])
    assert torch.equal(z0, given[1])


def test_unknown_finding_lists_the_names(problem):
    report = check(*problem, quiet=True)
    assert isinstance(report, Report)
    with pytest.raises(KeyError, match=r"no finding 'weather'.*contraction"):
        report["weather"]


def test_unconverged_state_leaves_the_reduced_gradient_open(problem):
    _, loss, x0, z0 = problem

    def f(z, x):  # a rotation: no fixed point is reached, and none is guessed at
        return 1.5 * z.roll(1, dims=1) + x.sum(-1, keepdim=True).sin() * z.square().cos()

    report = check(f, loss, x0, z0, quiet=True)
    assert report["reduced gradient"].ok is not False


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype):
    report = check(
        lambda z, x: torch.tanh(0.5 * z + x),
        lambda z, x: ((z - 0.3) ** 2).sum(-1),
        torch.full((3, 4), 0.5, dtype=dtype),
        quiet=True,
    )
    assert report.ok, str(report)


def test_one_number_for_what_may_be_a_batch_is_pointed_out():
    def f(z, x):
        return torch.tanh(0.5 * z + x)

    x0 = torch.zeros(6, 2)
    report = implicitopt.check(f, lambda z, x: (z - 1).square().mean(), x0, quiet=True)
    assert report.ok
    assert "let it return shape (6,)" in report["coupling"].detail
    alone = implicitopt.check(f, lambda z, x: (z - 1).square().mean(), x0[0], quiet=True)
    assert alone["coupling"].detail == "only one problem"
    tree = implicitopt.check(
        lambda z, x: {"a": torch.tanh(z["a"] + x.sum())}, lambda z, x: z["a"].sum() ** 2, x0,
        {"a": torch.zeros(3)}, quiet=True,
    )  # fmt: skip
    assert tree["coupling"].detail == "only one problem"
