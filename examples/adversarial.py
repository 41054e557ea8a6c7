"""Adversarial training: an equilibrium classifier learns from the images that it fears most.

An attack looks for the change δ of an image, no longer than ε, that raises the loss most:

    maximize over δ   ℓ(z, label)   subject to   z = f(z, image + δ)   and   ‖δ‖₂ ≤ ε

The usual attack is projected gradient ascent (PGD), with an equilibrium and its adjoint solved for
each of its 20 steps. `implicitopt.solve` finds state, adjoint and δ together instead; the loss at
its solution carries the gradient in the weights, which is all that training needs.

After a start on clean images the same weights are trained in three ways: on clean images, on images
attacked jointly, and, for as long, on images attacked by PGD. Each classifier is then attacked by
both, and by a referee that is not of this project if it is installed (`pip install
adversarial-robustness-toolbox`). All accuracies are at equilibria that were solved for anew.

The paper's runs are `--preset paper --solver paper`, with `--dataset cifar10` and `--radius 0.5`.

Source: JIIO eq. 25-26, tables 2, 5 and 8.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from attacks import Attack, Robust, evaluate, has_referee, judge, race, referee
from attacks.pictures import draw_attacks, draw_curves
from attacks.report import report
from data import cifar10, mnist
from data.images import Images
from experiment import Run, main_process, parse, solver
from mdeq import Classifier
from training import Training, fit, steps_within

Data = tuple[Tensor, Tensor]  # images and labels
READERS = {"mnist": mnist, "cifar10": cifar10}
#: Sweeps that an attack is given in turn, until it is as hard as PGD.
BUDGETS = (4, 6, 8, 10, 12, 16, 20, 24, 32, 40, 60, 80)


@dataclass(frozen=True)
class Settings:
    """What is trained, how, and how it is judged.

    Args:
        dataset: mnist or cifar10.
        methods: of training: clean, joint, pgd.
        radius: ε, the longest change of an image, for pixels in [0, 1].
        clip: cut attacked images to [0, 1]; the paper does not.
        channels: of the classifier's branches.
        stride: the finest branch is at 1/stride of the image's size.
        expansion: how much wider the inside of a block is.
        start_steps: training steps on clean images that all methods start from; 0: none.
        steps: training steps of the joint method; PGD gets as much time, if both are trained.
        clean_steps: training steps on clean images, after those that all start from.
        batch: images a step.
        rate: Adam's peak learning rate.
        sweeps: of the joint attack in training, and of clean training.
        train_pgd_steps: of PGD in training.
        jacobian: weight of the Jacobian penalty per state entry.
        penalized: images of a batch that the penalty is estimated on.
        pgd_steps: of PGD as an attack on the trained classifiers.
        pgd_rate: length of its steps.
        attack_sweeps: of the joint attack on the trained classifiers.
        referee_steps: of the referee's attack; 0: none.
        test_images: how many the classifiers are judged on when attacked.
        clean_images: and when not; none: all.
        curve_images: how many at each ε of the curve.
        timed_images: how many the attacks are timed on, as one batch.
        watched_images: how many each classifier is judged on while it is trained.
        watches: how often that is.
    """

    dataset: Literal["mnist", "cifar10"] = "mnist"
    methods: tuple[str, ...] = ("clean", "joint", "pgd")
    radius: float = 1.0
    clip: bool = False
    channels: tuple[int, ...] = (32, 48)
    stride: int = 4
    expansion: int = 2
    start_steps: int = 300
    steps: int = 4000
    clean_steps: int = 600
    batch: int = 32
    rate: float = 4e-3
    sweeps: int = 10
    train_pgd_steps: int = 5
    jacobian: float = 0.1
    penalized: int = 8
    pgd_steps: int = 20
    pgd_rate: float = 0.2
    attack_sweeps: int = 40
    referee_steps: int = 20
    test_images: int = 500
    clean_images: int | None = None
    curve_images: int = 100
    timed_images: int = 64
    watched_images: int = 100
    watches: int = 8

    def __post_init__(self) -> None:
        known = ("clean", "joint", "pgd")
        if not self.methods or not set(self.methods) <= set(known):
            raise ValueError(f"methods must be some of {', '.join(known)}; got {self.methods}")
        if not self.radius > 0:
            raise ValueError(f"radius must be positive; got {self.radius}")


PRESETS = {
    "cpu": Settings(),
    "smoke": Settings(
        channels=(8, 16),
        stride=2,
        start_steps=40,
        steps=40,
        clean_steps=10,
        batch=24,
        rate=8e-3,
        train_pgd_steps=3,
        penalized=4,
        attack_sweeps=10,
        pgd_steps=5,
        referee_steps=2,
        test_images=32,
        clean_images=32,
        curve_images=4,
        timed_images=4,
        watched_images=8,
        watches=1,
    ),
    "paper": Settings(
        channels=(24, 24),
        stride=1,
        expansion=5,
        start_steps=0,
        steps=30_000,
        clean_steps=30_000,
        batch=96,
        rate=1e-3,
        sweeps=80,
        train_pgd_steps=20,
        jacobian=0.01,
        penalized=96,
        attack_sweeps=80,
        referee_steps=100,
        test_images=10_000,
        curve_images=1_000,
    ),
}


def chosen(s: Settings, name: str) -> Any | None:
    """The solver of that name; "paper" with the paper's step size for the data set."""
    return solver(name, x=0.1) if s.dataset == "cifar10" else solver(name)


