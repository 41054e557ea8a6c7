"""plot(): what a solve did, in one picture. The only module that needs matplotlib."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from implicitopt.solution import Solution, Status

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot"]

_BLOCKS = ("z:  ‖f − z‖", "mu:  ‖μ⁺ − μ‖", "x:  ‖x − P(x − g)‖")
#: Colours that the common kinds of colour blindness keep apart (Okabe and Ito), and markers.
_STATUS = {
    Status.CONVERGED: ("#009E73", "o"),
    Status.MAX_STEPS: ("#E69F00", "s"),
    Status.STALLED: ("#0072B2", "^"),
    Status.NONFINITE: ("#D55E00", "x"),
}


def plot(sol: Solution) -> Figure:
    """Draw a solution: its loss, its residuals by block, and the status of each problem.

    With ``solve(..., history=True)`` the first two are drawn against the step: the median over the
    problems, and the range from best to worst. Without a history they are drawn for each problem,
    as returned.

    Args:
        sol: what :func:`implicitopt.solve` returned.

    Returns:
        The ``matplotlib`` figure, made by ``pyplot``: ``plt.show()`` shows it, ``.savefig(path)``
        saves it.

    Raises:
        ImportError: matplotlib is not installed; it comes with ``implicitopt[plot]``.
        TypeError: ``sol`` is not a :class:`Solution`.

    >>> import torch, implicitopt
    >>> sol = implicitopt.solve(
    ...     lambda z, x: torch.tanh(0.5 * z + x), lambda z, x: ((z - 0.3) ** 2).sum(-1),
    ...     torch.zeros(4, 2), history=True,
    ... )
    >>> figure = implicitopt.plot(sol)
    >>> [axes.get_title() for axes in figure.axes]
    ['loss', 'residuals', 'status']
    >>> import matplotlib.pyplot as plt
    >>> plt.close(figure)
    """
    if not isinstance(sol, Solution):
        raise TypeError(f"plot draws what implicitopt.solve() returned; got {sol!r}.")
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(
            'implicitopt.plot needs matplotlib: pip install matplotlib, or "implicitopt[plot]".'
        ) from error
    figure, (loss, residuals, status) = plt.subplots(1, 3, figsize=(13, 3.4), layout="constrained")
    shown = sol if sol.history is None else sol.history
    draw = _by_problem if sol.history is None else _by_step
    draw(loss, shown.value)
    loss.set_title("loss")
    for block, label in zip(shown.residuals, _BLOCKS, strict=True):
        # Zeros have no place on a logarithmic scale: a gap.
        draw(residuals, torch.where(block > 0, block, torch.nan), label)
    residuals.set_title("residuals")
    residuals.legend(fontsize="small")
    _logarithmic(residuals, torch.cat([block.reshape(-1) for block in shown.residuals]))
    _statuses(status, sol)
    return figure


def _host(values: Tensor) -> Tensor:
    """The numbers, on the CPU; NaN where not finite, which leaves a gap in a line."""
    found = values.detach().double().cpu()
    return torch.where(found.isfinite(), found, torch.nan)


def _by_problem(axes: Axes, values: Tensor, label: str | None = None) -> None:
    rows = _host(values).reshape(-1)
    axes.plot(range(len(rows)), rows, "o", markersize=4, alpha=0.7, label=label)
    axes.set_xlabel("problem")


def _by_step(axes: Axes, values: Tensor, label: str | None = None) -> None:
    rows = _host(values).reshape(len(values), -1)
    axes.set_xlabel("step (line: median problem; band: all)")
    (line,) = axes.plot(range(len(rows)), rows.nanmedian(dim=1).values, label=label)
    low = rows.nan_to_num(nan=torch.inf).amin(dim=1)
    high = rows.nan_to_num(nan=-torch.inf).amax(dim=1)
    some = low <= high
    steps = torch.arange(len(rows))[some]
    axes.fill_between(steps, low[some], high[some], color=line.get_color(), alpha=0.15, linewidth=0)


def _logarithmic(axes: Axes, values: Tensor) -> None:
    """A logarithmic scale, where there is something to show on one."""
    if bool((_host(values) > 0).any()):
        axes.set_yscale("log")


def _statuses(axes: Axes, sol: Solution) -> None:
    """Each problem's KKT residual and status; at the upper edge where there is no residual."""
    codes, total = sol.status.reshape(-1).cpu(), _host(sol.residuals.total).reshape(-1)
    _logarithmic(axes, total)
    edge = 10 * max([sol.tol, *total[total.isfinite()].tolist()]) or 1.0
    for status, (color, marker) in _STATUS.items():
        mask = codes == status
        if bool(mask.any()):
            height = total.nan_to_num(nan=edge)[mask]
            label = f"{status.name} {int(mask.sum())}"
            axes.plot(mask.nonzero()[:, 0], height, marker, color=color, label=label)
    if sol.tol > 0:
        axes.axhline(sol.tol, color="gray", linestyle="--", linewidth=1, label="tol")
    axes.set_title("status")
    axes.set_xlabel("problem")
    axes.set_ylabel("KKT residual")
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
