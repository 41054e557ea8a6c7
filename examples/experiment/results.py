"""Results for programs and for people: JSON that is written whole or not at all, and tables."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import implicitopt


def plain(value: Any) -> Any:
    """The value in the types that JSON knows; numbers that it does not (NaN, ±∞) become None.

    >>> plain({"codes": torch.zeros(2), "out": Path("out"), "psnr": float("inf")})
    {'codes': [0.0, 0.0], 'out': 'out', 'psnr': None}
    """
    if isinstance(value, Tensor | np.ndarray | np.generic):
        value = value.tolist()
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, str | int):
        return value
    raise TypeError(
        f"results must be numbers, text, paths, tensors, or lists, dicts and dataclasses of them; "
        f"got {value!r}. Convert it first."
    )


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file that is whole at every moment, even if the process is killed."""
    text = json.dumps(plain(value), indent=1, allow_nan=False) + "\n"
    write_text(path, text)


def write_text(path: Path, text: str) -> None:
    """Write a file beside the path, bring it to the disk, and move it there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def main_process() -> bool:
    """Whether this is the only process, or the first of those that a launcher started."""
    return os.environ.get("RANK", "0") == "0"


def machine() -> dict[str, Any]:
    """What a reader of timings needs to know of the machine, and nothing that names it."""
    cuda = torch.cuda.is_available()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "implicitopt": implicitopt.__version__,
        "platform": f"{platform.system()} {platform.machine()}",
        "device": torch.cuda.get_device_name() if cuda else _processor(),
        "threads": torch.get_num_threads(),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
    }


def _processor() -> str:
    """The CPU's name, where it can be found."""
    facts = Path("/proc/cpuinfo")  # Linux, where platform.processor() says nothing
    if facts.exists():
        for line in facts.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def table(rows: Iterable[Sequence[Any]], header: Sequence[str]) -> str:
    """Aligned columns, those of numbers to the right.

    >>> print(table([("joint", 0.123456, 80), ("nested", 0.5, 4360)], ("solver", "loss", "sweeps")))
    solver    loss  sweeps
    joint   0.1235      80
    nested     0.5    4360
    """
    rows = list(rows)
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"a row must have {len(header)} cells, {header}; got {row!r}.")
    columns = []
    for title, *values in zip(header, *rows, strict=True):
        cells = [title, *map(_text, values)]
        width = max(map(len, cells))
        numeric = values and all(isinstance(value, int | float | None) for value in values)
        columns.append([cell.rjust(width) if numeric else cell.ljust(width) for cell in cells])
    return "\n".join("  ".join(line).rstrip() for line in zip(*columns, strict=True))


def _text(value: Any) -> str:
    """A cell: four digits are enough, and – is nothing."""
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
