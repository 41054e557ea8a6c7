"""The generators that examples/generative.py trained; they are trained first if none are named."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import generative
from experiment import Run
from generators.architecture import Architecture, load


def generator(run: Run[Any], methods: Sequence[str]) -> Path:
    """The folder that ``run.settings.generator`` names.

    None: one within the run's, where generators are trained by these methods, as they are by the
    preset of the same name.
    """
    if run.settings.generator is not None:
        return Path(run.settings.generator)
    folder = run.out / "generator"
    if not (folder / "results.json").exists():
        arguments = [f"--preset={run.preset}", f"--out={folder}", f"--seed={run.seed}"]
        arguments += [f"--solver={run.solver}", f"--methods={','.join(methods)}"]
        arguments += [f"--dataset={run.settings.dataset}", "--race-sweeps=10", "--race-updates=1"]
        arguments += [f"--data={run.data}"] * (run.data is not None)
        going = run.resume and any(folder.rglob("checkpoints/step-*"))
        arguments += ["--resume"] * going + ["--quiet"] * run.quiet
        generative.main(arguments)
    return folder


def read_models(folder: Path, methods: Sequence[str]) -> tuple[Architecture, dict[str, nn.Module]]:
    """The generators in a folder by the methods that trained them, and what they have in common."""
    found = {name: load(folder, f"decoder-{name}") for name in methods}
    architecture = next(iter(found.values()))[0]
    return architecture, {name: decoder.to(device()) for name, (_, decoder) in found.items()}


def device() -> torch.device:
    """The one that ``fit`` trains on, in a single process."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
