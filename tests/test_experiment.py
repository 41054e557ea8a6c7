"""The command line of the examples, and what their runs leave behind."""

from __future__ import annotations

import doctest
import importlib
import json
import math
import os
import platform
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch

import implicitopt

pytest.importorskip("accelerate")
experiment = importlib.import_module("experiment")


@dataclass(frozen=True)
class Settings:
    """How to train.

    Args:
        steps: of training, at least one
            and often more.
        channels: of the branches.
    """

    steps: int = 100
    channels: tuple[int, ...] = (24, 24)
    rate: float = field(default=1e-3, metadata={"help": "of Adam, 5 % less at times"})
    clip: float | None = None
    schedule: Literal["cosine", "constant"] = "cosine"
    penalty: bool = True
    batch_size: int = 8

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"--steps must be at least 1; got {self.steps}")


PRESETS = {"cpu": Settings(), "smoke": Settings(steps=2, clip=1.0)}


def run(*arguments: str) -> experiment.Run[Settings]:
    return experiment.parse("Trains digits.", PRESETS, arguments, name="digits")


@pytest.mark.parametrize("name", ["results", "run", "flags", "solvers"])
def test_the_docstrings_examples_run(name):
    module = importlib.import_module(f"experiment.{name}")
    assert doctest.testmod(module, optionflags=doctest.ELLIPSIS).failed == 0


def test_without_flags_the_first_preset_runs():
    found = run()
    assert found.settings == Settings()
    assert (found.preset, found.seed, found.solver) == ("cpu", 0, "joint-first")
    assert found.out == Path("out/digits-cpu")
    assert found.data is None
    assert not found.resume
    assert not found.quiet


def test_a_script_may_have_a_solver_of_its_own_as_default():
    presets = {"cpu": Settings()}
    assert experiment.parse(None, presets, [], name="digits", solver="joint").solver == "joint"
    given = ["--solver=default"]
    assert experiment.parse(None, presets, given, name="digits", solver="joint").solver == "default"


