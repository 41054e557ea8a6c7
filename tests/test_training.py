"""The training loop of the examples: exact, resumable, the same in one process and in several.

Run as a script, this file trains the small model of its tests, for those that need a process.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import pickle
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import implicitopt

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
else:
    pytest.importorskip("accelerate")
    pytest.importorskip("tqdm")

from accelerate.state import AcceleratorState, GradientState

from experiment import Run, parse
from training import Training, fit
from training.plan import batch_at

ITEMS = 17
ADJOINTS = {"envelope": implicitopt.Envelope(), "implicit": implicitopt.Implicit()}


@dataclass(frozen=True)
class Settings:
    """What the script below does."""

    steps: int = 24
    batch: int = 5
    noise: float = 0.0
    pause: float = 0.0
    sweeps: int = 6
    adjoint: str = "envelope"
    unused: bool = False


class Decoder(nn.Module):
    """A small equilibrium decoder; every item keeps its code from one visit to the next."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.settings = settings
        self.layer, self.head = nn.Linear(6, 6).double(), nn.Linear(6, 4).double()
        self.spare = nn.Parameter(torch.ones(1).double(), requires_grad=settings.unused)
        with torch.no_grad():
            self.layer.weight.mul_(0.5)
        self.register_buffer("targets", torch.randn(ITEMS, 4).double(), persistent=False)
        self.register_buffer("codes", torch.zeros(ITEMS, 6).double())

    def forward(self, indices: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        time.sleep(self.settings.pause)
        x0 = self.codes[indices]
        x0 = x0 + self.settings.noise * torch.randn_like(x0)

        def loss(z: Tensor, x: Tensor) -> Tensor:
            error = ((self.head(z) - self.targets[indices]) ** 2).sum(-1)
            return error + 0.05 * (x**2).sum(-1)

        sol = implicitopt.solve(
            lambda z, x: torch.tanh(self.layer(z) + x), loss, x0,
            adjoint=ADJOINTS[self.settings.adjoint], max_steps=self.settings.sweeps, tol=1e-9,
        )  # fmt: skip
        self.codes[indices] = sol.x.detach()
        total = sol.value.mean()
        if self.settings.adjoint == "implicit":
            total = total + sol.z.square().sum(-1).mean()
        return total, {"norm": sol.x.norm(dim=1).mean()}


def decode(run: Run[Settings], **options) -> tuple[Decoder, object]:
    """The decoder, trained."""
    torch.manual_seed(run.seed)
    decoder, settings = Decoder(run.settings), run.settings
    training = Training(steps=settings.steps, batch=settings.batch, rate=0.02, warmup=3)
    result = fit(decoder, run, training, items=ITEMS, keep=("codes",), **options)
    return decoder, result


def final(decoder: Decoder) -> dict[str, Tensor]:
    """All that a training leaves in it, the gradients of the last step included."""
    slopes = {name: p.grad for name, p in decoder.named_parameters() if p.grad is not None}
    return decoder.state_dict() | {f"{name}, gradient": slope for name, slope in slopes.items()}


def main(arguments: list[str] | None = None) -> None:
    """Train; every process leaves what it ends with, to be compared."""
    run = parse(__doc__, {"cpu": Settings()}, arguments, name="toy")
    torch.set_num_threads(1)
    decoder, _ = decode(run, save_steps=4, find_unused_parameters=run.settings.unused)
    torch.save(final(decoder), run.path(f"weights-{os.environ.get('RANK', '0')}.pt"))


class Line(nn.Module):
    """Least squares, whose gradient has a closed form."""

    def __init__(self, spoil: tuple[int, ...] = ()) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(3, generator=generator).double())
        self.register_buffer("x", torch.randn(ITEMS, 3, generator=generator).double())
        self.register_buffer("y", torch.randn(ITEMS, generator=generator).double())
        self.register_buffer("visits", torch.zeros(ITEMS))
        self.calls, self.spoil, self.seen = 0, spoil, []
        self.act = lambda calls: None

    def forward(self, indices: Tensor) -> tuple[Tensor, dict[str, float]]:
        self.calls += 1
        self.act(self.calls)
        self.visits[indices] += 1
        self.seen.append(indices.tolist())
        loss = ((self.x[indices] @ self.weight - self.y[indices]) ** 2).mean()
        if self.calls in self.spoil:
            loss = loss * float("nan")
        return loss, {"size": self.weight.norm()}


