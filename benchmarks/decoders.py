"""Trained decoders as problems: their codes for held-out images.

The digits' one is the quickstart's, trained here in a minute and kept in a folder; any that
``examples/generative.py`` trained joins by its folder.
"""

from __future__ import annotations

import io
import os
import runpy
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import matplotlib
import torch
from torch import nn

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
IMAGES = 8  # problems of each
LATENT = 20  # of the digits' codes
FACES_DECAY = 0.5  # λ, as examples/generative.py has it

__all__ = ["decoders", "digits", "of_tutorial"]


def digits(
    folder: Path, *, steps: int, bar: Callable[..., Any], count: int = IMAGES
) -> tuple[Any, ...]:
    """The quickstart's decoder: the arguments of ``solve`` for ``count`` held-out digits."""
    quickstart = examples_module("quickstart")
    torch.manual_seed(0)
    images, held_out = quickstart.digits(0)
    model, path = quickstart.Decoder(LATENT), folder / f"digits-{steps}.pt"
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
    else:
        quickstart.train(model, images, steps, 64, 1e-2, bar)
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), path)
    return _frozen(model), model.loss(held_out[:count]), torch.zeros(count, LATENT), model.start


def of_tutorial() -> tuple[Any, ...]:
    """The first tutorial's decoder, trained as its page is run: the same for its 64 digits."""
    matplotlib.use("agg")
    with mock.patch.dict(os.environ), redirect_stdout(io.StringIO()):
        os.environ.pop("IMPLICITOPT_DATA", None)  # it takes scikit-learn's digits then
        page = runpy.run_path(str(EXAMPLES / "tutorials" / "1_invert_a_generator.py"))
    held_out = page["held_out"]
    x0 = torch.zeros(len(held_out), page["latent"])
    return page["f"], page["matching"](held_out), x0, page["start"]


def trained(folder: Path, images: torch.Tensor) -> tuple[Any, ...]:
    """The decoder in a folder of ``examples/generative.py``, for images ``(N, C, H, W)``."""
    generators = examples_module("generators")
    _, model = examples_module("generators.architecture").load(folder, "decoder-jiio")
    loss = generators.matching(model, images, FACES_DECAY)
    return _frozen(model), loss, torch.zeros(len(images), model.latent), model.start


def decoders(
    folder: Path,
    generator: Path | None,
    faces: Path | None,
    *,
    quick: bool,
    bar: Callable[..., Any],
) -> dict[str, Callable[[], tuple[Any, ...]]]:
    """Each decoder by name, made when called."""
    found = {"decoder of digits": partial(digits, folder, steps=40 if quick else 170, bar=bar)}
    if generator is not None and faces is not None:
        images = examples_module("data").faces(faces, False, 64, IMAGES, quiet=True).pixels / 255
        found["decoder of faces"] = partial(trained, generator, images)
    return found


def _frozen(model: nn.Module) -> Any:
    model.eval().requires_grad_(False)
    return model.f


def examples_module(name: str) -> Any:
    """A module of the examples, which are scripts and not a package."""
    if str(EXAMPLES) not in sys.path:
        sys.path.insert(0, str(EXAMPLES))
    __import__(name)
    return sys.modules[name]
