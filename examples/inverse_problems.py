"""Inverse problems with an equilibrium generator: inpainting and denoising.

Given only the visible, or noisy, pixels of an image, find the code x of the image by

    minimize over x   ‖visible · (image(z) − given)‖² + λ/2 ‖x‖²    subject to   z = f(z, x)

Unsupervised, with a generator that examples/generative.py trained on clean images, next to Adam on
the codes of a VAE's decoder for an equal time. And supervised: the generator is trained on through
these solves, to show the *clean* image at the solution. The outer loss is then not the inner one,
and its gradient holds x constant (`FrozenInput`, as in the paper) or follows it (`Implicit`), each
for an equal time. (JIIO, eq. 21–24, Table 4.)

The window hidden is 20/64 of an image's side. Noise is given as in the paper, for pixels in
[−1, 1]; here they lie in [0, 1], so σ is half of it. PSNRs are medians over images and take in all
pixels; the paper's convention, peak 1 for pixels in [−1, 1], is 6.02 dB below the usual one.
"""

from __future__ import annotations

import math
import sys
import time
import warnings
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

import implicitopt
from experiment import Run, main_process, parse, solver, table
from generators import Search, decode, find_codes, load, matching, penalty
from generators.pictures import sheet
from generators.pretrained import device, generator, read_models
from generators.reading import read_images
from mdeq import Decoder
from training import Training, fit, steps_within

METHODS = ("jiio", "vae")  # of the generators
WINDOW = 20 / 64  # of the side
NOISE = {"denoise-0.2": 0.2, "denoise-0.4": 0.4}  # σ for pixels in [−1, 1]
TASKS = ("inpaint", *NOISE)


@dataclass(frozen=True)
class Settings:
    """What is restored, and how.

    Args:
        generator: folder of a finished run of examples/generative.py with methods jiio and vae;
            none: one is trained first, with the preset of the same name.
        dataset: what --data holds.
        images: to train on with supervision, at most; none: all.
        held_out: images to restore, at most.
        tasks: any of inpaint, denoise-0.2, denoise-0.4.
        adjoints: of supervised training, any of frozen, implicit; the others get as much time as
            the first.
        steps: of supervised training; 0: none.
        batch: images, so problems, per step.
        rate: Adam's learning rate.
        sweeps: of each training step's solve.
        test_sweeps: of each held-out image's solve.
        decay: λ, how strongly codes are drawn towards 0.
        penalty: weight of the Jacobian's size.
        adjoint_steps: of the linear solve in a training step's backward pass, at most.
        adam_rate: of the codes of the VAE's decoder.
        memory: of the joint and of the paper's solver.
        step_size: of the paper's solver, in the codes.
    """

    generator: str | None = None
    dataset: Literal["faces", "mnist", "cifar10"] = "faces"
    images: int | None = 2000
    held_out: int = 64
    tasks: tuple[str, ...] = TASKS
    adjoints: tuple[str, ...] = ("frozen", "implicit")
    steps: int = 100
    batch: int = 16
    rate: float = 5e-4
    sweeps: int = 30
    test_sweeps: int = 160
    decay: float = 0.5
    penalty: float = 100.0
    adjoint_steps: int = 20
    adam_rate: float = 0.05
    memory: int = 40
    step_size: float = 0.01

    def __post_init__(self) -> None:
        for name, known in (("tasks", TASKS), ("adjoints", ("frozen", "implicit"))):
            given = getattr(self, name)
            if not given or set(given) - set(known) or len(set(given)) < len(given):
                raise ValueError(
                    f"{name} must be different ones of {', '.join(known)}; got {', '.join(given)}."
                )


CPU = Settings()
PRESETS = {
    "cpu": CPU,
    "smoke": replace(
        CPU,
        images=64,
        held_out=8,
        tasks=("inpaint", "denoise-0.4"),
        steps=4,
        batch=8,
        sweeps=10,
        decay=0.05,
        penalty=100.0,
        test_sweeps=30,
    ),
    "paper": replace(
        CPU, images=None, held_out=10_000, steps=50_000, batch=48, rate=1e-4, sweeps=40,
        penalty=500.0, test_sweeps=100, adjoint_steps=50,
    ),
}  # fmt: skip