def test_flags_override_the_preset_with_values_of_the_fields_types():
    found = run(
        *("--preset", "smoke", "--channels=8,16,32", "--rate=2", "--clip=none", "--no-penalty"),
        *("--schedule", "constant", "--batch-size=3", "--out=elsewhere", "--data", "files"),
        *("--seed=7", "--solver=joint", "--resume", "--quiet"),
    )
    assert found.settings == Settings(2, (8, 16, 32), 2.0, None, "constant", False, 3)
    assert isinstance(found.settings.rate, float)
    assert (found.out, found.data) == (Path("elsewhere"), Path("files"))
    assert (found.seed, found.solver, found.resume, found.quiet) == (7, "joint", True, True)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--steps=0", "--steps must be at least 1; got 0"),
        ("--steps=many", "--steps: expected int, such as 24; got 'many'"),
        ("--channels=8,,16", "--channels: expected ints with commas between"),
        ("--rate=nan", "--rate: expected float, such as 0.1; got 'nan'"),
        ("--seed=-1", "--seed: expected a whole number from 0 up; got '-1'"),
        ("--schedule=linear", "--schedule: invalid choice: 'linear'"),
        ("--solver=best", "--solver: invalid choice: 'best'"),
        ("--preset=huge", "--preset: invalid choice: 'huge'"),
        ("--step=3", "unrecognized arguments: --step=3"),
    ],
)
def test_a_mistake_ends_with_status_2_and_says_which(argument, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(argument)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_help_teaches(capsys):
    with pytest.raises(SystemExit) as stopped:
        run("--help")
    assert stopped.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    text = " ".join(" ".join(lines).split())
    for wanted in ("Trains digits.", "of training, at least one and often more.", "5 % less"):
        assert wanted in text
    (row,) = [line.split() for line in lines if line.startswith("  --clip ") and "X" not in line]
    assert row == ["--clip", "none", "1.0"]
    assert any(line.startswith("  python examples/digits.py --preset smoke") for line in lines)
    assert all(line == line.rstrip() for line in lines)


def test_a_field_that_no_flag_can_set_is_an_error_of_the_script():
    @dataclass(frozen=True)
    class Odd:
        table: dict = field(default_factory=dict)

    Odd.__annotations__["table"] = dict
    with pytest.raises(TypeError, match="settings field table must be int, float"):
        experiment.parse(None, {"cpu": Odd()}, [], name="odd")


@pytest.mark.parametrize("name", experiment.SOLVERS)
def test_every_solver_finds_a_known_minimum(name):
    theta = torch.tensor([[1.0, -2.0]], dtype=torch.float64)
    sol = implicitopt.solve(
        lambda z, x: 0.5 * z + x,  # z* = 2x
        lambda z, x: ((z - theta) ** 2 + x**2).sum(-1),  # least at x = 2θ/5
        torch.zeros(1, 2, dtype=torch.float64),
        solver=experiment.solver(name),
        max_steps=60,
    )
    # Steps of length 0.2 along the gradient end within 0.2 of the minimum.
    near = 0.2 if name == "nested-pgd" else 0.05
    assert (sol.x - 2 * theta / 5).norm() < near


def test_an_unknown_solver_is_refused_by_name():
    with pytest.raises(ValueError, match=r"must be one of joint-first, default.*got 'fast'"):
        experiment.solver("fast")


def strict(text: str) -> dict:
    """JSON as the standard has it, without NaN."""

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_results_are_written_with_what_they_depend_on(tmp_path, capsys):
    found = run(f"--out={tmp_path}/new", "--seed=3")
    found.path("figures/one.png").write_bytes(b"")
    results = {"psnr": math.inf, "codes": torch.eye(2), "mean": np.float32(0.5), 1: (Path("a"),)}
    found.write(results, "THE TABLE")
    record = strict((tmp_path / "new/results.json").read_text(encoding="utf-8"))
    assert record["results"] == {
        "psnr": None, "codes": [[1, 0], [0, 1]], "mean": 0.5, "1": ["a"]
    }  # fmt: skip
    assert record["configuration"] == found.configuration
    assert record["configuration"]["settings"]["channels"] == [24, 24]
    assert record["machine"]["torch"] == torch.__version__
    assert record["machine"]["threads"] == torch.get_num_threads()
    assert platform.node() not in record["machine"].values()
    assert record["seconds"] >= 0
    printed = capsys.readouterr().out
    assert printed.startswith("THE TABLE\n")
    assert f"{tmp_path}/new/: figures/, results.json" in printed


def test_only_the_first_process_writes(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    run(f"--out={tmp_path}/new").write({}, "THE TABLE")
    assert not (tmp_path / "new").exists()
    assert capsys.readouterr().out == ""


def test_results_that_json_cannot_hold_are_refused():
    with pytest.raises(TypeError, match="results must be numbers"):
        experiment.plain({"a": object()})


def test_an_interrupted_write_leaves_the_earlier_file(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    experiment.write_json(path, {"a": 1})

    def killed(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        experiment.write_json(path, {"a": list(range(10_000))})
    assert strict(path.read_text(encoding="utf-8")) == {"a": 1}


def test_the_command_to_resume_repeats_the_arguments(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["examples/digits.py"])
    found = run("--out", "a folder", "--steps=5")
    words = shlex.split(found.resume_command)
    assert words[1:] == ["examples/digits.py", "--out", "a folder", "--steps=5", "--resume"]
    again = run(*words[2:])
    assert again.resume_command == found.resume_command
    assert again.configuration == found.configuration
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert run().command == "torchrun --nproc-per-node 4 examples/digits.py"


def test_tables_align_and_refuse_ragged_rows():
    text = experiment.table([("a", 1.23456, None), ("long", 10, 3)], ("name", "loss", "steps"))
    assert text.splitlines() == [
        "name   loss  steps",
        "a     1.235      –",
        "long     10      3",
    ]
    assert experiment.table([], ("name", "loss")) == "name  loss"
    with pytest.raises(ValueError, match="a row must have 2 cells"):
        experiment.table([("a",)], ("name", "loss"))
