"""One step of training, in one process or in one of several."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn

from .plan import Training, batch_at, seed_of

#: What a step logs of itself.
RESERVED = {"step", "loss", "rate", "gradient", "skipped", "evaluation"}
#: Steps in a row whose gradients may be non-finite. In fp16 the first few are, by design.
MOST_SKIPS = 20


class Forward(nn.Module):
    """The objective as Accelerate wraps it; what is logged leaves it without its graph."""

    def __init__(self, objective: nn.Module) -> None:
        super().__init__()
        self.objective = objective

    def forward(self, indices: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        loss, logged = self.objective(indices)
        if not isinstance(loss, Tensor) or loss.shape != () or not loss.requires_grad:
            raise ValueError(
                "the objective must return (loss, logged), loss being a tensor of shape () with a "
                f"gradient; got {loss!r}. Average over the items and do not detach."
            )
        numbers = {name: torch.as_tensor(value).detach() for name, value in logged.items()}
        for name, value in numbers.items():
            if name in RESERVED or value.numel() != 1:
                raise ValueError(
                    f"logged must have single numbers, under names other than {sorted(RESERVED)}; "
                    f"got {name}: {value!r}."
                )
        return loss, {name: value.reshape(()) for name, value in numbers.items()}


class Loop:
    """The model, its optimizer and the steps.

    Args:
        accelerator: devices, processes and precision.
        objective, training, items, keep: as for ``fit``.
        seed: of the batches and of all that is random within a step.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        objective: nn.Module,
        training: Training,
        seed: int,
        items: int,
        keep: Sequence[str],
    ) -> None:
        self.accelerator, self.objective, self.training = accelerator, objective, training
        self.seed, self.items, self.keep = seed, items, keep
        self.parameters = [p for p in objective.parameters() if p.requires_grad]
        self.skips = 0
        self._check()
        optimizer = torch.optim.Adam(self.parameters, lr=training.rate)
        with warnings.catch_warnings():
            # Accelerate sets DDP's broadcast_buffers, which has a successor in the newest torch.
            warnings.simplefilter("ignore", FutureWarning)
            self.model, self.optimizer = accelerator.prepare(Forward(objective), optimizer)

    def _check(self) -> None:
        """Raise if the arguments do not fit together."""
        if not self.parameters:
            raise ValueError("the objective has no parameter that requires a gradient.")
        least = self.items // math.ceil(self.items / self.training.batch)
        if least < self.accelerator.num_processes:
            raise ValueError(
                f"a batch must have an item for each of {self.accelerator.num_processes} "
                f"processes; the smallest has {least}. Raise batch or start fewer processes."
            )
        for name, rows in zip(self.keep, self._kept(), strict=True):
            if len(rows) != self.items or name not in self.objective.state_dict():
                raise ValueError(
                    f"keep: the buffer {name} must be persistent and have a row for each of "
                    f"{self.items} items; its shape is {tuple(rows.shape)}."
                )

    def _kept(self) -> list[Tensor]:
        """The buffers with a row for each item."""
        return [self.objective.get_buffer(name) for name in self.keep]

    def step(
        self, step: int, wishes: Callable[[], Sequence[bool]]
    ) -> tuple[dict[str, Any], list[bool]]:
        """Do a step, counted from 1; what to log, and which wishes any process then has."""
        processes, process = self.accelerator.num_processes, self.accelerator.process_index
        batch = batch_at(step - 1, self.items, self.training.batch, self.seed)
        batch = batch.to(self.accelerator.device)
        mine = batch.tensor_split(processes)[process]
        set_seed(seed_of(self.seed, 1, step, process))
        rate = self.training.rate_at(step - 1)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        before = [rows[batch] for rows in self._kept()]
        loss, logged = self.model(mine)
        share = len(mine) / len(batch)
        length = self._update(loss * (share * processes))  # DDP averages over the processes
        skipped = not math.isfinite(length)
        self._join(batch, mine, before if skipped else None)
        self._count(step, skipped)
        means, granted = self._means({"loss": loss.detach(), **logged}, share, wishes())
        facts = {"step": step, "rate": rate, "gradient": length, "skipped": skipped}
        return facts | means, granted

    def _update(self, loss: Tensor) -> float:
        """Step the parameters, unless the gradient is not finite; its norm."""
        self.optimizer.zero_grad()
        self.accelerator.backward(loss)
        norm = self.accelerator.clip_grad_norm_(self.parameters, self.training.clip or math.inf)
        length = float(norm)
        # In fp16 the loss scaler skips by itself, and must know to lower the scale.
        if math.isfinite(length) or self.accelerator.scaler is not None:
            self.optimizer.step()
        return length

    @torch.no_grad()
    def _join(self, batch: Tensor, mine: Tensor, before: list[Tensor] | None) -> None:
        """Give every process the rows that each wrote; or all of them those from before."""
        processes, process = self.accelerator.num_processes, self.accelerator.process_index
        for k, rows in enumerate(self._kept()):
            if before is None:
                new = torch.zeros_like(rows[batch])
                new.tensor_split(processes)[process].copy_(rows[mine])
                rows[batch] = self.accelerator.reduce(new)
            else:
                rows[batch] = before[k]

    def _count(self, step: int, skipped: bool) -> None:
        """Raise after many steps in a row that changed nothing."""
        self.skips = self.skips + 1 if skipped else 0
        if self.skips == MOST_SKIPS:
            raise FloatingPointError(
                f"the gradient must be finite; it was not in {MOST_SKIPS} steps in a row, the last "
                f"being step {step}. Lower the learning rate, or keep the map more contractive."
            )

    def _means(
        self, logged: dict[str, Tensor], share: float, wishes: Sequence[bool]
    ) -> tuple[dict[str, float], list[bool]]:
        """The logged numbers over the whole batch, and the wishes of all processes."""
        loss = logged["loss"]
        values = torch.stack([value.to(loss) for value in logged.values()]) * share
        flags = torch.tensor(wishes).to(loss)
        found = self.accelerator.reduce(torch.cat([values, flags])).tolist()
        means = dict(zip(logged, found, strict=False))
        return means, [flag > 0 for flag in found[len(logged) :]]