def windows(count: int, side: int, generator: torch.Generator) -> Tensor:
    """``(count, 1, side, side)``: 0 in a square window somewhere, 1 elsewhere."""
    hidden = round(WINDOW * side)
    corner = torch.randint(side - hidden + 1, (2, count, 1), generator=generator)
    inside = (torch.arange(side) >= corner) & (torch.arange(side) < corner + hidden)
    return 1 - (inside[0, :, None, :, None] & inside[1, :, None, None, :]).float()


def corrupt(images: Tensor, task: str, seed: int) -> tuple[Tensor, Tensor]:
    """What is given of images in [0, 1], and where it counts, ``(N, 1 or C, H, W)``."""
    generator = torch.Generator().manual_seed(seed)
    if task == "inpaint":
        visible = windows(len(images), images.shape[-1], generator).to(images)
        return images * visible, visible
    noise = torch.randn(images.shape, generator=generator).to(images)
    return images + NOISE[task] / 2 * noise, torch.ones_like(images)


def psnr(shown: Tensor, images: Tensor) -> dict[str, float]:
    """The median PSNR in dB of images in [0, 1], and the same in the paper's convention."""
    error = (shown - images).square().mean(dim=(1, 2, 3))
    usual = (-10 * error.log10()).quantile(0.5).item()
    return {"psnr": usual, "psnr_paper": usual - 10 * math.log10(4)}


def adam_codes(
    decoder: nn.Module, given: Tensor, visible: Tensor, *, decay: float, rate: float, seconds: float
) -> Tensor:
    """Codes by Adam from 0 through a decoder of plain convolutions, for a given time."""
    codes = given.new_zeros(len(given), decoder.latent, requires_grad=True)
    optimizer = torch.optim.Adam([codes], lr=rate)
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds:
        optimizer.zero_grad()
        error = (visible * (decoder(codes) - given) ** 2).sum()
        (error + decay / 2 * codes.square().sum()).backward()
        optimizer.step()
    return codes.detach()


