"""Few-shot learning of handwritten characters: a task is learned by one solve.

A task shows a few classes in one drawing each (or a few), and asks for the classes of others. Its
vector x, which enters an equilibrium classifier, is what one call of `implicitopt.solve` finds:

    minimize over x   mean CE(support) + λ‖x‖²    subject to   z = f(z, x; support)

The queries are then answered at the equilibrium under x (JIIO, eq. 28–29). The weights are trained
on the background alphabets, for a time that MAML, iMAML, Reptile and prototypical networks are each
given as well, and all are judged on alphabets that none has seen.

The model is made for a CPU, and differs from the paper's (--preset paper) in two ways: convolutions
come before the equilibrium, where they cost nothing per sweep, and x holds the classes' directions
besides the paper's task vector.

With --dataset glyphs (printed letters) it needs no files.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import matplotlib
import torch
from accelerate.utils import set_seed
from torch import Tensor
from tqdm import tqdm

import implicitopt
from data import Characters, glyphs, omniglot, rotated
from episodes import (
    Episode,
    Equilibrium,
    Imaml,
    Inner,
    Learner,
    Maml,
    Prototypes,
    Reptile,
    TaskClassifier,
    Tasks,
    accuracies,
    agreement,
    conditioning,
    convolutions,
    interval,
)
from experiment import Run, main_process, parse, solver, table
from training import Result, Training, fit, steps_within
from training.plan import seed_of

METHODS = ("equilibrium", "prototypes", "maml", "imaml", "reptile")
DECAYS = (0.0, 0.01, 0.1, 1.0, 10.0)  # of the study of the adjoint
SWEEPS, STEPS = (20, 60), (4, 15, 40)  # of the study of gradients: of solves, of linear systems
TRAINING, CURVE, TEST = range(3)  # streams of tasks, which have no task in common


@dataclass(frozen=True)
class Settings:
    """What is learned, how, and for how long.

    Args:
        dataset: handwritten characters, or printed ones that need no files.
        ways: classes of a task.
        shots: drawings of each class to learn from.
        queries: drawings of each class to be asked about.
        train_ways: classes of the tasks that equilibrium and prototypes train on. They can read any
            number, and many others to be told from teach more; the rest train on ``ways``.
        train_queries: drawings of each class to be asked about in those.
        train_batch: such tasks a step.
        characters: at most so many of each part (Omniglot only); none: all.
        rotations: train on characters turned by 90, 180 and 270 degrees as well (Omniglot only).
        channels: of the equilibrium's branches, finest first.
        expansion: how much wider the inside of a block is.
        stride: the finest branch is at 1/stride of the image's size.
        stem: convolutions from the image to what enters the equilibrium.
        pool: the side that a branch is pooled to before it is read.
        task: length of the vector that enters the equilibrium.
        head: whether classes are read by directions of the task's own, or by shared ones.
        decay: how strongly a task's vector is drawn towards 0.
        sweeps: of a task's solve.
        query_steps: of the queries' equilibrium.
        gradient: how the weights' gradient treats what the solve found; see episodes/equilibrium.
        adjoint_steps: of its linear solves.
        penalty: weight of the Jacobian penalty.
        rate: Adam's, of the equilibrium.
        batch: tasks a step.
        methods: which to train.
        minutes: of training for each method.
        steps: of training for each method, whatever time they take; none: as minutes allow.
        width: channels of the other methods' network.
        inner_steps: gradient steps on a task, of MAML and Reptile.
        inner_rate: their length, and that of iMAML's.
        imaml_steps: gradient steps on a task, of iMAML.
        imaml_decay: how strongly a task's weights are drawn towards those before, in iMAML;
            its authors have 2.
        cg_steps: of conjugate gradients, for iMAML's outer gradient.
        curve_tasks: new tasks on which learning curves are measured.
        curve_points: points of a learning curve.
        test_tasks: new tasks on which the results are measured.
        study_tasks: tasks through whose solution to differentiate, for the study of that; 0: none.
        study_steps: of the linear solves there.
    """

    dataset: Literal["omniglot", "glyphs"] = "omniglot"
    ways: int = 5
    shots: int = 1
    queries: int = 3
    train_ways: int = 20
    train_queries: int = 1
    train_batch: int = 4
    characters: int | None = None
    rotations: bool = True
    channels: tuple[int, ...] = (32, 32)
    expansion: int = 2
    stride: int = 8
    stem: int = 4
    pool: int = 4
    task: int = 64
    head: Literal["task", "shared"] = "task"
    decay: float = 1.0
    sweeps: int = 6
    query_steps: int = 5
    gradient: Literal["frozen", "implicit", "envelope"] = "frozen"
    adjoint_steps: int = 4
    penalty: float = 0.03
    rate: float = 3e-3
    batch: int = 12
    methods: Literal["all", "equilibrium", "prototypes", "maml", "imaml", "reptile"] = "all"
    minutes: float = 10.0
    steps: int | None = None
    width: int = 32
    inner_steps: int = 3
    inner_rate: float = 0.03
    imaml_steps: int = 16
    imaml_decay: float = 0.5
    cg_steps: int = 5
    curve_tasks: int = 40
    curve_points: int = 8
    test_tasks: int = 600
    study_tasks: int = 8
    study_steps: int = 300

    def __post_init__(self) -> None:
        for name in ("minutes", "batch", "curve_points", "curve_tasks", "test_tasks"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive; got {getattr(self, name)!r}")
        if self.head == "shared" and self.train_ways != self.ways:
            raise ValueError(
                f"a shared head reads one number of classes; got ways {self.ways} and train_ways "
                f"{self.train_ways}. Make them equal, or use --head task."
            )
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps must be positive or none; got {self.steps}")


PRESETS = {
    "cpu": Settings(),
    "smoke": Settings(
        characters=150, rotations=False, steps=20, batch=4, train_batch=2, curve_tasks=10,
        curve_points=1, test_tasks=20, study_tasks=2, study_steps=30, inner_steps=1,
    ),
    # The paper gives its sizes and its solver (--solver paper), and no time.
    "paper": Settings(
        channels=(64, 128), expansion=5, stride=1, stem=1, task=400, head="shared", decay=1.0,
        sweeps=100, query_steps=100, adjoint_steps=100, penalty=0.5, rate=1e-3, batch=16,
        minutes=1440.0, width=64, queries=15, train_ways=5, train_queries=15, train_batch=16,
    ),
}  # fmt: skip


def characters(run: Run[Settings], split: Literal["background", "evaluation"]) -> Characters:
    """The alphabets to train on, or the others to be tested on."""
    settings = run.settings
    if settings.dataset == "glyphs":
        return glyphs(split, quiet=run.quiet)
    found = omniglot(run.data, split, limit=settings.characters, quiet=run.quiet)
    return rotated(found) if split == "background" and settings.rotations else found


def inner_solver(name: str) -> Any:
    """The solver that ``--solver`` names; the paper's has type II and its own steps here."""
    if name != "paper":
        return solver(name)
    steps = implicitopt.StepSizes(z=0.8, mu=0.6, x=lambda step: 0.04 if step < 50 else 0.01)
    return implicitopt.Joint(implicitopt.Anderson("II", memory=10), steps)


