"""Tasks of N classes with K labelled drawings each, every one drawn from a number alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn

from data import Characters
from training.plan import seed_of


@dataclass(frozen=True, eq=False)
class Episode:
    """Some tasks: what each is learned from (support), and what is asked then (query).

    Attributes:
        support: ``(T, ways · shots, 1, size, size)``, class by class.
        support_labels: ``(T, ways · shots)``, int64.
        query: ``(T, ways · queries, 1, size, size)``, drawings other than those of the support.
        query_labels: ``(T, ways · queries)``.
    """

    support: Tensor
    support_labels: Tensor
    query: Tensor
    query_labels: Tensor

    def __len__(self) -> int:
        return len(self.support)

    @property
    def images(self) -> Tensor:
        """Support, then query."""
        return torch.cat([self.support, self.query], dim=1)

    @property
    def labels(self) -> Tensor:
        """Of ``images``."""
        return torch.cat([self.support_labels, self.query_labels], dim=1)


class Tasks(nn.Module):
    """All tasks that can be made of some characters; ``tasks(numbers)`` draws those numbers.

    A task's classes come in random order, so that which class is label 0 is a matter of the task.

    Args:
        characters: to draw from.
        ways: classes of a task.
        shots, queries: drawings of each class to learn from and to be asked about.
        seed: with a task's number all that decides on it.
    """

    def __init__(
        self, characters: Characters, ways: int, shots: int, queries: int, seed: int
    ) -> None:
        super().__init__()
        classes, drawers = characters.pixels.shape[:2]
        if not 2 <= ways <= classes:
            raise ValueError(f"ways must lie in [2, {classes}], the classes there are; got {ways}.")
        if min(shots, queries) < 1 or shots + queries > drawers:
            raise ValueError(
                f"shots and queries must be positive and add up to at most {drawers}, the drawings "
                f"of a class; got {shots} and {queries}."
            )
        self.ways, self.shots, self.queries, self.seed = ways, shots, queries, seed
        self.register_buffer("pixels", characters.pixels, persistent=False)

    def draw(self, number: int) -> tuple[Tensor, Tensor]:
        """The classes of a task, ``(ways,)``, and who drew them, ``(ways, shots + queries)``."""
        generator = torch.Generator().manual_seed(seed_of(self.seed, number))
        classes, drawers = self.pixels.shape[:2]
        chosen = torch.randperm(classes, generator=generator)[: self.ways]
        orders = torch.rand(self.ways, drawers, generator=generator).argsort(dim=1)
        return chosen, orders[:, : self.shots + self.queries]

    def forward(self, numbers: Tensor) -> Episode:
        drawn = [self.draw(number) for number in numbers.tolist()]
        chosen, orders = (torch.stack(part) for part in zip(*drawn, strict=True))
        images = self.pixels[chosen[:, :, None], orders]
        labels = torch.arange(self.ways, device=images.device).repeat(len(images), 1)
        parts = images.split([self.shots, self.queries], dim=2)
        support, query = (rearrange(part, "t k s c h w -> t (k s) c h w") for part in parts)
        return Episode(
            support,
            labels.repeat_interleave(self.shots, dim=1),
            query,
            labels.repeat_interleave(self.queries, dim=1),
        )
