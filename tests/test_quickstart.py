"""The quickstart runs, writes what it says, and at full size keeps what the README promises."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

SCRIPT = Path(__file__).resolve().parent.parent / "examples" / "quickstart.py"


def quickstart(*options: str, out: Path, timeout: float) -> tuple[str, dict]:
    """What a run prints, and its numbers."""
    command = [sys.executable, str(SCRIPT), "--quiet", "--out", str(out), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout, json.loads((out / "results.json").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_a_short_run_trains_and_writes_its_picture_and_numbers(tmp_path):
    printed, results = quickstart(
        "--steps=20", "--batch=32", "--images=8", "--nested-steps=2", out=tmp_path, timeout=120
    )
    losses = results["training_loss"]
    assert len(losses) == 20
    assert all(map(math.isfinite, losses))
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    assert (tmp_path / "quickstart.png").read_bytes().startswith(b"\x89PNG")
    assert set(results["tasks"]) == {"reconstruct", "denoise", "inpaint"}
    assert "held-out images" in printed


def test_a_senseless_option_is_refused_by_name(tmp_path):
    command = [sys.executable, str(SCRIPT), "--steps=0", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert "--steps must be positive; got 0" in done.stderr


@pytest.mark.slow
def test_the_full_run_keeps_its_promises(tmp_path):
    _, results = quickstart(out=tmp_path, timeout=900)
    tasks, solvers = results["tasks"], results["solvers"]
    assert tasks["reconstruct"]["recovered"]["mse"] < 0.012
    for name in ("denoise", "inpaint"):
        assert tasks[name]["recovered"]["mse"] < tasks[name]["given"]["mse"]
    assert solvers["reached"]
    assert 20 * solvers["default"]["f"] <= solvers["nested"]["f"]
    # By the clock as well where nothing else runs; by less where others take turns.
    assert solvers["default"]["seconds"] <= 0.2 * solvers["nested"]["seconds"]
