"""What all learners have in common: an objective to train by, and an accuracy on new tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import sqrt

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .tasks import Episode, Tasks


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Of each task, the mean over its images: ``(T, S, ways)`` and ``(T, S)`` to ``(T,)``."""
    each = F.cross_entropy(rearrange(logits, "t s k -> t k s"), labels, reduction="none")
    return each.mean(dim=1)


def share_right(logits: Tensor, labels: Tensor) -> Tensor:
    """The accuracy on each task, ``(T,)``."""
    return (logits.argmax(dim=-1) == labels).float().mean(dim=1)


class Learner(nn.Module):
    """Answers a task's queries after a look at its support; trained on the answers' loss.

    Called with the numbers of training tasks it is the objective of ``training.fit``.
    """

    def __init__(self, tasks: Tasks) -> None:
        super().__init__()
        self.tasks = tasks

    def logits(self, episode: Episode) -> Tensor:
        """Of the query images, ``(T, Q, ways)``."""
        raise NotImplementedError

    def loss(self, episode: Episode) -> tuple[Tensor, dict[str, Tensor]]:
        """What is minimized, ``()``, and numbers to log."""
        logits = self.logits(episode)
        accuracy = share_right(logits.detach(), episode.query_labels).mean()
        return cross_entropy(logits, episode.query_labels).mean(), {"accuracy": accuracy}

    def forward(self, numbers: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return self.loss(self.tasks(numbers))


@torch.no_grad()
def accuracies(
    learner: Learner,
    tasks: Tasks,
    count: int,
    batch: int,
    bar: Callable[[Iterable[Tensor]], Iterable[Tensor]] = iter,
) -> Tensor:
    """The accuracy on each of the first ``count`` of ``tasks``, ``(count,)``."""
    found = []
    for numbers in bar(torch.arange(count).split(batch)):
        episode = tasks(numbers)
        found.append(share_right(learner.logits(episode), episode.query_labels).cpu())
    return torch.cat(found)


def interval(values: Tensor) -> tuple[float, float]:
    """The mean, and half the width of its 95 % confidence interval: 1.96 standard errors."""
    half = 1.96 * values.double().std().item() / sqrt(len(values)) if len(values) > 1 else 0.0
    return values.double().mean().item(), half
