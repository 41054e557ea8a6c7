"""The figures: sheets of images, and curves of cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
from einops import rearrange
from torch import Tensor
from torch.nn.functional import pad

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
    figure.savefig(path, dpi=110)
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
