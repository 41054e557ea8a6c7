"""Trained models as problems: decoders' codes for held-out images, and an attack on a classifier.

The digits' models are small, and trained here in a minute and kept in a folder: the quickstart's
decoder, and a multiscale equilibrium classifier. Decoders that ``examples/generative.py`` trained,
of faces or of MNIST, join by their folders.
"""

from __future__ import annotations

import io
import json
import os
import runpy
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

import implicitopt
from benchmarks.problems import Setting
from implicitopt import L2Ball

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
IMAGES = 8  # problems of each
LATENT = 20  # of the digits' codes
BOUND = 1.0  # on an attack's change of an image, its 2-norm

__all__ = ["digits", "of_tutorial", "trained_models"]


def digits(
    folder: Path, *, steps: int, bar: Callable[..., Any], count: int = IMAGES
) -> tuple[Any, ...]:
    """The quickstart's decoder: the arguments of ``solve`` for ``count`` held-out digits."""
    quickstart = examples_module("quickstart")
    torch.manual_seed(0)
    images, held_out = quickstart.digits(0)
    model = quickstart.Decoder(LATENT)
    _kept(model, folder / f"digits-{steps}.pt", lambda: quickstart.train(
        model, images, steps, 64, 1e-2, bar
    ))  # fmt: skip
    return _frozen(model), model.loss(held_out[:count]), torch.zeros(count, LATENT), model.start


def of_tutorial() -> tuple[Any, ...]:
    """The first tutorial's decoder, trained as its page is run: the same for its 64 digits."""
    import matplotlib

    matplotlib.use("agg")
    with mock.patch.dict(os.environ), redirect_stdout(io.StringIO()):
        os.environ.pop("IMPLICITOPT_DATA", None)  # it takes scikit-learn's digits then
        page = runpy.run_path(str(EXAMPLES / "tutorials" / "1_invert_a_generator.py"))
    held_out = page["held_out"]
    x0 = torch.zeros(len(held_out), page["latent"])
    return page["f"], page["matching"](held_out), x0, page["start"]


def attack(folder: Path, *, steps: int, bar: Callable[..., Any], count: int = IMAGES) -> Setting:
    """Changes of images, within ``BOUND``, that an equilibrium classifier of digits fears most.

    The logarithm of the cross-entropy is made largest, as ``examples/adversarial.py`` has it.
    """
    from sklearn.datasets import load_digits

    mdeq, attacks = examples_module("mdeq"), examples_module("attacks")
    torch.manual_seed(0)
    raw = load_digits()
    images = torch.tensor(raw.images / 16, dtype=torch.float32)[:, None]
    labels = torch.tensor(raw.target)
    model = mdeq.Classifier((1, 8), (12, 12))
    _kept(model, folder / f"classifier-{steps}.pt", lambda: _classify(
        model, images[:-count], labels[:-count], steps, bar
    ))  # fmt: skip
    some, wanted = images[-count:], labels[-count:]
    layer = _frozen(model)

    def f(z: Any, change: Tensor) -> Any:
        return layer(z, some + change)

    def loss(z: Any, change: Tensor) -> Tensor:
        return -attacks.log_cross_entropy(model.logits(z), wanted)

    start = model.start(some)
    return Setting(
        (f, loss, torch.zeros_like(some), lambda x: start), None, {"project": L2Ball(BOUND)}
    )


def _classify(
    model: nn.Module, images: Tensor, labels: Tensor, steps: int, bar: Callable[..., Any]
) -> None:
    """Train a classifier at its equilibria, with a penalty that keeps its layer contractive."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in bar(range(steps), desc="train"):
        rows = torch.randperm(len(images))[:64]
        z = implicitopt.fixed_point(model.f, images[rows], model.start, tol=1e-3, max_steps=40)
        error = nn.functional.cross_entropy(model.logits(z), labels[rows])
        at = tuple(branch.detach() for branch in z)
        penalty = implicitopt.jacobian_penalty(model.f, at, images[rows]).mean()
        optimizer.zero_grad()
        (error + penalty / sum(branch[0].numel() for branch in z)).backward()
        optimizer.step()
        schedule.step()


def of_generator(folder: Path, data: Path, settings: dict[str, Any]) -> Setting:
    """The decoder in a folder of ``examples/generative.py``, for held-out images of its kind."""
    reading, generators = examples_module("generators.reading"), examples_module("generators")
    _, model = examples_module("generators.architecture").load(folder, "decoder-jiio")
    run = SimpleNamespace(data=data, quiet=True)
    _, images = reading.read_images(run, settings["dataset"], settings["size"], 1, IMAGES)
    loss = generators.matching(model, images / 255, settings["decay"])
    x0 = torch.zeros(len(images), model.latent)
    return Setting((_frozen(model), loss, x0, model.start), None)


def trained_models(
    folder: Path,
    generators: list[tuple[Path, Path]],
    *,
    quick: bool,
    bar: Callable[..., Any],
) -> dict[str, Callable[[], Setting]]:
    """Each by name, made when called; ``generators``: decoders' folders, and those of images."""
    steps = 40 if quick else 170
    found: dict[str, Callable[[], Setting]] = {
        "decoder of digits": lambda: Setting(digits(folder, steps=steps, bar=bar), None),
        "attack on a classifier of digits": partial(attack, folder, steps=steps, bar=bar),
    }
    for trained, data in generators:
        results = json.loads((trained / "results.json").read_text(encoding="utf-8"))
        settings = results["configuration"]["settings"]
        name = {"mnist": "MNIST"}.get(settings["dataset"], settings["dataset"])
        found[f"decoder of {name}"] = partial(of_generator, trained, data, settings)
    return found


def _kept(model: nn.Module, path: Path, train: Callable[[], object]) -> None:
    """Trains the model, or reads its weights where an earlier run has left them."""
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
    else:
        train()
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), path)


def _frozen(model: nn.Module) -> Any:
    model.eval().requires_grad_(False)
    return model.f


def examples_module(name: str) -> Any:
    """A module of the examples, which are scripts and not a package."""
    if str(EXAMPLES) not in sys.path:
        sys.path.insert(0, str(EXAMPLES))
    __import__(name)
    return sys.modules[name]