def line_gradient(line: Line, weight: Tensor, indices: list[int]) -> Tensor:
    x, y = line.x[indices], line.y[indices]
    return 2 * x.T @ (x @ weight - y) / len(indices)


TRAINING = Training(steps=11, batch=5, rate=0.05)


@pytest.fixture(autouse=True)
def _fresh_accelerate():
    """Accelerate keeps its settings for the life of the process; a test must not see another's."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def run_at(out: Path, **options) -> Run[Settings]:
    given = {"name": "toy", "preset": "cpu", "settings": Settings(), "quiet": True} | options
    return Run(out=out, command="python toy.py", **given)


def fit_line(line: Line, out: Path, training: Training = TRAINING, resume=False, **options):
    run = run_at(out, resume=resume)
    return fit(line, run, training, items=ITEMS, keep=("visits",), **options)


def journal(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def checkpoints(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints").iterdir())


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


# Steps


def test_an_epoch_visits_every_item_once_in_batches_of_nearly_one_size():
    epochs = []
    for start in (0, 4, 8):
        batches = [batch_at(step, 17, 5, seed=3).tolist() for step in range(start, start + 4)]
        assert sorted(item for batch in batches for item in batch) == list(range(17))
        assert {len(batch) for batch in batches} == {4, 5}
        epochs.append(batches)
    assert epochs[0] != epochs[1] != epochs[2]
    assert batch_at(0, 17, 5, seed=4).tolist() != epochs[0][0]
    assert sorted(batch_at(7, 3, 5, seed=0).tolist()) == [0, 1, 2]


@pytest.mark.filterwarnings("ignore:Detected call of .lr_scheduler.step")
@pytest.mark.filterwarnings("ignore:The epoch parameter in .scheduler.step")  # torch 2.5's own
def test_the_learning_rate_is_that_of_torchs_schedulers():
    optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True)], lr=0.3)
    warm = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.25, total_iters=3)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=16)
    schedule = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, cosine], milestones=[4])
    training = Training(steps=20, batch=1, rate=0.3, warmup=4)
    for step in range(20):
        assert training.rate_at(step) == pytest.approx(schedule.get_last_lr()[0], abs=1e-12)
        schedule.step()
    assert Training(20, 1, 0.3, "constant").rate_at(19) == 0.3


@pytest.mark.parametrize("clip", [None, 0.5])
def test_training_is_adam_on_the_closed_form_gradient(tmp_path, clip):
    line = Line()
    weight = line.weight.detach().clone().requires_grad_()
    result = fit_line(line, tmp_path, replace(TRAINING, clip=clip))
    optimizer = torch.optim.Adam([weight])
    for step in range(11):
        indices = batch_at(step, ITEMS, 5, seed=0).tolist()
        assert line.seen[step] == indices
        optimizer.param_groups[0]["lr"] = 0.05 * 0.5 * (1 + math.cos(math.pi * step / 11))
        weight.grad = line_gradient(line, weight.detach(), indices)
        if clip is not None:
            weight.grad *= min(1.0, clip / weight.grad.norm())
        error = (line.x[indices] @ weight.detach() - line.y[indices]).square().mean()
        assert result.losses[step] == pytest.approx(error.item(), rel=1e-6)
        optimizer.step()
    torch.testing.assert_close(line.weight, weight, atol=1e-6, rtol=0)
    assert result.skipped == 0


def test_random_numbers_of_a_step_depend_on_the_seed_and_the_step_alone(tmp_path):
    drawn: dict[str, list[float]] = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        line, numbers = Line(), drawn.setdefault(name, [])
        line.act = lambda calls, numbers=numbers: numbers.append(torch.rand(()).item())
        torch.manual_seed(len(drawn))
        fit(line, run_at(tmp_path / name, seed=seed), TRAINING, items=ITEMS)
    assert drawn["a"] == drawn["b"]
    assert len({*drawn["a"], *drawn["c"]}) == 22


# Going on


@pytest.mark.parametrize("at", [1, 4, 9, 11])
def test_a_run_that_failed_and_resumed_is_bit_for_bit_one_that_did_not(tmp_path, monkeypatch, at):
    settings = Settings(steps=11, noise=0.1)
    whole, result = decode(run_at(tmp_path / "whole", settings=settings))
    parts = run_at(tmp_path / "parts", settings=settings)
    forward, calls = Decoder.forward, []

    def failing(decoder, indices):
        calls.append(indices)
        if len(calls) == at:
            raise KeyboardInterrupt
        return forward(decoder, indices)

    with monkeypatch.context() as patch:
        patch.setattr(Decoder, "forward", failing)
        with pytest.raises(KeyboardInterrupt):
            decode(parts, save_steps=3)
    torch.manual_seed(99)
    decoder, again = decode(replace(parts, resume=True), save_steps=3)
    assert same(decoder.state_dict(), whole.state_dict())
    assert again.losses == result.losses
    assert [row["step"] for row in journal(tmp_path / "parts")] == list(range(1, 12))
    assert checkpoints(tmp_path / "parts") == ["step-000009", "step-000011"]


def work(arguments: list[str], environment: dict[str, str]) -> None:
    """The script below, in a process of its own."""
    os.environ.update({"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", **environment})
    warnings.simplefilter("error")
    main(arguments)


def start(out: Path, *arguments: str, **environment: str):
    """A process that runs the script; forked from one with everything imported, to save time."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "torch._dynamo", "torch.utils.tensorboard"])
    arguments = [f"--out={out}", "--quiet", *arguments]
    process = context.Process(target=work, args=(arguments, environment), daemon=True)
    process.start()
    return process


