"""fit: start or resume, do the steps, save, record."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs
from torch import nn

from experiment import Run

from .checkpoints import Checkpoint, Checkpoints
from .interruption import Interruption
from .loop import Loop
from .plan import Training
from .record import Record, has_tensorboard, read_journal


@dataclass(frozen=True)
class Result:
    """What became of a training.

    Args:
        losses: of every step; NaN where it was not finite.
        evaluations: what ``evaluate`` returned each time, and the "step".
        skipped: steps whose gradient was not finite, and which changed nothing.
        seconds: of training, with checkpoints and evaluations and without interruptions.
    """

    losses: list[float]
    evaluations: list[dict[str, float]]
    skipped: int
    seconds: float


def fit(
    objective: nn.Module,
    run: Run[Any],
    training: Training,
    *,
    items: int,
    keep: Sequence[str] = (),
    evaluate: Callable[[nn.Module], Mapping[str, float]] | None = None,
    every: int = 0,
    save_steps: int = 0,
    save_seconds: float = 600.0,
    name: str = "",
    find_unused_parameters: bool = False,
) -> Result:
    """Train the objective's parameters in place, with checkpoints and a journal.

    Args:
        objective: ``objective(indices) -> (loss, logged)``. ``indices`` are the step's items,
            ``(n,)`` int64 on the objective's device; ``loss`` is the mean over them, shape ``()``;
            ``logged`` is a dict of numbers, means over them too. Everything happens in this call,
            ``implicitopt.solve`` included: DistributedDataParallel joins the gradients of those
            parameters only that are used within it. Its data are buffers, with
            ``persistent=False``, so that they are on its device and not in checkpoints.
        run: where to, the seed, and whether to resume.
        training: how long and how fast.
        items: how many there are to train on.
        keep: names of buffers with a row for each item, such as latent codes, of which the
            objective overwrites the rows of ``indices``. They are saved with the parameters, and
            rows that other processes wrote are copied from them after every step. Other buffers
            must not change.
        evaluate: ``evaluate(objective) -> dict of numbers``, without gradients and in evaluation
            mode, after the last step. Every process calls it; the first one's numbers are kept.
        every: also evaluate every so many steps; 0: do not.
        save_steps, save_seconds: how often to save; 0 steps: by time alone.
        name: of this training, in a script with several: a folder within the run's.
        find_unused_parameters: of DistributedDataParallel: True if some step does not use some
            parameter.

    Writes ``checkpoints/``, ``log.jsonl`` (a line a step) and ``tensorboard/``. Ctrl-C and SIGTERM
    end the process after the step in hand and a checkpoint, with status 130 and the command to
    resume; a second Ctrl-C ends it at once.

    Raises:
        FileExistsError: there are checkpoints, and ``run.resume`` is False.
        FileNotFoundError: there are none, and it is True.
        ValueError: they are of another configuration, or an argument is not as described above.
        FloatingPointError: gradients were not finite for many steps in a row.
    """
    folder = run.out / name
    accelerator = _accelerator(training, folder, find_unused_parameters)
    loop = Loop(accelerator, objective, training, run.seed, items, tuple(keep))
    configuration = {**run.configuration, "training": training, "items": items}
    store = Checkpoints(folder / "checkpoints", configuration)
    start = _start(store, run)
    accelerator.wait_for_everyone()  # before there is anything that another would find
    if start is not None:
        start.load(objective, loop.optimizer, accelerator.scaler)
    first, earlier = (start.step, start.seconds) if start is not None else (0, 0.0)
    begin, saved = time.perf_counter(), time.perf_counter()

    def save(step: int) -> None:
        if accelerator.is_main_process:
            seconds = earlier + time.perf_counter() - begin
            store.save(objective, loop.optimizer, accelerator.scaler, step, seconds)
        accelerator.wait_for_everyone()

    save(first)  # so that there is one to resume from, whenever the run is killed
    record = Record(folder, accelerator, first=first, steps=training.steps, quiet=run.quiet)
    objective.train()

    def wishes() -> tuple[bool, bool]:
        """Whether to stop, and whether to save by the first process's clock."""
        late = time.perf_counter() - saved > save_seconds
        return interruption.wanted, accelerator.is_main_process and late

    with Interruption() as interruption, record:
        for step in range(first + 1, training.steps + 1):
            row, (stop, due) = loop.step(step, wishes)
            last = step == training.steps
            if evaluate is not None and (last or (every and step % every == 0)):
                row["evaluation"] = _evaluated(objective, evaluate)
            record.add(row)
            if stop or due or last or (save_steps and step % save_steps == 0):
                record.to_disk()
                save(step)
                saved = time.perf_counter()
            if stop:
                record.say(f"Stopped after step {step} of {training.steps}. To go on:")
                record.say(f"  {run.resume_command}")
                raise SystemExit(130)
    return _result(folder, earlier + time.perf_counter() - begin)


def _accelerator(training: Training, folder: Path, find_unused_parameters: bool) -> Accelerator:
    """Devices, processes, precision and TensorBoard."""
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    # Accelerate would take processes without GPUs for so many runs of one process each.
    cpu = several and not torch.cuda.is_available()
    # What the buffers hold is kept equal by Loop; sending all of them each step would be slow.
    ddp = DistributedDataParallelKwargs(
        broadcast_buffers=False, find_unused_parameters=find_unused_parameters
    )
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision=training.mixed_precision,
        log_with="tensorboard" if has_tensorboard() else None,
        project_dir=folder,
        kwargs_handlers=[ddp],
    )
    if training.mixed_precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError('mixed_precision "fp16" needs a GPU; on a CPU use "bf16" or "no".')
    return accelerator


def _start(store: Checkpoints, run: Run[Any]) -> Checkpoint | None:
    """The checkpoint to go on from; None to begin."""
    if not run.resume:
        store.refuse()
        return None
    elsewhere = any(run.out.rglob("checkpoints/step-*"))
    if elsewhere and not store.found():
        return None  # the script was interrupted in an earlier one of its trainings
    return store.resume()


def _evaluated(
    objective: nn.Module, evaluate: Callable[[nn.Module], Mapping[str, float]]
) -> dict[str, float]:
    """What the evaluation finds."""
    objective.eval()
    with torch.no_grad():
        found = {name: float(value) for name, value in evaluate(objective).items()}
    objective.train()
    return found


def _result(folder: Path, seconds: float) -> Result:
    """What the journal says."""
    rows = read_journal(folder / "log.jsonl")
    return Result(
        losses=[math.nan if row["loss"] is None else row["loss"] for row in rows],
        evaluations=[
            {"step": row["step"], **row["evaluation"]} for row in rows if "evaluation" in row
        ],
        skipped=sum(row["skipped"] for row in rows),
        seconds=seconds,
    )
