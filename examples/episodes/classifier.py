"""The model of a task: an equilibrium classifier, and what of it is the task's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdeq import FilmClassifier

Vector = dict[str, Tensor]
State = tuple[Tensor, ...]


def deep_stem(colors: int, width: int, layers: int, stride: int) -> nn.Sequential:
    """Convolutions with group norm; the first ones halve the picture, down to 1/``stride``."""
    stem: list[nn.Module] = []
    for k in range(layers):
        halve = stride > 1
        stride //= 2 if halve else 1
        stem += [
            nn.Conv2d(width if k else colors, width, 3, padding=1),
            nn.GroupNorm(4, width),
            nn.ReLU(),
        ]
        stem += [nn.MaxPool2d(2, ceil_mode=True)] * halve
    return nn.Sequential(*stem)


class TaskClassifier(FilmClassifier):
    """A `FilmClassifier`, and all that is a task's own in one vector x.

    x is a dict: "film" ``(T, task)``, which enters the equilibrium, and, where the head is the
    task's, "head" ``(T, ways, features)``, the classes' directions. These are 0 at the start, so
    that the model has no order of the classes to unlearn, and a task may have any number of them;
    with a shared head, which is the paper's, "film" alone must say which class is which.

    Args:
        head: "task" or "shared".
        stem: convolutions from an image to the injection, the paper's being 1. They are made once
            an image and not once a sweep, and every doubling of ``stride`` is shared among them.
        sharpness: with head="task", by how much a logit changes along a class's direction.
        options: those of `FilmClassifier`.
    """

    def __init__(
        self,
        head: Literal["task", "shared"],
        stem: int = 1,
        sharpness: float = 16.0,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if stem > 1:
            colors, width = options["image"][0], options["channels"][0]
            self.inject.stem = deep_stem(colors, width, stem, options["stride"])
        self.ways, self.own_head = options["ways"], head == "task"
        if self.own_head:
            self.features = self.head.linear.in_features
            for branch in self.head.branches:
                # Features that are all positive point nearly the same way.
                branch[1] = nn.Identity()
            self.head.linear = nn.Identity()
            self.log_sharpness = nn.Parameter(torch.tensor(sharpness).log())

    def blank(self, images: Tensor, ways: int | None = None) -> Vector:
        """The vector of a task of which nothing is known; of so many classes, if not the usual."""
        x = {"film": images.new_zeros(len(images), self.task)}
        if self.own_head:
            x["head"] = images.new_zeros(len(images), ways or self.ways, self.features)
        return x

    def map(self, images: Tensor) -> Callable[[State, Vector], State]:
        """f(z, x) of these images."""
        f = self.bind(images)
        return lambda z, x: f(z, x["film"])

    def read(self, z: State, x: Vector) -> Tensor:
        """The logits, ``(T, S, ways)``."""
        found = self.logits(z)
        if not self.own_head:
            return found
        # Of unit length, so that a curvature in "head" does not depend on the features' size.
        along = F.normalize(found, dim=-1) @ x["head"].mT
        return self.log_sharpness.exp() * along
