"""Pictures of attacks and of what they do to accuracy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
from torch import Tensor

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def draw_attacks(
    path: Path,
    images: Tensor,
    labels: Tensor,
    rows: Mapping[str, tuple[Tensor, Tensor]],
    classes: Sequence[str],
) -> None:
    """The images; below, for each classifier, the δ that attacks it and what it then answers.

    Args:
        rows: by name, the changed images and the classifier's answers to them.
    """
    count, kinds = len(images), len(rows)
    figure, axes = plt.subplots(
        1 + 2 * kinds, count, figsize=(1.1 * count, 1.25 * (1 + 2 * kinds)), layout="constrained",
        squeeze=False,
    )  # fmt: skip
    for column in range(count):
        _show(axes[0, column], images[column], classes[int(labels[column])])
    axes[0, 0].set_ylabel("image")
    for place, (name, (changed, answers)) in enumerate(rows.items()):
        deltas, seen = axes[1 + 2 * place], axes[2 + 2 * place]
        for column in range(count):
            delta = changed[column] - images[column]
            wrong = answers[column] != labels[column]
            title = classes[int(answers[column])]
            _show(deltas[column], 0.5 + 0.5 * delta / delta.abs().max().clamp(min=1e-12))
            _show(seen[column], changed[column], title, "crimson" if wrong else "black")
        deltas[0].set_ylabel(f"{name}: δ")
        seen[0].set_ylabel(f"{name}: image + δ")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _show(axis, image: Tensor, title: str = "", color: str = "black") -> None:
    """One image in [0, 1], cut to that."""
    axis.imshow(image.clamp(0, 1).permute(1, 2, 0).cpu(), cmap="gray", vmin=0, vmax=1)
    axis.set_title(title, fontsize=8, color=color, pad=2)
    axis.set_xticks([])
    axis.set_yticks([])
    axis.yaxis.label.set_fontsize(7)


def draw_curves(
    path: Path, lines: Mapping[str, tuple[Sequence[float], Sequence[float]]], against: str
) -> None:
    """Accuracy under the joint attack against something, a line for each way to train."""
    figure, axis = plt.subplots(figsize=(5, 3.4), layout="constrained")
    for name, (places, accuracies) in lines.items():
        percent = [100 * accuracy for accuracy in accuracies]
        axis.plot(places, percent, marker="o", markersize=3, label=name)
    axis.set(xlabel=against, ylabel="accuracy under the joint attack, %", ylim=(-2, 102))
    axis.legend(title="trained on", frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
