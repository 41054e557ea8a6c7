"""CIFAR-10, from its Python archive or the folder that it unpacks to."""

from __future__ import annotations

import gzip
import tarfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.images import Images
from data.sources import Source, damaged, decoding, locate
from data.unpickling import Array, unpickle

SOURCE = Source(
    "cifar10",
    "cifar-10-python.tar.gz",
    "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz",
    "c58f30108f718f92721af3b95e74349a",
)
INSIDE = "cifar-10-batches-py"
TRAIN = tuple(f"data_batch_{number}" for number in range(1, 6))
CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
LARGEST = 64 * 2**20  # bytes; an official batch has half as many


def cifar10(folder: str | Path | None, train: bool, *, quiet: bool = False) -> Images:
    """Photographs of ten things: 50,000 to train with or 10,000 to test with, ``(N, 3, 32, 32)``.

    Source: Krizhevsky, Learning multiple layers of features from tiny images, 2009.

    Raises:
        FileNotFoundError: ``folder`` does not hold the archive or its files.
        OSError: the archive cannot be downloaded.
        ValueError: a file is damaged, or asks for code that a batch does not need.
    """
    names = TRAIN if train else ("test_batch",)
    unpacked = (f"{INSIDE}/{names[0]}", names[0])
    path = locate(SOURCE, folder, unpacked=unpacked, quiet=quiet)
    read = _archive if path.name == SOURCE.name else _folder
    parts = [_batch(path.with_name(name), raw) for name, raw in read(path, names).items()]
    pixels, labels = (torch.cat(part) for part in zip(*parts, strict=True))
    return Images(pixels, labels, CLASSES)


def _folder(first: Path, names: tuple[str, ...]) -> dict[str, bytes]:
    missing = [name for name in names if not first.with_name(name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{first.parent} holds {first.name} but not {', '.join(missing)}. {SOURCE.remedy}"
        )
    return {name: first.with_name(name).read_bytes() for name in names}


def _archive(path: Path, names: tuple[str, ...]) -> dict[str, bytes]:
    """The batches, read in memory: an archive's own paths never reach the disk."""
    found = {}
    with (
        decoding(path, "a whole tar.gz archive", SOURCE.remedy),
        gzip.open(path) as unzipped,
        tarfile.open(fileobj=unzipped, mode="r:") as archive,
    ):
        # One pass in the archive's order: to go back in a gzip file is to start over.
        for member in archive:
            folder, _, name = member.name.rpartition("/")
            if folder == INSIDE and name in names and member.isreg() and member.size <= LARGEST:
                found[name] = archive.extractfile(member).read()
        # The archive ends before the file does, whose last bytes are a checksum of it all.
        while unzipped.read(2**20):
            pass
    missing = [name for name in names if name not in found]
    if missing:
        expected = f"the batches {', '.join(f'{INSIDE}/{name}' for name in names)}"
        raise damaged(path, expected, f"none of the names {', '.join(missing)}", SOURCE.remedy)
    return {name: found[name] for name in names}


def _batch(name: Path, raw: bytes) -> tuple[Tensor, Tensor]:
    with decoding(name, "a pickled CIFAR-10 batch", SOURCE.remedy):
        batch = unpickle(raw)
    pixels, labels = _pixels(batch), _labels(batch)
    if pixels is None or labels is None or len(pixels) != len(labels):
        expected = "'data' of shape (N, 3072), uint8, with N > 0, and 'labels', N integers below 10"
        raise damaged(name, expected, "something else", SOURCE.remedy)
    return torch.from_numpy(pixels).reshape(-1, 3, 32, 32), torch.tensor(labels)


def _pixels(batch: object) -> np.ndarray | None:
    array = batch.get(b"data") if isinstance(batch, dict) else None
    values = array.uint8() if isinstance(array, Array) else None
    return values if values is not None and values.shape[1:] == (3072,) and len(values) else None


def _labels(batch: object) -> list[int] | None:
    labels = batch.get(b"labels") if isinstance(batch, dict) else None
    whole = isinstance(labels, list) and all(type(label) is int for label in labels)
    return labels if whole and all(0 <= label < 10 for label in labels) else None
