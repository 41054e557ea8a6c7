"""The benchmarks run, and the default's cost on twelve of their problems does not grow."""

from __future__ import annotations

import math

import pytest
import torch

import implicitopt

pytest.importorskip("tabulate", reason="the benchmarks' tables: pip install implicitopt[bench]")

from benchmarks import adam, budgets, families, overhead, profile, stragglers
from benchmarks.__main__ import parse
from benchmarks.problems import Setting, problems

#: (median, worst) sweeps of the default, as measured with torch 2.13 on a CPU.
SWEEPS = {
    "linear, cond 1e+00, ρ 0.3, B 1, to 1e-06": (25, 25),
    "linear, cond 1e+02, ρ 0.9, B 16, to 1e-06": (31, 32),
    "linear, cond 1e+04, ρ 0.9, B 16, to 0.001": (25, 27),
    "tanh, gauss, ρ 0.3, B 64, float32, to 0.001": (17, 22),
    "tanh, gauss, ρ 0.9, B 8, float64, to 1e-06": (34, 36),
    "tanh, radius, ρ 0.9, B 8, float64, to 1e-06": (39, 42),
    "tanh, orth, ρ 0.9, B 8, float64, to 1e-06": (50, 52),
    "tanh, sym, ρ 0.99, B 8, float64, to 1e-06": (39, 43),
    "tanh, gauss, ρ 0.9, softmax of 10, to 1e-06": (25, 31),
    "monotone, margin 0.1, B 32, to 0.001": (31, 46),
    "max over ball, gauss, to 1e-06": (20, 23),
    "min over simplex, orth, to 1e-06": (35, 41),
}


def quiet(items, desc):
    return items


@pytest.mark.parametrize("name", SWEEPS)
def test_the_default_takes_no_more_sweeps_than_it_did(name: str):
    """Rounding moves a count by a few; a tenth more is a loss, and much less a figure to renew."""
    setting = problems()[name]()
    with torch.no_grad():
        sol = implicitopt.solve(
            *setting.arguments, tol=setting.tol, max_steps=300, **setting.options
        )
    assert sol.converged.all()
    found = int(sol.steps.median()), int(sol.steps.max())
    for steps, known in zip(found, SWEEPS[name], strict=True):
        assert 0.75 * known <= steps <= 1.1 * known + 1


def test_there_are_problems_of_every_kind():
    made = problems()
    assert len(made) >= 48
    batches = {made[name]().batch for name in made}
    assert {1, 8, 16, 32, 64} <= batches


def test_a_profile_counts_by_the_best_solver():
    found = {
        "a": {"default": {"sweeps": [10, 30, 20], "seconds": 1.0},
              "Joint": {"sweeps": [40, 40, None], "seconds": 0.1}},
        "b": {"default": {"sweeps": [None], "seconds": 1.0},
              "Joint": {"sweeps": [7], "seconds": 0.1}},
    }  # fmt: skip
    by_sweeps, by_seconds = profile.profile(found, "sweeps"), profile.profile(found, "seconds")
    assert by_sweeps["default"] == [1.0, math.inf]
    assert by_sweeps["Joint"] == [2.0, 1.0]
    assert by_seconds["default"] == [pytest.approx(5.0), math.inf]
    assert by_sweeps["OneShot"] == [math.inf, math.inf]
    assert "| default " in profile.table(found)


def test_a_decoder_counts_to_within_a_percent_of_the_best_loss():
    row = {
        "one": {"budgets": [5, 10, 20], "losses": [[2.0, 9.0], [1.005, 9.0], [1.0, 8.0]]},
        "two": {"budgets": [8, 16], "losses": [[5.0, float("nan")], [1.02, 4.0]]},
    }
    profile.to_loss(row)
    assert row["one"]["sweeps"] == [10, None]
    assert row["two"]["sweeps"] == [None, 16]


def quadratic_setting(tol: float | None) -> Setting:
    x0, z0 = torch.zeros(2, 3), torch.zeros(2, 3)
    arguments = (lambda z, x: 0.5 * z + x, lambda z, x: 1 + ((z - 1) ** 2).sum(-1), x0, z0)
    return Setting(arguments, tol)


@pytest.mark.slow
def test_each_solver_is_measured_on_a_residual_and_on_a_loss(monkeypatch):
    monkeypatch.setattr(profile, "BUDGETS", [5, 20, 60])
    made = {"residual": lambda: quadratic_setting(1e-3), "loss": lambda: quadratic_setting(None)}
    found = profile.measure(made, quick=False, bar=quiet)
    assert set(found["residual"]) == set(profile.SOLVERS) - {"nested L-BFGS", "nested PGD"}
    for problem in found:
        for name in ("default", "Joint", "OneShot"):
            assert all(n is not None and n > 0 for n in found[problem][name]["sweeps"])
    work = found["loss"]["nested Adam"]["sweeps"]
    assert min(work) > max(found["loss"]["default"]["sweeps"])


@pytest.mark.slow
def test_nested_adam_is_met_with_fewer_evaluations():
    made = {"decoder": lambda: quadratic_setting(None)}
    found = adam.measure(made, quick=True, bar=quiet)["decoder"]
    for mark in ("nested Adam, cold", "nested Adam, warm"):
        runs = found[mark]["runs"]
        assert runs["default"]["f"] < runs[mark]["f"]
    assert "nested Adam, cold" in adam.table({"decoder": found})


def test_what_a_budget_leaves_to_go_falls_with_it_whether_minimized_or_maximized():
    f, loss, x0, z0 = quadratic_setting(1e-3).arguments
    made = {
        "a, to 0.001": lambda: quadratic_setting(1e-3),
        "b": lambda: Setting((f, lambda z, x: -loss(z, x), x0, z0), None, {"maximize": True}),
    }
    found = budgets.measure(made, quick=False, bar=quiet)
    assert set(found) == {"a", "b"}
    assert found["a"] == found["b"]
    shares = found["a"]["default, best"]
    assert len(shares) == len(budgets.BUDGETS)
    assert shares[1] < 0.5
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] < 1e-4
    assert "| default, best " in budgets.table(found)


@pytest.mark.slow
def test_overhead_is_measured_against_a_bare_sweep():
    found = overhead.measure(quick=True, bar=quiet)
    counted = found[overhead.OPERATIONS]
    assert all(50 < counted[name] < 2000 for name in overhead.SOLVERS)
    for name, row in found.items():
        if name != overhead.OPERATIONS:
            assert row["ms"] > 0
            assert all(0.8 < row[solver] < 50 for solver in overhead.SOLVERS)
    assert "bare" in overhead.table(found)


@pytest.mark.slow
def test_a_straggler_costs_less_where_the_others_leave():
    (found,) = stragglers.measure(quick=True, bar=quiet)
    assert found["sweeps of the hard one"] >= 8 * found["sweeps of the others"]
    assert found["finished leave"] < found["all stay"]


def test_the_command_line_names_its_parts():
    assert parse(["profile", "--quick"]).parts == ["profile"]
    for wrong in (["speed"], ["profile", "--generator", "out"]):
        with pytest.raises(SystemExit):
            parse(wrong)


@pytest.mark.parametrize(
    ("solver", "most"),
    [("default", 970), ("Joint, memory 10", 280), ("OneShot", 670)],
)
def test_a_step_makes_few_operations(solver, most):
    """On a GPU each is a kernel to launch; on small problems they are most of a step's time."""
    made = overhead.operations(families.tanh("gauss"), overhead.SOLVERS[solver](), (20, 30))
    assert made <= most
