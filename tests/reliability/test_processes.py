"""Training in several processes: four do what one does; where one is killed, none hangs."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("tqdm")

from tests import test_training as toy
from training.checkpoints import Checkpoints

pytestmark = pytest.mark.slow

WITHIN = 120  # seconds, for a survivor to end; gloo itself waits for half an hour


def launch(out, count, *arguments):
    """The script of tests/test_training.py in ``count`` processes, as a launcher starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, toy.__file__, f"--out={out}", "--quiet", *arguments]
    common = {
        **os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true",
        "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
    }  # fmt: skip
    return [
        subprocess.Popen(
            command,
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]


def end(process, timeout=300):
    """Wait for a process; its exit code, and what it said."""
    try:
        _, said = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return process.returncode, said


def test_four_processes_do_what_one_does_on_uneven_batches(tmp_path):
    # 17 items in batches of 5: the four have 2, 1, 1 and 1 items of each, or 1 each.
    processes = launch(tmp_path / "four", 4, "--steps=6")
    assert [end(process)[0] for process in processes] == [0] * 4
    parts = [
        torch.load(tmp_path / f"four/weights-{rank}.pt", weights_only=True) for rank in range(4)
    ]
    assert all(toy.same(parts[0], other) for other in parts[1:])
    one = toy.parse(
        None, {"cpu": toy.Settings()}, [f"--out={tmp_path}/one", "--steps=6"], name="toy"
    )
    decoder, result = toy.decode(one)
    torch.testing.assert_close(parts[0], dict(toy.final(decoder)), atol=1e-6, rtol=0)
    losses = [row["loss"] for row in toy.journal(tmp_path / "four")]
    assert losses == pytest.approx(result.losses, abs=1e-6)


@pytest.mark.parametrize("victim", [0, 1])
def test_where_one_of_two_is_killed_the_other_ends_with_an_error_and_the_checkpoint_is_whole(
    tmp_path, victim
):
    arguments = ("--steps=60", "--pause=0.05")
    processes = launch(tmp_path / "parts", 2, *arguments)
    deadline = time.monotonic() + 240
    while not (tmp_path / "parts/checkpoints/step-000008").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    processes[victim].kill()
    code, said = end(processes[1 - victim], WITHIN)
    assert code not in (0, -signal.SIGKILL)
    assert "Error" in said
    assert end(processes[victim])[0] == -signal.SIGKILL
    newest = Checkpoints(tmp_path / "parts/checkpoints", {}).newest()
    assert newest is not None
    assert newest.step >= 8
    # One process goes on from it, to what one process reaches without any of this.
    resumed, whole = (
        launch(tmp_path / "parts", 1, *arguments, "--resume"),
        launch(tmp_path / "whole", 1, *arguments),
    )
    assert [end(process)[0] for process in (*resumed, *whole)] == [0, 0]
    ends = [
        torch.load(tmp_path / name / "weights-0.pt", weights_only=True)
        for name in ("parts", "whole")
    ]
    torch.testing.assert_close(*ends, atol=1e-6, rtol=0)
