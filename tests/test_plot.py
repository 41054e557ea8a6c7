"""What people see of a solution: the picture, the line and the table."""

import os
import subprocess
import sys

import pytest
import torch

import implicitopt
from implicitopt import Status

matplotlib = pytest.importorskip("matplotlib")


@pytest.fixture(autouse=True)
def closed_figures():
    import matplotlib.pyplot as plt

    matplotlib.use("Agg")
    yield
    plt.close("all")


def solved(x0=None, scale=None, **options):
    """A few small problems; those whose ``scale`` is NaN fail."""
    x0 = torch.zeros(4, 2) if x0 is None else x0
    scale = torch.ones(len(x0) if x0.dim() > 1 else ()) if scale is None else scale
    return implicitopt.solve(
        lambda z, x: torch.tanh(0.5 * z + x),
        lambda z, x: scale * ((z - 0.3) ** 2).sum(-1) + 0.01 * (x**2).sum(-1),
        x0,
        **options,
    )


def failing(**options):
    return solved(scale=torch.tensor([1.0, 1.0, torch.nan, 1.0]), **options)


def lines(axes):
    return {line.get_label(): line for line in axes.lines}


def test_a_history_is_drawn_as_the_median_of_each_step():
    sol = solved(torch.linspace(-0.2, 0.2, 8).reshape(4, 2), history=True)
    loss, residuals, _ = implicitopt.plot(sol).axes
    (drawn,) = loss.lines
    expected = [sorted(row)[1] for row in sol.history.value.tolist()]  # the lower median of four
    assert drawn.get_ydata().tolist() == pytest.approx(expected)
    assert drawn.get_xdata().tolist() == list(range(len(expected)))
    for name, block in sol.history.residuals._asdict().items():
        (found,) = (line for label, line in lines(residuals).items() if label.startswith(name))
        expected = [sorted(row)[1] for row in block.tolist()]
        at = [step for step, value in enumerate(expected) if value > 0]
        assert len(at) > 5
        assert found.get_ydata()[at].tolist() == pytest.approx([expected[step] for step in at])
    assert residuals.get_yscale() == "log"


def test_without_a_history_each_problem_is_a_point():
    sol = solved(torch.linspace(-0.2, 0.2, 10).reshape(5, 2))
    loss, residuals, status = implicitopt.plot(sol).axes
    assert loss.lines[0].get_ydata().tolist() == pytest.approx(sol.value.tolist())
    assert len(residuals.lines) == 3
    assert residuals.lines[1].get_ydata().tolist() == pytest.approx(sol.residuals.mu.tolist())
    heights = lines(status)["CONVERGED 5"].get_ydata().tolist()
    assert heights == pytest.approx(sol.residuals.total.tolist())
    assert set(lines(status)["tol"].get_ydata()) == {sol.tol}


@pytest.mark.parametrize("history", [True, False])
def test_a_failed_problem_is_shown_as_such(history):
    sol = failing(history=history)
    assert sol.status.tolist() == [0, 0, Status.NONFINITE, 0]
    figure = implicitopt.plot(sol)
    status = figure.axes[2]
    (index,), (height,) = lines(status)["NONFINITE 1"].get_data()
    assert index == 2
    assert height > max(lines(status)["CONVERGED 3"].get_ydata())
    figure.savefig(os.devnull, format="png")  # drawn in full


@pytest.mark.parametrize(
    "sol",
    [
        pytest.param(lambda history: solved(torch.zeros(2), history=history), id="one problem"),
        pytest.param(
            lambda history: solved(torch.zeros(3, 2, dtype=torch.bfloat16), history=history),
            id="bfloat16",
        ),
        pytest.param(
            lambda history: solved(scale=torch.full((4,), torch.nan), history=history), id="all NaN"
        ),
        pytest.param(lambda history: solved(max_steps=1, tol=0, history=history), id="one step"),
        pytest.param(
            lambda history: solved(scale=torch.ones(4, requires_grad=True), history=history),
            id="with a gradient",
        ),
    ],
)
@pytest.mark.parametrize("history", [True, False])
def test_any_solution_can_be_drawn_and_shown(sol, history):
    sol = sol(history)
    implicitopt.plot(sol).savefig(os.devnull, format="png")
    assert "\n" not in repr(sol)
    assert sol._repr_html_().count("<table>") == 1


def test_other_things_are_refused():
    with pytest.raises(TypeError, match=r"what implicitopt\.solve"):
        implicitopt.plot(torch.zeros(3))


def test_importing_the_library_leaves_matplotlib_alone_and_plot_says_what_is_missing():
    code = """
import sys
sys.modules["matplotlib"] = None  # what an environment without it looks like
import torch, implicitopt
sol = implicitopt.solve(lambda z, x: 0.5 * z + x, lambda z, x: (z**2).sum(-1), torch.ones(2, 2))
try:
    implicitopt.plot(sol)
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install matplotlib" in done.stdout


def test_the_table_has_a_row_for_each_status():
    sol = failing()
    html = sol._repr_html_()
    assert html.count("<tr>") == 3  # the head, CONVERGED and NONFINITE
    sound = sol.value[sol.converged].mean()
    assert f"<td>CONVERGED</td><td>3</td><td>{sound:.4g}</td>" in html
    assert "<td>NONFINITE</td><td>1</td><td>nan</td>" in html
    assert f"<td>{sol.residuals.x[sol.converged].max():.1e}</td>" in html


def test_the_line_counts_problems_by_status():
    assert repr(failing()).startswith("Solution(CONVERGED 3, NONFINITE 1; value ")
