"""What is written and shown of every step: a journal, TensorBoard, a progress bar."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from tqdm import tqdm

from experiment import plain, write_text


class Journal:
    """A file with a line of JSON for every step done, also after an interruption.

    Args:
        path: of the file.
        step: steps done; lines of later steps, which will be done again, are removed.
    """

    def __init__(self, path: Path, step: int = 0) -> None:
        rows = [row for row in read_journal(path) if row["step"] <= step]
        if [row["step"] for row in rows] != list(range(1, step + 1)):
            raise ValueError(
                f"{path} must have a line for each of the {step} steps done; it has {len(rows)}. "
                "Put the file back, or start anew with another --out."
            )
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
        self._file = path.open("a", encoding="utf-8")

    def append(self, row: dict[str, Any]) -> None:
        """Add a step's line."""
        self._file.write(json.dumps(plain(row), allow_nan=False) + "\n")
        self._file.flush()

    def to_disk(self) -> None:
        """Wait until the lines would survive a power failure."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_journal(path: Path) -> list[dict[str, Any]]:
    """The rows of a journal; a last line that was cut off is left out."""
    if not path.exists():
        return []
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def has_tensorboard() -> bool:
    """Whether TensorBoard can be used."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError:
        return False
    return True


class Record:
    """Within ``with``: where the steps of a training are written and shown, by the first process.

    Args:
        folder: of the training.
        accelerator: that logs to TensorBoard.
        first, steps: done before, and in all.
        quiet: no progress bar.
    """

    def __init__(
        self, folder: Path, accelerator: Accelerator, *, first: int, steps: int, quiet: bool
    ) -> None:
        self.folder, self.accelerator = folder, accelerator
        self.first, self.steps, self.quiet = first, steps, quiet

    def __enter__(self) -> Record:
        if self.accelerator.is_main_process:
            self.journal = Journal(self.folder / "log.jsonl", self.first)
            self.bar = tqdm(
                initial=self.first, total=self.steps, disable=self.quiet, leave=False, desc="train"
            )
            if not self.accelerator.log_with:
                self.say("TensorBoard is not installed: losses are in log.jsonl alone.")
        # What was logged of steps that will be done again is purged.
        options = {"tensorboard": {"purge_step": self.first + 1}}
        self.accelerator.init_trackers("tensorboard", init_kwargs=options)
        return self

    def __exit__(self, *exception: object) -> None:
        for tracker in self.accelerator.trackers:
            tracker.finish()
        if self.accelerator.is_main_process:
            self.bar.close()
            self.journal.close()

    def add(self, row: dict[str, Any]) -> None:
        """Write and show a step."""
        if not self.accelerator.is_main_process:
            return
        self.journal.append(row)
        numbers = {name: value for name, value in row.items() if isinstance(value, float)}
        found = {f"evaluation/{name}": value for name, value in row.get("evaluation", {}).items()}
        self.accelerator.log({**numbers, **found}, step=row["step"])
        self.bar.set_postfix(loss=f"{row['loss']:.4g}", refresh=False)
        self.bar.update()
        if row["skipped"]:
            self.say(f"step {row['step']}: the gradient is not finite, and the step was skipped.")

    def say(self, text: str) -> None:
        """A line for people, where the bar does not overwrite it."""
        if self.accelerator.is_main_process:
            tqdm.write(text, file=sys.stderr)

    def to_disk(self) -> None:
        """Wait until what was written would survive a power failure."""
        if self.accelerator.is_main_process:
            self.journal.to_disk()