def finish(*processes) -> None:
    """Wait for processes to end well."""
    try:
        for process in processes:
            process.join(timeout=120)
        assert [process.exitcode for process in processes] == [0] * len(processes)
    finally:
        for process in processes:
            process.kill()


def killed_after(out: Path, steps: int, delay: float, *arguments: str) -> None:
    """Start or resume the script, and kill -9 it some time after that many steps."""
    log, resume = out / "log.jsonl", any(out.glob("checkpoints/step-*"))
    before = log.stat().st_ino if log.exists() else None
    process = start(out, *arguments, *(["--resume"] if resume else []))
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.is_alive():
        begun = log.exists() and log.stat().st_ino != before  # a start writes the journal anew
        if begun and log.read_bytes().count(b"\n") >= steps:
            time.sleep(delay)
            break
        time.sleep(0.001)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def assert_kills_do_not_matter(folder: Path, points: list[int]) -> None:
    arguments = ("--noise=0.1", f"--steps={max(points) + 20}")
    whole = start(folder / "whole", *arguments)
    out, delays = folder / "parts", random.Random(0)
    for steps in points:
        killed_after(out, steps, delays.uniform(0, 0.05), *arguments)
    finish(whole, start(out, *arguments, "--resume"))
    weights = [
        torch.load(folder / name / "weights-0.pt", weights_only=True) for name in ("whole", "parts")
    ]
    assert same(*weights)
    assert [row["loss"] for row in journal(out)] == [
        row["loss"] for row in journal(folder / "whole")
    ]


@pytest.mark.slow
def test_a_run_that_was_killed_ends_with_the_same_weights(tmp_path):
    assert_kills_do_not_matter(tmp_path, [3, 12])


@pytest.mark.slow
def test_a_run_that_was_killed_twenty_times_ends_with_the_same_weights(tmp_path):
    points = sorted(random.Random(1).sample(range(480), 20))
    assert_kills_do_not_matter(tmp_path, [*points[:-1], 480])  # of 500 steps


def broken_newest(out: Path) -> Path:
    fit_line(Line(), out, save_steps=3)
    return out / "checkpoints" / "step-000011"


