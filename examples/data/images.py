"""Labelled images as tensors, and how a folder of pictures becomes them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from data.sources import damaged, decoding

# The formats that collections of photographs come in. Pillow knows more, and some of those run
# other programs or have large decoders, which a stranger's file should not reach.
FORMATS = {".bmp": "BMP", ".jpeg": "JPEG", ".jpg": "JPEG", ".png": "PNG", ".webp": "WEBP"}
REMEDY = "Remove it from the folder, or replace it."


@dataclass(frozen=True, eq=False)
class Images:
    """Images on the CPU.

    Attributes:
        pixels: ``(N, C, H, W)``, uint8.
        labels: ``(N,)``, int64, each the place of the image's class in ``classes``; or None.
        classes: the names of the classes; empty if there are no labels.
    """

    pixels: Tensor
    labels: Tensor | None = None
    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.pixels)


def image_folder(
    folder: str | Path, size: int, limit: int | None = None, *, quiet: bool = False
) -> Images:
    """The first ``limit`` pictures below ``folder``, in the order of their paths: RGB, unlabelled.

    The middle square of each is resized to ``size`` × ``size``, antialiased. Hidden files and files
    that are not named as pictures are left out.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: it holds no picture, or one that cannot be read.
    """
    return read_images(image_paths(folder), size, limit, quiet=quiet)


def image_paths(folder: str | Path) -> list[Path]:
    """The pictures below a folder, sorted; at least one."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} is not a folder. Expected one that holds pictures ({', '.join(FORMATS)})."
        )
    files = sorted(path for path in folder.rglob("[!.]*") if path.is_file())
    pictures = [path for path in files if path.suffix.lower() in FORMATS]
    if not pictures:
        found = f"{len(files)} other files, such as {files[0].name}" if files else "no file"
        raise damaged(folder, f"pictures ({', '.join(FORMATS)})", found, "Put pictures there.")
    return pictures


def read_images(paths: list[Path], size: int, limit: int | None, *, quiet: bool) -> Images:
    """The first ``limit`` of the given pictures, as `image_folder` reads them."""
    if size < 1 or (limit is not None and limit < 1):
        raise ValueError(f"size and limit must be positive; got {size} and {limit}.")
    paths = paths[:limit]
    pixels = torch.empty(len(paths), 3, size, size, dtype=torch.uint8)
    for into, path in zip(pixels, tqdm(paths, "images", disable=quiet, leave=False), strict=True):
        into[:] = torch.from_numpy(_square(path, size)).permute(2, 0, 1)
    return Images(pixels)


def _square(path: Path, size: int) -> np.ndarray:
    with (
        decoding(path, "a picture", REMEDY),
        Image.open(path, formats=sorted(set(FORMATS.values()))) as picture,
    ):
        # Cameras store which way is up beside the pixels.
        upright = ImageOps.exif_transpose(picture).convert("RGB")
        return np.array(ImageOps.fit(upright, (size, size), Image.Resampling.LANCZOS))
