"""What a training step does, as a function of the seed and the step's number alone.

Nothing else decides on a step's items, random numbers and learning rate, so a run that is resumed
needs no state of a generator or of a scheduler.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Training:
    """How long and how fast to train, with Adam.

    Args:
        steps: updates of the weights.
        batch: items a step at most, over all processes. An epoch is cut into batches of equal
            size, or nearly.
        rate: the learning rate at its peak.
        schedule: "cosine", which falls to 0 over the steps, or "constant".
        warmup: steps over which the rate rises to its peak.
        clip: the longest gradient, as a norm; None: any.
        mixed_precision: "no", "bf16" or "fp16".
    """

    steps: int
    batch: int
    rate: float
    schedule: str = "cosine"
    warmup: int = 0
    clip: float | None = None
    mixed_precision: str = "no"

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "rate"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive; got {getattr(self, name)!r}")
        if not 0 <= self.warmup < self.steps:
            raise ValueError(f"warmup must lie in [0, {self.steps}), the steps; got {self.warmup}")
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"clip must be positive or None; got {self.clip!r}")
        choices = {"schedule": ("cosine", "constant"), "mixed_precision": ("no", "bf16", "fp16")}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {known}; got {getattr(self, name)!r}")

    def rate_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        if step < self.warmup:
            return self.rate * (step + 1) / self.warmup
        done = (step - self.warmup) / (self.steps - self.warmup)
        return self.rate * (
            0.5 * (1 + math.cos(math.pi * done)) if self.schedule == "cosine" else 1
        )


def seed_of(*parts: int) -> int:
    """A seed made of several numbers; seeds of different numbers have nothing in common."""
    return int(np.random.SeedSequence(parts).generate_state(1)[0])


def batch_at(step: int, items: int, batch: int, seed: int) -> Tensor:
    """The items of a step: an epoch is a random order of all, cut into batches of equal size."""
    per_epoch = math.ceil(items / batch)
    epoch, part = divmod(step, per_epoch)
    generator = torch.Generator().manual_seed(seed_of(seed, 0, epoch))
    return torch.randperm(items, generator=generator).tensor_split(per_epoch)[part]
