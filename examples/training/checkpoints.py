"""Checkpoints: what a run needs to go on.

A checkpoint is a folder, ``step-000123``, of

    model.safetensors     the parameters and buffers of the objective
    optimizer.pt          the optimizer (and, in fp16, the loss scale)
    configuration.json    what determines the results
    checkpoint.json       the step, the seconds so far, and the size of every other file

It is written under another name and then renamed, so it is whole or not there at all. Reading one
cannot run code: weights are safetensors, and ``torch.load`` is restricted to tensors and plain
containers.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from torch import nn

from experiment import plain, write_json

#: Checkpoints that are kept; the newest might be on a failing disk.
KEPT = 2


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint: its folder, the steps done, and the seconds that they took."""

    folder: Path
    step: int
    seconds: float

    def load(self, objective: nn.Module, optimizer: Any, scaler: Any | None) -> None:
        """Put the state back; parameters stay the same objects on their devices."""
        load_model(objective, self.folder / "model.safetensors", strict=True)
        path = self.folder / "optimizer.pt"
        state = torch.load(path, map_location="cpu", weights_only=True)
        optimizer.load_state_dict(state["optimizer"])
        if scaler is not None:
            scaler.load_state_dict(state["scaler"])


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one training, in one folder.

    Args:
        folder: that has the checkpoints.
        configuration: what determines the results; it must not change from one to the next.
    """

    folder: Path
    configuration: dict[str, Any]

    def found(self) -> list[Path]:
        """The folders of checkpoints, newest first, whole or not."""
        named = [
            path for path in self.folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name)
        ]
        return sorted(named, key=lambda path: int(path.name[5:]), reverse=True)

    def newest(self) -> Checkpoint | None:
        """The newest whole one."""
        return next(filter(None, map(_read, self.found())), None)

    def refuse(self) -> None:
        """Raise if there are any: a new run would overwrite them."""
        if self.found():
            raise FileExistsError(
                f"{self.folder} has checkpoints of an earlier run. Pass --resume to go on from "
                "them, or another --out to start anew."
            )

    def resume(self) -> Checkpoint:
        """The newest whole one, of a run with the same configuration."""
        newest = self.newest()
        if newest is None:
            broken = f" ({len(self.found())} incomplete ones are ignored)" if self.found() else ""
            raise FileNotFoundError(
                f"--resume needs a checkpoint; {self.folder} has none{broken}. Leave --resume out "
                "to start anew, with another --out if this one is in use."
            )
        path = newest.folder / "configuration.json"
        before = flat(json.loads(path.read_text(encoding="utf-8")))
        now = flat(plain(self.configuration))
        names = [n for n in {**before, **now} if before.get(n, "absent") != now.get(n, "absent")]
        if names:
            differing = "; ".join(
                f"{name} was {before.get(name, 'absent')!r} and is now {now.get(name, 'absent')!r}"
                for name in names
            )
            raise ValueError(
                f"a run is resumed with the settings that it began with; here {differing}. Give "
                "those of the checkpoint, or another --out to start anew."
            )
        return newest

    def save(
        self, objective: nn.Module, optimizer: Any, scaler: Any | None, step: int, seconds: float
    ) -> None:
        """Write one, then remove those that are not kept."""
        final = self.folder / f"step-{step:06d}"
        if (there := _read(final)) and there.step == step:
            return
        part = self.folder / "unfinished"
        for rest in (part, final):
            shutil.rmtree(rest, ignore_errors=True)
        part.mkdir(parents=True)
        save_model(objective, str(part / "model.safetensors"))
        state = {"optimizer": optimizer.state_dict(), "scaler": scaler and scaler.state_dict()}
        torch.save(state, part / "optimizer.pt")
        write_json(part / "configuration.json", self.configuration)
        sizes = {path.name: path.stat().st_size for path in part.iterdir()}
        for name in sizes:
            _to_disk(part / name)
        write_json(part / "checkpoint.json", {"step": step, "seconds": seconds, "files": sizes})
        os.replace(part, final)
        for old in [path for path in self.found() if _read(path)][KEPT:]:
            shutil.rmtree(old)


def _read(folder: Path) -> Checkpoint | None:
    """The checkpoint in the folder, if it is whole."""
    try:
        facts = json.loads((folder / "checkpoint.json").read_text(encoding="utf-8"))
        sizes = {name: (folder / name).stat().st_size for name in facts["files"]}
    except (OSError, ValueError, KeyError):
        return None
    return Checkpoint(folder, facts["step"], facts["seconds"]) if sizes == facts["files"] else None


def _to_disk(path: Path) -> None:
    """Wait until the file would survive a power failure."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one, with dotted names.

    >>> flat({"seed": 0, "settings": {"steps": 10}})
    {'seed': 0, 'settings.steps': 10}
    """
    out = {}
    for name, value in tree.items():
        out |= (
            flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
        )
    return out