def many_ways(method: str) -> bool:
    """Whether a method can train on tasks of more classes than it is tested on."""
    return method in ("equilibrium", "prototypes")


def batch_of(method: str, settings: Settings) -> int:
    """The tasks of a training step."""
    return settings.train_batch if many_ways(method) else settings.batch


def make(method: str, background: Characters, run: Run[Settings]) -> Learner:
    """An untrained learner, and the tasks to train on."""
    settings = run.settings
    set_seed(run.seed)
    ways, queries = settings.ways, settings.queries
    if many_ways(method):
        ways, queries = settings.train_ways, settings.train_queries
    seed = seed_of(run.seed, TRAINING)
    tasks = Tasks(background, ways, settings.shots, queries, seed)
    size = tasks.pixels.shape[-1]
    if method == "equilibrium":
        given = asdict(settings)
        shape = ("channels", "ways", "task", "stride", "pool", "expansion")
        options = {name: given[name] for name in shape} | {"image": (1, size)}
        how = ("decay", "sweeps", "query_steps", "gradient", "adjoint_steps", "penalty")
        inner = Inner(solver=inner_solver(run.solver), **{name: given[name] for name in how})
        return Equilibrium(tasks, TaskClassifier(settings.head, settings.stem, **options), inner)
    if method == "prototypes":
        return Prototypes(tasks, convolutions(settings.width, None, size))
    network = convolutions(settings.width, tasks.ways, size)
    if method == "imaml":
        steps, decay = settings.imaml_steps, settings.imaml_decay
        return Imaml(tasks, network, steps, settings.inner_rate, decay, settings.cg_steps)
    kind = {"maml": Maml, "reptile": Reptile}[method]
    return kind(tasks, network, settings.inner_steps, settings.inner_rate)