@pytest.mark.parametrize("damage", ["cut", "missing", "no facts", "unfinished"])
def test_half_written_checkpoints_are_ignored(tmp_path, damage):
    newest = broken_newest(tmp_path)
    if damage == "cut":
        path = newest / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
    elif damage == "unfinished":
        newest.rename(newest.parent / "unfinished")
    else:
        (newest / {"missing": "optimizer.pt", "no facts": "checkpoint.json"}[damage]).unlink()
    line = Line()
    fit_line(line, tmp_path, resume=True, save_steps=3)
    assert line.calls == 2  # steps 10 and 11, after the whole one of step 9
    whole = Line()
    fit_line(whole, tmp_path / "whole")
    assert same(line.state_dict(), whole.state_dict())
    assert checkpoints(tmp_path) == ["step-000009", "step-000011"]


def test_a_journal_that_was_cut_or_ran_ahead_has_each_step_once(tmp_path):
    fit_line(Line(), tmp_path, save_steps=4)
    for path in (tmp_path / "checkpoints").iterdir():
        if path.name == "step-000011":
            (path / "checkpoint.json").unlink()
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 12, "lo')
    result = fit_line(Line(), tmp_path, resume=True)
    assert [row["step"] for row in journal(tmp_path)] == list(range(1, 12))
    assert len(result.losses) == 11


def test_a_journal_that_was_lost_is_an_error(tmp_path):
    fit_line(Line(), tmp_path)
    (tmp_path / "log.jsonl").unlink()
    with pytest.raises(ValueError, match="must have a line for each of the 11 steps done"):
        fit_line(Line(), tmp_path, resume=True)


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_new_run_overwrites_nothing(tmp_path):
    fit_line(Line(), tmp_path)
    before = contents(tmp_path)
    with pytest.raises(FileExistsError, match=r"Pass --resume .* or another --out"):
        fit_line(Line(), tmp_path)
    assert contents(tmp_path) == before


def test_resuming_with_other_settings_names_them(tmp_path):
    fit_line(Line(), tmp_path)
    before = contents(tmp_path)
    longer = replace(TRAINING, steps=12, rate=0.1)
    with pytest.raises(ValueError, match="settings that it began with") as error:
        fit_line(Line(), tmp_path, longer, resume=True)
    assert "training.steps was 11 and is now 12; training.rate was 0.05 and is now 0.1" in str(
        error.value
    )
    assert "batch" not in str(error.value)
    assert contents(tmp_path) == before


def test_resuming_what_never_began_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="--resume needs a checkpoint"):
        fit_line(Line(), tmp_path, resume=True)
    assert not any(tmp_path.iterdir())


def test_a_finished_run_resumes_to_its_result(tmp_path):
    first, line = Line(), Line()
    result = fit_line(first, tmp_path, evaluate=lambda line: {"calls": line.calls})
    again = fit_line(line, tmp_path, resume=True, evaluate=lambda line: {"calls": line.calls})
    assert line.calls == 0
    assert same(line.state_dict(), first.state_dict())
    assert (again.losses, again.evaluations) == (result.losses, result.evaluations)


def test_a_script_with_two_trainings_resumes_in_the_second(tmp_path):
    fit_line(Line(), tmp_path, name="first")
    line = Line()
    fit_line(Line(), tmp_path, resume=True, name="first")
    fit_line(line, tmp_path, resume=True, name="second")
    assert line.calls == 11


def test_a_checkpoint_cannot_run_code(tmp_path):
    class Attack:
        def __reduce__(self):
            return (open, (str(tmp_path / "attacked"), "w"))

    fit_line(Line(), tmp_path / "run")
    for path in (tmp_path / "run").rglob("optimizer.pt"):
        size = path.stat().st_size
        torch.save({"optimizer": Attack(), "scaler": None}, path)
        facts = path.parent / "checkpoint.json"
        facts.write_text(facts.read_text().replace(str(size), str(path.stat().st_size)))
    with pytest.raises(pickle.UnpicklingError):
        fit_line(Line(), tmp_path / "run", resume=True)
    assert not (tmp_path / "attacked").exists()


