"""The figures: sheets of images, and curves of cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
from einops import rearrange
from torch import Tensor
from torch.nn.functional import pad

from generators.contest import Result
from generators.race import Curve


def sheet(path: Path, rows: Mapping[str, Tensor], count: int = 10) -> None:
    """A labelled row of images for each entry, ``(N, C, H, W)`` in [0, 1]."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(
        len(rows), 1, figsize=(count + 1.5, 1.05 * len(rows)), layout="constrained", squeeze=False
    )
    for axis, (name, images) in zip(axes[:, 0], rows.items(), strict=True):
        framed = pad(images[:count].cpu().clamp(0, 1), (1, 1, 1, 1), value=1.0)
        shown = rearrange(framed, "n c h w -> h (n w) c").numpy()
        axis.imshow(shown, cmap="gray", vmin=0, vmax=1)
        axis.set_ylabel(name, rotation=0, ha="right", va="center")
        axis.set_xticks([])
        axis.set_yticks([])
        axis.spines[:].set_visible(False)
    figure.savefig(path, dpi=110, bbox_inches="tight")  # long names would be cut
    plt.close(figure)


def cost(path: Path, curves: Sequence[Curve]) -> None:
    """Loss against evaluations and against seconds."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True, layout="constrained")
    for curve in curves:
        loss = [point.loss for point in curve.points]
        work = [point.f + point.vjp for point in curve.points]
        axes[0].plot(work, loss, marker=".", label=curve.solver)
        axes[1].plot([point.seconds for point in curve.points], loss, marker=".")
    axes[0].set(xlabel="evaluations of f and of its vjp", ylabel="loss", xscale="log")
    axes[1].set(xlabel="seconds", xscale="log")
    axes[0].legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def progress(path: Path, results: Sequence[Result]) -> None:
    """Loss, and KKT residual with its quartiles, against sweeps and against seconds."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogFormatter, StrMethodFormatter

    figure, axes = plt.subplots(
        2, 2, figsize=(11, 7.5), sharex="col", sharey="row", layout="constrained"
    )
    for place, found in enumerate(results):
        style = {
            "color": f"C{place}",
            "linestyle": "--" if found.name.startswith("nested") else "-",
            # The default begins as another contestant does: wide, to be seen beneath it.
            "linewidth": 4 if found.name == "default" else 1.3,
            "alpha": 0.4 if found.name == "default" else 1,
        }
        points, track = found.points, found.track
        work = [(point.f + point.vjp) / 2 for point in points]
        for column, (at_points, along) in enumerate(
            ((work, track.work), ([point.seconds for point in points], track.seconds))
        ):
            loss = [point.loss for point in points]
            axes[0, column].plot(at_points, loss, marker=".", label=found.name, **style)
            axes[1, column].plot(along, track.median, **style)
            axes[1, column].fill_between(
                along, track.lower, track.upper, color=style["color"], alpha=0.1, linewidth=0
            )
    axes[0, 0].set(ylabel="loss at the codes' equilibrium", xscale="log", yscale="log")
    axes[0, 1].set(xscale="log")
    axes[1, 0].set(xlabel="sweeps", ylabel="lowest KKT residual so far", yscale="log")
    axes[1, 1].set(xlabel="seconds")
    for axis in (axes[0, 0].yaxis, axes[1, 0].xaxis, axes[1, 1].xaxis):
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes[0, 0].yaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False))
    for axis in axes.flat:
        axis.grid(which="both", alpha=0.15)
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)
