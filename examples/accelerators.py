"""Every accelerator and solver on one trained equilibrium decoder: what a sweep and a second buy.

The problems are held-out images, whose codes x are looked for from 0:

    minimize over x   ‖image(z) − target‖² + λ/2 ‖x‖²    subject to   z = f(z, x)

with a generator that examples/generative.py trained (--solver is that training's). Draws, against
sweeps and against time,

- the loss, a mean over the images, of the codes that a solve with that budget returns, at their
  true equilibrium, which is solved for anew: off it, an iterate's own loss may be anything;
- the lowest relative KKT residual among a solve's iterates so far, the median over the images
  with its quartiles. The codes returned are those of the lowest loss, not of that residual.

The contestants:

    default       Adaptive(): as sqp for 80 sweeps, then anderson-1 where that makes no headway
    anderson-1    Joint with Anderson acceleration of type I, its default
    anderson-2    the same of type II
    broyden       Joint with Broyden's good method
    picard        Joint without acceleration, damped
    paper         Joint with the paper's settings: type I without ridge, α_z = .8, α_μ = .6
    one-shot      OneShot()
    sqp           SQP(): fewest sweeps, and more work of its own
    nested-adam   Adam on the codes, equilibrium and adjoint solved for at each update: best rate
    nested-lbfgs  L-BFGS with a line search instead, one image at a time: it would couple a batch

A nested solver's sweeps are the evaluations of f and of its vjp, halved. (JIIO, appendix A.2,
figure 4.)
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

import implicitopt
from experiment import main_process, parse, solver, table
from generators.contest import Contestant, Result, contest
from generators.pictures import progress
from generators.pretrained import device, generator, read_models
from generators.race import true_loss
from generators.reading import read_images
from implicitopt import SQP, Anderson, Broyden, Joint, Nested, OneShot, Picard

CONTESTANTS = (
    "default", "anderson-1", "anderson-2", "broyden", "picard", "paper", "one-shot", "sqp",
    "nested-adam", "nested-lbfgs",
)  # fmt: skip
NEAR = 1.05  # times the lowest loss of all is near it


@dataclass(frozen=True)
class Settings:
    """Who takes part, and on what.

    Args:
        generator: folder of a finished run of examples/generative.py; none: a generator is trained
            first, with the preset of the same name.
        dataset: what --data holds.
        images: held-out images to find the codes of.
        contestants: any of default, anderson-1, anderson-2, broyden, picard, paper, one-shot,
            sqp, nested-adam, nested-lbfgs; none: all.
        sweeps: budgets, from few to many.
        updates: budgets of the nested solvers, in updates of the codes.
        repeats: of the timed runs.
        decay: λ, how strongly codes are drawn towards 0.
        memory: of the paper's solver.
        step_size: of the paper's solver, in the codes.
        damping: of picard.
        rates: of nested Adam; the best one is shown.
        inner_steps: of nested Adam's equilibria and adjoints, at most; nested L-BFGS, whose line
            search goes further at once, gets three times as many.
    """

    generator: str | None = None
    dataset: Literal["faces", "mnist", "cifar10"] = "faces"
    images: int = 8
    contestants: tuple[str, ...] | None = None
    sweeps: tuple[int, ...] = (5, 10, 20, 40, 80, 160)
    updates: tuple[int, ...] = (1, 2, 4, 8, 16)
    repeats: int = 3
    decay: float = 0.5
    memory: int = 40
    step_size: float = 0.01
    damping: float = 0.5
    rates: tuple[float, ...] = (0.1, 0.2, 0.4)
    inner_steps: int = 20

    def __post_init__(self) -> None:
        given = CONTESTANTS if self.contestants is None else self.contestants
        if not given or set(given) - set(CONTESTANTS) or len(set(given)) < len(given):
            raise ValueError(
                f"contestants must be different ones of {', '.join(CONTESTANTS)}; got "
                f"{', '.join(given)}."
            )
        for name in ("sweeps", "updates"):
            budgets = getattr(self, name)
            if not budgets or budgets[0] < 1 or list(budgets) != sorted(set(budgets)):
                raise ValueError(
                    f"{name} must be budgets from 1 up, each more than the one before, such as "
                    f"5,10,20; got {','.join(map(str, budgets))}."
                )
        if self.images < 1 or self.repeats < 1 or not self.rates:
            raise ValueError(
                "images and repeats must be at least 1, and rates at least one rate; got "
                f"{self.images}, {self.repeats} and {self.rates}."
            )


CPU = Settings()
PRESETS = {
    "cpu": CPU,
    "smoke": replace(
        CPU, images=4, sweeps=(5, 10, 20, 40), updates=(1, 2, 4), repeats=2, rates=(0.2, 0.4),
        decay=0.05,
    ),
    "paper": replace(
        CPU, images=48, contestants=CONTESTANTS[:-1],  # one image at a time would take hours
        sweeps=(5, 10, 20, 40, 60, 80, 100), updates=(1, 2, 5, 10, 20, 40),
    ),
}  # fmt: skip


def entrants(settings: Settings) -> dict[str, list[Contestant]]:
    """The contestants by name; of several under one name the best is shown."""
    joint = {
        "default": implicitopt.Adaptive(),
        "anderson-1": Joint(Anderson("I")),
        "anderson-2": Joint(Anderson("II")),
        "broyden": Joint(Broyden()),
        "picard": Joint(Picard(settings.damping)),
        "paper": solver("paper", memory=settings.memory, x=settings.step_size),
        "one-shot": OneShot(),
        "sqp": SQP(),
    }
    made = {name: [Contestant(name, s, settings.sweeps)] for name, s in joint.items()}
    inner = settings.inner_steps
    made["nested-adam"] = [
        Contestant(
            f"nested-adam, rate {rate:g}",
            Nested(partial(torch.optim.Adam, lr=rate), inner_steps=inner),
            settings.updates,
        )
        for rate in settings.rates
    ]
    # One iteration of L-BFGS an update, with as many looks as its line search needs.
    lbfgs = partial(torch.optim.LBFGS, lr=1.0, max_iter=1, line_search_fn="strong_wolfe")
    alone = Contestant(
        "nested-lbfgs", Nested(lbfgs, inner_steps=3 * inner), settings.updates, alone=True
    )
    made["nested-lbfgs"] = [alone]
    return {name: made[name] for name in settings.contestants or CONTESTANTS}


def best(results: Sequence[Result]) -> Result:
    """The one whose last loss is the lowest."""
    return min(results, key=lambda found: found.points[-1].loss)


def show(results: Sequence[Result], start: float) -> str:
    """The results, for people."""
    goal = NEAR * min(point.loss for found in results for point in found.points)
    rows = []
    for found in results:
        last, track, near = found.points[-1], found.track, found.first(goal)
        rows.append((
            found.name, last.loss, track.median[-1], last.f, last.vjp, last.seconds,
            1000 * track.seconds[-1] / track.work[-1],
            (near.f + near.vjp) / 2 if near else None, near.seconds if near else None,
        ))  # fmt: skip
    header = (
        "solver", "loss", "KKT residual", "f", "vjp", "seconds", "ms/sweep", "sweeps to near",
        "s to near",
    )  # fmt: skip
    note = (
        f"loss: {start:.4g} at codes of 0. KKT residual: the median of the lowest. near: the first "
        f"budget that brings a loss of {goal:.4g}, {NEAR:g} times the lowest."
    )
    return f"{table(rows, header)}\n\n{note}"


def main(arguments: list[str] | None = None) -> None:
    """Let each contestant find the codes of the same images."""
    run = parse(__doc__, PRESETS, arguments, name="accelerators", solver="joint")
    settings, bar = run.settings, partial(tqdm, disable=run.quiet, leave=False)
    named = entrants(settings)  # before anything that takes long: it checks options
    folder = generator(run, ["jiio"])
    if not main_process():
        return
    architecture, models = read_models(folder, ["jiio"])
    _, held_out = read_images(run, settings.dataset, architecture.image[1], 1, settings.images)
    target = held_out.to(device()) / 255
    nothing = target.new_zeros(len(target), architecture.latent)
    start = true_loss(models["jiio"], target, settings.decay, nothing)
    everyone = [contestant for several in named.values() for contestant in several]
    found = {
        result.name: result
        for result in contest(
            models["jiio"], target, settings.decay, everyone, settings.repeats, bar
        )
    }
    results = [best([found[c.name] for c in several]) for several in named.values()]
    progress(run.path("accelerators.png"), results)
    run.write({"start": start, "contestants": results}, show(results, start))


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
