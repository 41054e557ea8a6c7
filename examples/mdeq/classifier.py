"""Classifiers: of images alone, and of images given a vector that says what the task is."""

from __future__ import annotations

from collections.abc import Callable

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from mdeq.cell import Cell, halvings
from mdeq.injection import ImageInjection


class Head(nn.Module):
    """Logits from a state: each branch normed, pooled to about ``pool``×``pool``, and all read."""

    def __init__(
        self, shapes: tuple[tuple[int, int, int], ...], classes: int, pool: int, groups: int
    ) -> None:
        super().__init__()
        windows = [-(-size // pool) for _, size, _ in shapes]
        self.branches = nn.ModuleList(
            nn.Sequential(
                nn.GroupNorm(groups, channels),
                nn.ReLU(),
                nn.AvgPool2d(window, ceil_mode=True),
                nn.Flatten(),
            )
            for (channels, _, _), window in zip(shapes, windows, strict=True)
        )
        features = sum(c * (-(-s // w)) ** 2 for (c, s, _), w in zip(shapes, windows, strict=True))
        self.linear = nn.Linear(features, classes)

    def forward(self, z: tuple[Tensor, ...]) -> Tensor:
        parts = [branch(part) for branch, part in zip(self.branches, z, strict=True)]
        return self.linear(torch.cat(parts, dim=1))


class Classifier(nn.Module):
    """The class of an image is read from the state z = f(z, image).

    Args:
        image: (channels, side) of the images.
        channels: of each branch, finest first; ``(24, 24)`` for MNIST and CIFAR in the paper.
        classes: how many.
        stride: the finest branch is at 1/``stride`` of the image's size.
        pool: the side that a branch is pooled to before the logits are read from it.
        expansion, groups: of the cell.

    An attack looks for the change δ of an image: its map is ``lambda z, δ: model.f(z, image + δ)``.
    Where the image stays as it is, ``fixed_point(model.cell, model.inject(image),
    model.start(image))`` makes the injection once.
    """

    def __init__(
        self,
        image: tuple[int, int],
        channels: tuple[int, ...] = (24, 24),
        classes: int = 10,
        *,
        stride: int = 1,
        pool: int = 4,
        expansion: int = 5,
        groups: int = 4,
    ) -> None:
        super().__init__()
        colors, side = image
        sizes = halvings(-(-side // stride), len(channels))
        self.cell = Cell(channels, sizes, expansion, groups)
        self.inject = ImageInjection(colors, channels, stride, groups)
        self.head = Head(self.cell.shapes, classes, pool, groups)

    def f(self, z: tuple[Tensor, ...], image: Tensor) -> tuple[Tensor, ...]:
        """The layer; images are ``(B, C, H, W)``."""
        return self.cell(z, self.inject(image))

    def start(self, image: Tensor) -> tuple[Tensor, ...]:
        """A state to start from: zeros."""
        return self.cell.start(image, len(image))

    def logits(self, z: tuple[Tensor, ...]) -> Tensor:
        """``(B, classes)``."""
        return self.head(z)


class FilmClassifier(nn.Module):
    """A classifier that a task vector v adapts to a new task, without a change of its weights.

    One problem is one *task* of several images: images are ``(T, S, C, H, W)``, every leaf of the
    state too, and v is ``(T, task)``.

    Args:
        image: (channels, side) of the images.
        channels: of each branch, finest first; ``(64, 128)`` for Omniglot in the paper.
        ways: the classes of a task.
        task: the length of v; a multiple of the number of branches.
        stride, pool, expansion, groups: as for ``Classifier``.

    >>> import torch, implicitopt
    >>> model = FilmClassifier((1, 28), (8, 8), ways=5, task=10, stride=2)
    >>> images, v = torch.rand(2, 25, 1, 28, 28), torch.zeros(2, 10)
    >>> z = implicitopt.fixed_point(model.bind(images), v, model.start(images))
    >>> model.logits(z).shape
    torch.Size([2, 25, 5])
    """

    def __init__(
        self,
        image: tuple[int, int] = (1, 28),
        channels: tuple[int, ...] = (64, 128),
        ways: int = 5,
        task: int = 400,
        *,
        stride: int = 1,
        pool: int = 4,
        expansion: int = 5,
        groups: int = 4,
    ) -> None:
        super().__init__()
        colors, side = image
        sizes = halvings(-(-side // stride), len(channels))
        self.task = task
        self.cell = Cell(channels, sizes, expansion, groups, film=task)
        self.inject = ImageInjection(colors, channels, stride, groups)
        self.head = Head(self.cell.shapes, ways, pool, groups)

    def bind(self, images: Tensor) -> Callable[[tuple[Tensor, ...], Tensor], tuple[Tensor, ...]]:
        """The map f(z, v) of these images; their injection is made here, once."""
        tasks, shots = images.shape[:2]
        injection = self.inject(rearrange(images, "t s c h w -> (t s) c h w"))

        def f(z: tuple[Tensor, ...], v: Tensor) -> tuple[Tensor, ...]:
            z = tuple(rearrange(branch, "t s c h w -> (t s) c h w") for branch in z)
            z = self.cell(z, injection, repeat(v, "t d -> (t s) d", s=shots))
            return tuple(rearrange(branch, "(t s) c h w -> t s c h w", t=tasks) for branch in z)

        return f

    def start(self, images: Tensor) -> tuple[Tensor, ...]:
        """A state to start from: zeros."""
        return self.cell.start(images, *images.shape[:2])

    def logits(self, z: tuple[Tensor, ...]) -> Tensor:
        """``(T, S, ways)``."""
        tasks = len(z[0])
        logits = self.head(tuple(rearrange(branch, "t s c h w -> (t s) c h w") for branch in z))
        return rearrange(logits, "(t s) k -> t s k", t=tasks)
