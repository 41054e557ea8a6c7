"""MNIST, from its gzipped idx files."""

from __future__ import annotations

import gzip
import math
import struct
from pathlib import Path

import torch
from torch import Tensor

from data.images import Images
from data.sources import Source, damaged, decoding, locate

URL = "https://ossci-datasets.s3.amazonaws.com/mnist/"
MD5 = {
    "train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
    "t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
    "t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
}


def mnist(folder: str | Path | None, train: bool, *, quiet: bool = False) -> Images:
    """Handwritten digits: 60,000 to train with or 10,000 to test with, ``(N, 1, 28, 28)``.

    Source: LeCun, Cortes, Burges, http://yann.lecun.com/exdb/mnist/.

    Raises:
        FileNotFoundError: ``folder`` does not hold the files.
        OSError: they cannot be downloaded.
        ValueError: one of them is damaged.
    """
    part = "train" if train else "t10k"
    pixels = _idx(f"{part}-images-idx3-ubyte.gz", (28, 28), folder, quiet=quiet)
    labels = _idx(f"{part}-labels-idx1-ubyte.gz", (), folder, quiet=quiet).long()
    if len(pixels) != len(labels) or labels.max() > 9:
        raise ValueError(
            f"The MNIST files {part}-* do not belong together. Expected as many labels as images, "
            f"from 0 to 9; found {len(pixels)} images and {len(labels)} labels up to "
            f"{labels.max()}. Get both from {URL}, or leave --data out to have them downloaded."
        )
    return Images(pixels[:, None], labels, tuple("0123456789"))


def _idx(name: str, item: tuple[int, ...], folder: str | Path | None, *, quiet: bool) -> Tensor:
    """An idx file of items of one shape: a magic number, the shape, then the bytes."""
    source = Source("mnist", name, URL + name, MD5[name])
    path = locate(source, folder, quiet=quiet)
    with decoding(path, "a whole gzip file", source.remedy), gzip.open(path) as file:
        data = file.read()
    # 8: the values are unsigned bytes. Then how many dimensions there are.
    magic, start = 0x800 + 1 + len(item), 8 + 4 * len(item)
    if len(data) < start or struct.unpack_from(">I", data)[0] != magic:
        expected = f"an idx header that starts with {magic:08x}"
        raise damaged(path, expected, data[:4].hex() or "nothing", source.remedy)
    count, *shape = struct.unpack_from(f">{1 + len(item)}I", data, 4)
    if tuple(shape) != item or count == 0:
        raise damaged(path, f"items of shape {item}", f"{count} of {tuple(shape)}", source.remedy)
    if len(data) - start != count * math.prod(item):
        expected = f"{count * math.prod(item)} bytes after the header, for {count} items"
        raise damaged(path, expected, f"{len(data) - start} bytes", source.remedy)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8, offset=start).reshape(count, *item)
