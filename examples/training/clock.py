"""Equal time: how many steps of a training fit into it."""

from __future__ import annotations

import math
import time
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from torch import nn

from experiment import main_process, write_json


def steps_within(
    path: Path, objective: nn.Module, seconds: float, items: int, batch: int, *, resume: bool
) -> int:
    """How many training steps of ``objective``, which has so many items, take so long.

    Measured once and written to ``path``, so that a resumed run does as many; and by the first
    process for all: with several, call it after a ``training.fit``, which has set them up.
    """
    if resume and path.exists():
        return int(path.read_text(encoding="utf-8"))
    device = PartialState().device
    objective.to(device)
    indices = torch.arange(min(batch, items), device=device)
    before = {name: buffer.clone() for name, buffer in objective.named_buffers()}
    took = []
    for _ in range(4):
        begin = time.perf_counter()
        loss, _ = objective(indices)
        loss.backward()
        loss.item()  # waits for the device
        took.append(time.perf_counter() - begin)
    objective.zero_grad(set_to_none=True)
    for name, buffer in objective.named_buffers():
        buffer.copy_(before[name])
    steps = max(1, math.floor(seconds / min(took[1:])))  # the first call of anything is slow
    agreed = [steps]
    broadcast_object_list(agreed)
    if main_process():
        write_json(path, agreed[0])
    return agreed[0]