def test_saving_also_goes_by_the_clock(tmp_path):
    line, seen = Line(), []
    line.act = lambda calls: seen.append(checkpoints(tmp_path)[-1])
    fit_line(line, tmp_path, save_seconds=0)
    assert seen == [f"step-{step:06d}" for step in range(11)]


# Interruptions


def interrupt(at: int, *signals: signal.Signals) -> Line:
    line = Line()

    def act(calls: int) -> None:
        if calls == at:
            for number in signals:
                os.kill(os.getpid(), number)

    line.act = act
    return line


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_finishes_the_step_saves_and_says_how_to_resume(tmp_path, number, capsys):
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    line = interrupt(5, number)
    with pytest.raises(SystemExit) as stopped:
        fit_line(line, tmp_path)
    assert stopped.value.code == 130
    assert line.calls == 5
    assert checkpoints(tmp_path)[-1] == "step-000005"
    said = capsys.readouterr().err
    assert "Stopped after step 5 of 11." in said
    assert "  python toy.py --resume\n" in said
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    resumed, whole = Line(), Line()
    fit_line(resumed, tmp_path, resume=True)
    fit_line(whole, tmp_path / "whole")
    assert resumed.calls == 6
    assert same(resumed.state_dict(), whole.state_dict())


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        fit_line(interrupt(5, signal.SIGINT, signal.SIGINT), tmp_path)
    assert checkpoints(tmp_path) == ["step-000000"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_training_works_in_a_thread_which_takes_no_signals(tmp_path):
    thread = threading.Thread(target=fit_line, args=(Line(), tmp_path))
    thread.start()
    thread.join(timeout=60)
    assert checkpoints(tmp_path)[-1] == "step-000011"


# Gradients that are not finite


def test_a_step_whose_gradient_is_not_finite_changes_nothing_and_is_reported(tmp_path, capsys):
    line = Line(spoil=(3, 7))
    weight = line.weight.detach().clone().requires_grad_()
    result = fit_line(line, tmp_path)
    optimizer, visits = torch.optim.Adam([weight]), torch.zeros(ITEMS)
    for step in set(range(11)) - {2, 6}:
        indices = batch_at(step, ITEMS, 5, seed=0).tolist()
        optimizer.param_groups[0]["lr"] = TRAINING.rate_at(step)
        weight.grad = line_gradient(line, weight.detach(), indices)
        optimizer.step()
        visits[indices] += 1
    torch.testing.assert_close(line.weight, weight, atol=1e-6, rtol=0)
    assert torch.equal(line.visits, visits)
    assert result.skipped == 2
    assert [math.isnan(loss) for loss in result.losses] == [k in (2, 6) for k in range(11)]
    said = capsys.readouterr().err
    assert "step 3: the gradient is not finite" in said
    assert "step 7: the gradient is not finite" in said


def test_many_such_steps_in_a_row_are_an_error(tmp_path):
    line = Line(spoil=tuple(range(3, 100)))
    with pytest.raises(FloatingPointError, match="in 20 steps in a row, the last being step 22"):
        fit_line(line, tmp_path, replace(TRAINING, steps=60))


# What is logged


def test_tensorboard_has_every_step_once_after_an_interruption(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    failing = Line()
    failing.act = lambda calls: calls < 7 or 1 / 0
    with pytest.raises(ZeroDivisionError):
        fit_line(failing, tmp_path, save_steps=4)
    time.sleep(1)  # TensorBoard reads its files by name: the second, then an unpadded count.
    result = fit_line(
        Line(), tmp_path, resume=True, save_steps=4, evaluate=lambda line: {"score": 2}
    )
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    losses = events.Scalars("loss")
    assert [event.step for event in losses] == list(range(1, 12))
    assert [event.value for event in losses] == pytest.approx(result.losses)
    assert [e.value for e in events.Scalars("rate")] == pytest.approx(
        [TRAINING.rate_at(step) for step in range(11)]
    )
    assert [(e.step, e.value) for e in events.Scalars("evaluation/score")] == [(11, 2.0)]
    assert set(events.Tags()["scalars"]) >= {"size", "gradient"}


def test_without_tensorboard_it_trains_and_says_so_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    result = fit_line(Line(), tmp_path)
    assert len(result.losses) == 11
    assert capsys.readouterr().err.count("TensorBoard is not installed") == 1
    assert not (tmp_path / "tensorboard").exists()


def test_the_bar_shows_the_loss_unless_quiet(tmp_path, capsys):
    fit_line(Line(), tmp_path / "quiet")
    assert capsys.readouterr().err == ""
    loud = replace(run_at(tmp_path / "loud"), quiet=False)
    line = Line()
    line.act = lambda calls: time.sleep(0.05)  # the bar is not drawn more than ten times a second
    fit(line, loud, TRAINING, items=ITEMS)
    assert "loss=" in capsys.readouterr().err


def test_evaluations_come_when_asked_without_gradients_in_evaluation_mode(tmp_path):
    modes = []

    def evaluate(line: Line) -> dict[str, Tensor]:
        modes.append((line.training, torch.is_grad_enabled()))
        return {"calls": torch.tensor(line.calls)}

    line = Line()
    result = fit_line(line, tmp_path, evaluate=evaluate, every=4)
    assert result.evaluations == [{"step": s, "calls": s} for s in (4, 8, 11)]
    assert modes == [(False, False)] * 3
    assert line.training


# Arguments


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be positive"),
        ({"batch": 0}, "batch must be positive"),
        ({"rate": math.nan}, "rate must be positive"),
        ({"warmup": 11}, r"warmup must lie in \[0, 11\)"),
        ({"clip": 0}, "clip must be positive or None"),
        ({"schedule": "linear"}, "schedule must be one of"),
        ({"mixed_precision": "fp8"}, "mixed_precision must be one of"),
    ],
)
def test_senseless_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        replace(TRAINING, **options)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda line: (line.weight.detach().sum(), {}), "with a gradient"),
        (lambda line: (line.weight, {}), r"shape \(\) with a gradient"),
        (lambda line: (line.weight.sum(), {"loss": 0.0}), "under names other than .*got loss"),
        (lambda line: (line.weight.sum(), {"a": line.weight}), "single numbers.*got a"),
    ],
)
def test_what_an_objective_must_return_is_checked(tmp_path, monkeypatch, returned, message):
    monkeypatch.setattr(Line, "forward", lambda line, indices: returned(line))
    with pytest.raises(ValueError, match=message):
        fit_line(Line(), tmp_path)


