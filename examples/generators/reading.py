"""The images of a run: so many to train with, so many to test with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from data import cifar10, faces, mnist
from experiment import Run


def read_images(
    run: Run[Any], dataset: str, size: int, images: int | None, held_out: int
) -> tuple[Tensor, Tensor]:
    """So many images to train with and held-out ones, ``(N, C, H, W)``, uint8."""
    found = []
    for train, limit in ((True, images), (False, held_out)):
        if dataset == "faces":
            found.append(faces(run.data, train, size, limit, quiet=run.quiet).pixels)
        else:
            reader = {"mnist": mnist, "cifar10": cifar10}[dataset]
            pixels = reader(run.data, train, quiet=run.quiet).pixels[:limit]
            found.append(resized(pixels, size))
    return found[0], found[1]


def resized(images: Tensor, size: int) -> Tensor:
    """Images of another size, ``(N, C, H, W)``, uint8."""
    if images.shape[-1] == size:
        return images
    floats = interpolate(images.float(), size=(size, size), mode="bilinear", antialias=True)
    return floats.round().clamp(0, 255).to(torch.uint8)