def training_attack(method: str, run: Run[Settings]) -> Attack:
    """The attack that a method trains against."""
    s = run.settings
    if method == "pgd":
        # Fewer steps must be longer to reach as far: 2.5 ε in all.
        rate = max(s.pgd_rate, min(1.0, 2.5 / s.train_pgd_steps) * s.radius)
        # Each solve starts from the last one's state, and a few iterations bring it to rest.
        return Attack.pgd(s.radius, s.train_pgd_steps, rate=rate, inner_steps=5, clip=s.clip)
    radius = s.radius if method == "joint" else 0.0
    return Attack(radius, s.sweeps, chosen(s, run.solver), s.clip)


def watch(run: Run[Settings], data: Data, objective: Robust) -> dict[str, float]:
    """Accuracy on a few test images, before and after the joint attack."""
    s, device = run.settings, next(objective.parameters()).device
    images, labels = (part[: s.watched_images].to(device) for part in data)
    attack = Attack(s.radius, s.sweeps, chosen(s, run.solver), s.clip)
    shown = {"clean": images, "joint": attack.change(objective.model, images, labels)}
    return {
        name: judge(objective.model, some, labels).right.float().mean().item()
        for name, some in shown.items()
    }


def train(
    run: Run[Settings],
    model: Classifier,
    name: str,
    images: Images,
    watched: Data,
    seconds: float | None = None,
) -> dict[str, Any]:
    """Train the model in place, as a start or by the method of that name; what became of it.

    For as many steps as the settings say, or as take so many ``seconds``.
    """
    s = run.settings
    method = "clean" if name == "start" else name
    objective = Robust(
        model,
        training_attack(method, run),
        images,
        jacobian=s.jacobian,
        penalized=s.penalized,
        flips=s.dataset == "cifar10",
    )
    steps = {"start": s.start_steps, "clean": s.clean_steps}.get(name, s.steps)
    if seconds is not None:
        path = run.path(f"{name}/steps.json")
        steps = steps_within(path, objective, seconds, len(images), s.batch, resume=run.resume)
    plan = Training(steps, s.batch, s.rate, warmup=steps // 10, clip=1.0)
    every = max(1, steps // s.watches)
    look = partial(watch, run, watched)
    result = fit(objective, run, plan, items=len(images), evaluate=look, every=every, name=name)
    last = result.losses[-max(1, steps // 5) :]
    return {
        "steps": steps,
        "seconds": result.seconds,
        "first_loss": result.losses[0],
        "last_loss": sum(last) / len(last),
        "skipped": result.skipped,
        "watched": [
            {**told, "minutes": told["step"] / steps * result.seconds / 60}
            for told in result.evaluations
        ],
    }


def train_all(
    run: Run[Settings], images: Images, watched: Data
) -> tuple[dict[str, Classifier], dict[str, Any]]:
    """A classifier for each method, and what became of its training."""
    s = run.settings
    colors, side = images.pixels.shape[1:3]
    torch.manual_seed(run.seed)
    start = Classifier((colors, side), s.channels, stride=s.stride, expansion=s.expansion)
    facts = {}
    if s.start_steps:
        facts["start"] = train(run, start, "start", images, watched)
    models = {}
    for method in s.methods:
        model = copy.deepcopy(start)
        equal = facts["joint"]["seconds"] if method == "pgd" and "joint" in facts else None
        facts[method] = train(run, model, method, images, watched, equal)
        models[method] = model.eval().requires_grad_(False)
    return models, facts


def held_out(run: Run[Settings]) -> tuple[Data, Sequence[str]]:
    """Test images in [0, 1] in a random order with their labels, and the names of these."""
    images = READERS[run.settings.dataset](run.data, train=False, quiet=run.quiet)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(run.seed))
    return (images.pixels[order] / 255, images.labels[order]), images.classes


def attacks(run: Run[Settings]) -> dict[str, Any]:
    """By name, what turns a model, images and labels into the images that the model is shown."""
    s = run.settings
    found = {
        "clean": lambda model, images, labels: images,
        "pgd": Attack.pgd(s.radius, s.pgd_steps, rate=s.pgd_rate, clip=s.clip).change,
        "joint": Attack(s.radius, s.attack_sweeps, chosen(s, run.solver), s.clip).change,
    }
    if s.referee_steps and has_referee():
        options = {"radius": s.radius, "iterations": s.referee_steps, "clip": s.clip}
        found["referee"] = partial(referee, **options, seed=run.seed)
    elif s.referee_steps:
        print("No referee: it needs `pip install adversarial-robustness-toolbox`.")
    return found


def judged(model: Classifier, change, images: Tensor, labels: Tensor, bar) -> dict[str, float]:
    """`evaluate`, in batches of 100."""
    batches = list(zip(images.split(100), labels.split(100), strict=True))
    return evaluate(model, change, bar(batches))


def matrix(run: Run[Settings], models: dict[str, Classifier], data: Data, bar) -> dict[str, Any]:
    """By way of training and attack: the accuracy and all else that `evaluate` tells."""
    changes, s = attacks(run), run.settings

    def few(name: str) -> list[Tensor]:
        count = s.clean_images if name == "clean" else s.test_images
        return [part[:count] for part in data]

    return {
        trained: {
            name: judged(model, change, *few(name), partial(bar, desc=f"{trained}, {name}"))
            for name, change in changes.items()
        }
        for trained, model in models.items()
    }


def curve(run: Run[Settings], models: dict[str, Classifier], data: Data, bar) -> dict[str, Any]:
    """Accuracy under the joint attack at several ε."""
    s = run.settings
    few = [part[: s.curve_images] for part in data]
    radii = [share * s.radius for share in (0.0, 0.25, 0.5, 1.0, 1.5, 2.0)]
    found: dict[str, list[float]] = {name: [] for name in models}
    for name, model in models.items():
        for radius in radii:
            change = Attack(radius, s.attack_sweeps, chosen(s, run.solver), s.clip).change
            told = judged(model, change, *few, partial(bar, desc=f"{name}, ε = {radius:g}"))
            found[name].append(told["accuracy"])
    return {"radii": radii, "accuracy": found}


def times(run: Run[Settings], model: Classifier, data: Data, bar) -> dict[str, Any]:
    """The attacks side by side, each as hard as PGD."""
    s = run.settings
    images, labels = (part[: s.timed_images] for part in data)
    pgd = Attack.pgd(s.radius, s.pgd_steps, rate=s.pgd_rate, clip=s.clip)
    others = {
        name: [Attack(s.radius, sweeps, chosen(s, name), s.clip) for sweeps in BUDGETS]
        for name in ("joint-first", "default", "one-shot", "paper")
    }
    # PGD may be content with rougher equilibria: the strictest comparison is with that.
    rough = Attack.pgd(s.radius, s.pgd_steps, rate=s.pgd_rate, inner_steps=5, clip=s.clip)
    others = {"pgd, 5 inner steps": [rough], **others}
    return race(model, pgd, others, images, labels, bar)


def pictures(run: Run[Settings], models: dict[str, Classifier], data: Data, classes, found) -> None:
    """What the joint attack does to ten images, and accuracy against ε and training time."""
    s = run.settings
    images, labels = (part[:10] for part in data)
    attack = Attack(s.radius, s.attack_sweeps, chosen(s, run.solver), s.clip)
    rows = {}
    for name, model in models.items():
        changed = attack.change(model, images, labels)
        rows[name] = (changed, judge(model, changed, labels).answer)
    draw_attacks(run.path("attacks.png"), images, labels, rows, classes)
    curve = found["curve"]
    lines = {name: (curve["radii"], values) for name, values in curve["accuracy"].items()}
    draw_curves(run.path("curve.png"), lines, "ε")
    watched = {name: found["training"][name]["watched"] for name in models}
    lines = {
        name: ([told["minutes"] for told in rows], [told["joint"] for told in rows])
        for name, rows in watched.items()
    }
    draw_curves(run.path("training.png"), lines, "minutes of training")


def main(argv: Sequence[str] | None = None) -> None:
    """Train, attack, time, draw."""
    run = parse(__doc__, PRESETS, argv, name="adversarial")
    s = run.settings
    bar = partial(tqdm, disable=run.quiet, leave=False)
    images = READERS[s.dataset](run.data, train=True, quiet=run.quiet)
    data, classes = held_out(run)
    models, training = train_all(run, images, data)
    if not main_process():
        return
    device = next(models[s.methods[0]].parameters()).device
    data = data[0].to(device), data[1].to(device)
    # The attacks are raced on a robust classifier, where there is one: it is the harder to attack.
    raced = models.get("joint", models[s.methods[-1]])
    results = {
        "training": training,
        "accuracy": matrix(run, models, data, bar),
        "times": times(run, raced, data, bar),
        "curve": curve(run, models, data, bar),
    }
    pictures(run, models, data, classes, results)
    run.write(results, report(results))


if __name__ == "__main__":
    main()