def planned(learner: Learner, run: Run[Settings], name: str) -> int:
    """Steps of training: those asked for, or as many as the minutes allow."""
    settings = run.settings
    if settings.steps is not None:
        return settings.steps
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ValueError(
            "several processes need one number of steps, which the time cannot give them; got "
            "--steps none. Pass --steps."
        )
    batch = batch_of(name, settings)
    path = run.path(f"{name}/steps.json")
    steps = steps_within(path, learner, 60 * settings.minutes, batch, batch, resume=run.resume)
    return max(steps, settings.curve_points)


def train(learner: Learner, run: Run[Settings], name: str, curve: Tasks) -> Result:
    """Train one method, with its learning curve."""
    with warnings.catch_warnings():
        # Few adjoint steps are the setting: some tasks miss the tolerance in nearly every step.
        warnings.simplefilter("ignore", implicitopt.AdjointWarning)
        return _train(learner, run, name, curve)


def _train(learner: Learner, run: Run[Settings], name: str, curve: Tasks) -> Result:
    settings = run.settings
    steps, batch = planned(learner, run, name), batch_of(name, settings)
    rate = settings.rate if name == "equilibrium" else 1e-3
    training = Training(steps, batch, rate, warmup=min(20, steps // 4), clip=1.0)

    def evaluate(learner: Learner) -> dict[str, float]:
        curve.to(learner.tasks.pixels.device)
        found = accuracies(learner, curve, settings.curve_tasks, settings.batch)
        return {"accuracy": found.mean().item()}

    if not run.quiet and main_process():
        tqdm.write(f"{name}: {steps} steps")
    every = max(steps // settings.curve_points, 1)
    items = steps * batch  # one epoch: no task comes twice
    return fit(learner, run, training, items=items, evaluate=evaluate, every=every, name=name)


def minutes(result: Result, row: dict[str, float]) -> float:
    """When in the training an evaluation was, as its steps take about the same time each."""
    return result.seconds / 60 * row["step"] / len(result.losses)


def study(learner: Equilibrium, test: Tasks, settings: Settings) -> dict[str, Any]:
    """How hard it is to differentiate through x*, by decay, and how right after few sweeps."""
    episode = test(torch.arange(settings.study_tasks))
    hard = conditioning(learner, episode, DECAYS, settings.study_steps)
    few = test(torch.arange(min(4, settings.study_tasks)))
    right = agreement(learner, few, (settings.sweeps, *SWEEPS), STEPS)
    return {"adjoint": [asdict(row) for row in hard], "gradients": [asdict(row) for row in right]}


def draw_curves(path: Path, curves: dict[str, list[tuple[float, float]]], chance: float) -> None:
    """Accuracy against minutes of training."""
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
    for method, points in curves.items():
        axis.plot(*zip(*points, strict=True), marker=".", label=method)
    axis.axhline(100 * chance, color="gray", linewidth=0.8, linestyle=":")
    axis.set(xlabel="minutes of training", ylabel="accuracy on new tasks, %")
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_task(path: Path, episode: Episode, predicted: Tensor, ways: int) -> None:
    """One task: each row a class, its support, then its queries; wrong answers are framed."""
    from matplotlib import pyplot as plt

    parts = (episode.support, episode.query)
    support, query = (part[0, :, 0].cpu().unflatten(0, (ways, -1)) for part in parts)
    shots, columns = support.shape[1], support.shape[1] + query.shape[1]
    answers = predicted[0].unflatten(0, (ways, -1))
    size = (0.8 * columns, 0.9 * ways)
    figure, axes = plt.subplots(ways, columns, figsize=size, layout="constrained")
    for row in range(ways):
        for column, image in enumerate(torch.cat([support[row], query[row]])):
            axis = axes[row, column]
            axis.imshow(image, cmap="gray_r", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
            if column < shots:
                axis.set_title(f"class {row}", fontsize=8, color="tab:blue")
                continue
            answer = answers[row, column - shots].item()
            color = "black" if answer == row else "tab:red"
            axis.set_title(str(answer), fontsize=8, color=color)
            axis.spines[:].set_color(color)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def report(results: dict[str, Any], settings: Settings) -> str:
    """The results, for people."""
    rows = [
        (name, 100 * row["accuracy"], 100 * row["interval"], row["steps"], row["minutes"])
        for name, row in results["methods"].items()
    ]
    title = f"{settings.ways}-way {settings.shots}-shot, {settings.test_tasks} new tasks"
    text = f"{title}\n" + table(rows, ("method", "accuracy %", "± (95 %)", "steps", "minutes"))
    for key, title in (
        ("adjoint", "differentiating through x*, by decay (steps: Krylov)"),
        (
            "gradients",
            "the gradient by sweeps of the solve (and Krylov steps), beside the exact one",
        ),
    ):
        if results[key]:
            names = tuple(results[key][0])
            found = table([tuple(row.values()) for row in results[key]], names)
            text += f"\n\n{title}\n{found}"
    return text


def main(argv: Sequence[str] | None = None) -> None:
    """Train each method, test it, study the adjoint, draw."""
    run = parse(__doc__, PRESETS, argv, name="meta_omniglot")
    settings = run.settings
    matplotlib.use("Agg")
    bar = partial(tqdm, disable=run.quiet or not main_process(), leave=False, desc="test")
    background, evaluation = (characters(run, split) for split in ("background", "evaluation"))
    curve, test = (
        Tasks(evaluation, settings.ways, settings.shots, queries=5, seed=seed_of(run.seed, stream))
        for stream in (CURVE, TEST)
    )
    methods = METHODS if settings.methods == "all" else (settings.methods,)
    results: dict[str, Any] = {"methods": {}, "adjoint": [], "gradients": []}
    curves = {}
    for method in methods:
        learner = make(method, background, run)
        result = train(learner, run, method, curve)
        learner.eval()
        test.to(learner.tasks.pixels.device)
        found = accuracies(learner, test, settings.test_tasks, 10, bar)
        accuracy, half = interval(found)
        curves[method] = [(minutes(result, r), 100 * r["accuracy"]) for r in result.evaluations]
        results["methods"][method] = {
            "accuracy": accuracy, "interval": half, "steps": len(result.losses),
            "minutes": result.seconds / 60, "losses": result.losses, "curve": curves[method],
        }  # fmt: skip
        if method == "equilibrium":
            if settings.study_tasks:
                results |= study(learner, test, settings)
            if main_process():
                episode = test(torch.arange(1))
                with torch.no_grad():
                    answers = learner.logits(episode).argmax(dim=-1)
                draw_task(run.path("task.png"), episode, answers, settings.ways)
    if main_process():
        draw_curves(run.path("curves.png"), curves, 1 / settings.ways)
    run.write(results, report(results, settings))


if __name__ == "__main__":
    main()
