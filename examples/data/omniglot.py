"""Omniglot, from its zip archives."""

from __future__ import annotations

import io
import re
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from data.characters import DRAWERS, Characters, Split, check_options
from data.sources import Source, damaged, decoding, locate

URL = "https://raw.githubusercontent.com/brendenlake/omniglot/master/python/"
MD5 = {
    "background": "68d2efa1b9178cc56df9314c21c6e718",
    "evaluation": "6b91aef0f799c5bb55b94e3f2daec811",
}
SIDE = 105  # of the published drawings
LARGEST = 2**16  # bytes; a published drawing has some hundred


def omniglot(
    folder: str | Path | None,
    split: Split,
    size: int = 28,
    limit: int | None = None,
    *,
    quiet: bool = False,
) -> Characters:
    """The first ``limit`` characters of real and invented alphabets, each drawn by 20 people.

    ``background`` has 964 of 30 alphabets; ``evaluation`` has 659 of 20 others. The drawings are
    resized to ``size`` × ``size``, antialiased.

    Source: Lake, Salakhutdinov, Tenenbaum, Human-level concept learning through probabilistic
    program induction, Science 2015.

    Raises:
        FileNotFoundError: ``folder`` does not hold the archive.
        OSError: it cannot be downloaded.
        ValueError: it is damaged, or there is no such split.
    """
    check_options(split, size)
    name = f"images_{split}.zip"
    source = Source("omniglot", name, URL + name, MD5[split])
    path = locate(source, folder, quiet=quiet)
    with decoding(path, "a whole zip archive", source.remedy):
        archive = zipfile.ZipFile(path)
    with archive:
        names = _members(path, archive, split, source.remedy)
        names = names if limit is None else names[: limit * DRAWERS]
        pixels = torch.empty(len(names), size, size)
        bar = tqdm(names, "omniglot", disable=quiet, leave=False)
        for into, name in zip(pixels, bar, strict=True):
            into[:] = torch.from_numpy(_drawing(archive, name, size, source.remedy))
    characters = [name.split("/")[1:3] for name in names[::DRAWERS]]
    return Characters(
        pixels.view(-1, DRAWERS, 1, size, size), tuple("/".join(name) for name in characters)
    )


def _members(path: Path, archive: zipfile.ZipFile, split: str, remedy: str) -> list[str]:
    """The drawings' names in order, 20 to a character."""
    pattern = re.compile(rf"(images_{split}/[^/]+/character\d+)/\d+_\d+\.png")
    matches = [pattern.fullmatch(name) for name in sorted(set(archive.namelist()))]
    names = [match for match in matches if match]
    counts: dict[str, int] = {}
    for match in names:
        counts[match[1]] = counts.get(match[1], 0) + 1
    if not counts:
        expected = f"drawings named as images_{split}/Greek/character01/0001_01.png"
        raise damaged(path, expected, f"{len(matches)} files and none of those", remedy)
    for character, count in counts.items():
        if count != DRAWERS:
            found = f"{count} of {character}"
            raise damaged(path, f"{DRAWERS} drawings of each character", found, remedy)
    return [match[0] for match in names]


def _drawing(archive: zipfile.ZipFile, name: str, size: int, remedy: str) -> np.ndarray:
    """One drawing: black ink on white paper in the archive, 1 on 0 here."""
    where = f"{archive.filename}: {name}"
    with decoding(where, "a drawing in PNG", remedy):
        with archive.open(name) as file:
            data = file.read(LARGEST)  # to the end, where its checksum is compared
        with Image.open(io.BytesIO(data), formats=["PNG"]) as drawing:
            sides = drawing.size  # known before anything is unpacked
            if sides == (SIDE, SIDE):
                small = drawing.convert("L").resize((size, size), Image.Resampling.LANCZOS)
                return 1 - np.asarray(small, dtype=np.float32) / 255
    raise damaged(where, f"{SIDE}×{SIDE} pixels", f"{sides[0]}×{sides[1]}", remedy)
