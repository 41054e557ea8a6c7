"""Trials: how many images survive an attack, and how long attacks of one strength take."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from torch import Tensor

from attacks.attack import Attack
from attacks.judge import judge
from mdeq import Classifier

#: An attack is as hard as another if its mean loss is at least this share of the other's.
AS_HARD = 0.999

#: What turns images into those that the classifier is shown.
Change = Callable[[Classifier, Tensor, Tensor], Tensor]


def evaluate(
    model: Classifier, change: Change, batches: Iterable[tuple[Tensor, Tensor]]
) -> dict[str, float]:
    """The classifier's accuracy and loss on changed images, in equilibrium, and what they took."""
    right, losses, residuals, lengths, seconds = [], [], [], [], 0.0
    for images, labels in batches:
        begin = time.perf_counter()
        changed = change(model, images, labels).detach()
        seconds += time.perf_counter() - begin
        verdict = judge(model, changed, labels)
        right.append(verdict.right)
        losses.append(verdict.loss)
        residuals.append(verdict.residual)
        lengths.append((changed - images).flatten(1).norm(dim=1))
    count = len(torch.cat(right))
    return {
        "images": count,
        "accuracy": torch.cat(right).float().mean().item(),
        "loss": torch.cat(losses).mean().item(),
        "residual": torch.cat(residuals).max().item(),
        "length": torch.cat(lengths).max().item(),
        "seconds": seconds / count,
    }


def timed(
    model: Classifier, attack: Attack, images: Tensor, labels: Tensor, repeats: int = 1
) -> dict[str, float]:
    """An attack's mean loss in equilibrium, its work, and its seconds an image."""
    seconds = []
    with torch.no_grad():
        for _ in range(repeats):
            begin = time.perf_counter()
            sol = attack(model, images, labels)
            if images.is_cuda:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begin)
    verdict = judge(model, attack.attacked(images, sol.x), labels)
    return {
        "steps": attack.max_steps,
        "loss": verdict.loss.mean().item(),
        "accuracy": verdict.right.float().mean().item(),
        "f": sol.sweeps.f,
        "vjp": sol.sweeps.vjp,
        "seconds": median(seconds) / len(images),
    }


def race(
    model: Classifier,
    pgd: Attack,
    others: Mapping[str, Sequence[Attack]],
    images: Tensor,
    labels: Tensor,
    bar: Callable[..., Iterable[Any]],
) -> dict[str, dict[str, Any]]:
    """PGD, and of each other row of attacks the first that is as hard, or else the last."""
    timed(model, replace(pgd, max_steps=1), images, labels)  # a first call is slow
    goal = timed(model, pgd, images, labels, repeats=3)
    rows = {"pgd": {**goal, "reached": True, "tried": []}}
    for name, row in bar(list(others.items()), desc="time to PGD's loss"):
        tried = []
        for attack in row:
            tried.append(timed(model, attack, images, labels))
            if tried[-1]["loss"] >= AS_HARD * goal["loss"]:
                break
        final = timed(model, attack, images, labels, repeats=3)
        rows[name] = {**final, "reached": final["loss"] >= AS_HARD * goal["loss"], "tried": tried}
    return rows