def test_buffers_to_keep_must_have_a_row_an_item_and_be_saved(tmp_path):
    line = Line()
    line.register_buffer("short", torch.zeros(3))
    line.register_buffer("passing", torch.zeros(ITEMS), persistent=False)
    for name in ("short", "passing"):
        with pytest.raises(ValueError, match=f"the buffer {name} must be persistent and have"):
            fit(line, run_at(tmp_path), TRAINING, items=ITEMS, keep=(name,))


def test_bf16_reaches_the_objective_in_training_alone(tmp_path):
    class Typed(Line):
        def forward(self, indices):
            self.kind = nn.functional.linear(torch.ones(1, 2), torch.ones(1, 2)).dtype
            return super().forward(indices)

    line = Typed()
    fit_line(line, tmp_path, replace(TRAINING, mixed_precision="bf16"))
    assert line.kind == torch.bfloat16
    line(torch.arange(2))
    assert line.kind == torch.float32


@pytest.mark.skipif(torch.cuda.is_available(), reason="fp16 needs a GPU, and there is one")
def test_fp16_without_a_gpu_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"fp16.* needs a GPU"):
        fit_line(Line(), tmp_path, replace(TRAINING, mixed_precision="fp16"))


def test_weights_in_another_memory_format_are_saved_and_come_back(tmp_path):
    class Image(nn.Conv2d):
        def forward(self, indices):
            return super().forward(torch.ones(len(indices), 3, 4, 4)).square().mean(), {}

    def conv() -> Image:
        torch.manual_seed(0)
        return Image(3, 5, 3).to(memory_format=torch.channels_last)

    first, second = conv(), conv()
    fit(first, run_at(tmp_path), TRAINING, items=ITEMS)
    fit(second, run_at(tmp_path, resume=True), TRAINING, items=ITEMS)
    assert same(first.state_dict(), second.state_dict())
    assert second.weight.is_contiguous(memory_format=torch.channels_last)