class Restoration(nn.Module):
    """The objective of supervised training: the clean image at the corrupted image's solution.

    Args:
        decoder: the generator to train on.
        images: ``(N, C, H, W)``, uint8.
        task: one of ``TASKS``.
        adjoint: how the gradient of the outer loss goes through the solution.
        search: the solve of each step.
        penalty: weight of the Jacobian's size.
    """

    def __init__(
        self,
        decoder: Decoder,
        images: Tensor,
        task: str,
        adjoint: implicitopt.FrozenInput | implicitopt.Implicit,
        search: Search,
        penalty: float,
    ) -> None:
        super().__init__()
        self.decoder, self.task, self.adjoint = decoder, task, adjoint
        self.search, self.weight = search, penalty
        self.register_buffer("images", images, persistent=False)

    def forward(self, indices: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        clean = self.images[indices] / 255
        given, visible = corrupt(clean, self.task, int(torch.randint(2**31, ())))
        sol = implicitopt.solve(
            self.decoder.f,
            matching(self.decoder, given, self.search.decay, visible),
            clean.new_zeros(len(clean), self.decoder.latent),
            self.decoder.start,
            solver=self.search.solver,
            adjoint=self.adjoint,
            max_steps=self.search.sweeps,
            sample_iterate=True,
        )
        error = (self.decoder.image(sol.z) - clean).square().sum(dim=(1, 2, 3)).mean()
        size = penalty(self.decoder, *sol.iterate)
        return error + self.weight * size, {"mse": error / clean[0].numel(), "jacobian": size}


def unsupervised(
    run: Run[Settings],
    models: dict[str, nn.Module],
    task: str,
    images: Tensor,
    how: Search,
    bar: Any,
) -> tuple[dict[str, dict], dict[str, Tensor]]:
    """A task with generators of clean images: what each reaches, and shows."""
    given, visible = corrupt(images, task, run.seed)
    begin = time.perf_counter()
    codes = find_codes(models["jiio"], given, how, visible=visible, bar=bar)
    seconds = time.perf_counter() - begin
    shown = {"given": given, "jiio": decode(models["jiio"], codes)}
    settings = run.settings
    options = {"decay": settings.decay, "rate": settings.adam_rate, "seconds": seconds}
    shown["vae + Adam"] = decode(
        models["vae"], adam_codes(models["vae"], given, visible, **options)
    )
    found = {name: psnr(pictures, images) for name, pictures in shown.items()}
    for name in ("jiio", "vae + Adam"):
        found[name]["seconds"] = seconds
    return found, shown


def supervised(
    run: Run[Settings],
    folder: Path,
    task: str,
    adjoint: str,
    images: Tensor,
    how: Search,
    seconds: float,
) -> tuple[Decoder, dict[str, float]]:
    """The generator trained on for a task, and what that took; ``seconds`` if not 0."""
    settings = run.settings
    torch.manual_seed(run.seed)
    decoder = load(folder, "decoder-jiio")[1].requires_grad_(True)
    kinds = {
        "frozen": implicitopt.FrozenInput(tol=3e-2, max_steps=settings.adjoint_steps),
        "implicit": implicitopt.Implicit(tol=3e-2, max_steps=settings.adjoint_steps),
    }
    objective = Restoration(decoder, images, task, kinds[adjoint], how, settings.penalty)
    name = f"{task}-{adjoint}"
    steps = settings.steps
    with warnings.catch_warnings():
        # A few steps of the adjoint's solve are meant to be inexact.
        warnings.simplefilter("ignore", implicitopt.AdjointWarning)
        if seconds:
            path = run.path(f"{name}/steps.json")
            steps = steps_within(
                path, objective, seconds, len(images), settings.batch, resume=run.resume
            )
        training = Training(steps, settings.batch, settings.rate, clip=1000.0)
        result = fit(objective, run, training, items=len(images), name=name)
    return decoder.requires_grad_(False), {"steps": steps, "train_seconds": result.seconds}


def show(results: dict[str, dict]) -> str:
    """The results, for people."""
    rows = [
        (task, name, row["psnr"], row["psnr_paper"], row.get("steps"), row.get("train_seconds"))
        for task, found in results.items()
        for name, row in found.items()
    ]
    header = ("task", "image", "PSNR", "PSNR, paper's", "steps", "train s")
    return table(rows, header)


def main(arguments: list[str] | None = None) -> None:
    """Restore with generators as they are, then with generators trained for it."""
    run = parse(__doc__, PRESETS, arguments, name="inverse_problems")
    settings, bar = run.settings, partial(tqdm, disable=run.quiet, leave=False)
    folder = generator(run, METHODS)
    architecture, models = read_models(folder, METHODS)
    images, held_out = read_images(
        run, settings.dataset, architecture.image[1], settings.images, settings.held_out
    )
    chosen = solver(run.solver, memory=settings.memory, x=settings.step_size)
    training, testing = (
        Search(sweeps, settings.decay, chosen) for sweeps in (settings.sweeps, settings.test_sweeps)
    )
    results, shown, clean = {}, {}, held_out.to(device()) / 255
    for task in settings.tasks:
        results[task], shown[task] = unsupervised(run, models, task, clean, testing, bar)
        seconds = 0.0
        for adjoint in settings.adjoints if settings.steps else ():
            decoder, took = supervised(run, folder, task, adjoint, images, training, seconds)
            seconds = seconds or took["train_seconds"]
            given, visible = corrupt(clean, task, run.seed)
            codes = find_codes(decoder, given, testing, visible=visible, bar=bar)
            pictures = decode(decoder, codes)
            name = f"supervised, {adjoint}"
            results[task][name], shown[task][name] = psnr(pictures, clean) | took, pictures
    if main_process():
        for task in settings.tasks:
            sheet(run.path(f"{task}.png"), {"clean": clean} | shown[task])
        run.write(results, show(results))


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