# Several processes


def by_accelerate(out: Path, *arguments: str) -> list[dict[str, Tensor]]:
    """What each of two processes ends with, started by ``accelerate launch``."""
    # --cpu would start one process, unless there is MPI. --multi_gpu needs no GPU.
    flags = ("--multi_gpu", "--num_processes=2", "--num_machines=1", "--main_process_port=0")
    plain = ("--mixed_precision=no", "--dynamo_backend=no")
    command = [sys.executable, "-m", "accelerate.commands.launch", *flags, *plain]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    script = [__file__, f"--out={out}", "--quiet", *arguments]
    subprocess.run([*command, *script], env=environment, check=True, timeout=300)
    return [torch.load(out / f"weights-{rank}.pt", weights_only=True) for rank in range(2)]


def two_processes(out: Path, *arguments: str) -> list[dict[str, Tensor]]:
    """What each of two processes ends with, started as a launcher would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    finish(*(start(out, *arguments, LOCAL_WORLD_SIZE="2", **world, **rank) for rank in ranks))
    return [torch.load(out / f"weights-{rank}.pt", weights_only=True) for rank in range(2)]


def assert_two_are_one(folder: Path, *arguments: str, launch=two_processes) -> None:
    one = parse(None, {"cpu": Settings()}, [f"--out={folder}/one", *arguments], name="toy")
    decoder, result = decode(one, find_unused_parameters=one.settings.unused)
    first, second = launch(folder / "two", *arguments)
    assert same(first, second)
    assert "layer.weight, gradient" in first
    torch.testing.assert_close(first, dict(final(decoder)), atol=1e-6, rtol=0)
    rows = journal(folder / "two")
    assert [row["loss"] for row in rows] == pytest.approx(result.losses, abs=1e-6)
    assert [row["step"] for row in rows] == list(range(1, len(result.losses) + 1))


def test_two_processes_do_what_one_does_on_uneven_batches(tmp_path):
    assert_two_are_one(tmp_path, "--steps=6")


@pytest.mark.slow
def test_two_processes_of_accelerate_launch_do_what_one_does(tmp_path):
    assert_two_are_one(tmp_path, "--steps=6", launch=by_accelerate)


@pytest.mark.slow
@pytest.mark.parametrize("adjoint", ["envelope", "implicit"])
@pytest.mark.parametrize("unused", ["--unused", "--no-unused"])
def test_two_processes_do_what_one_does_with_every_adjoint(tmp_path, adjoint, unused):
    assert_two_are_one(tmp_path, "--steps=8", f"--adjoint={adjoint}", unused, "--sweeps=60")


@pytest.mark.slow
def test_the_checkpoint_of_two_processes_resumes_in_one(tmp_path):
    two_processes(tmp_path / "two")
    (tmp_path / "two/checkpoints/step-000024/checkpoint.json").unlink()
    resumed, _ = decode(run_at(tmp_path / "two", resume=True))
    whole, _ = decode(run_at(tmp_path / "one"))
    torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), atol=1e-6, rtol=0)


@pytest.mark.slow
def test_torchrun_trains_in_two_processes_and_passes_ctrl_c_on(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", __file__]
    arguments = [f"--out={tmp_path}", "--pause=0.05", "--steps=200", "--quiet"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(
        [*command, *arguments], env=environment, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (tmp_path / "checkpoints/step-000004").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert "torchrun --nproc-per-node 2" in said
    assert said.count("Stopped after step") == 1
    steps = len(journal(tmp_path))
    assert 4 <= steps < 200
    assert checkpoints(tmp_path)[-1] == f"step-{steps:06d}"


if __name__ == "__main__":
    main()
