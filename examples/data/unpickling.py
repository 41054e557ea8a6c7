"""Pickled dicts of byte arrays, read without running anything that the file names.

A pickle can call any function there is. CIFAR-10's batches need numpy's array reconstruction and
nothing else, and here even that is replaced by stand-ins that only keep what they are given.
"""

from __future__ import annotations

import io
import pickle
from typing import Any

import numpy as np


class StandIn:
    """Keeps the state it is given.

    That it takes one matters: pickle sets the attributes of whatever does not, functions included.
    """

    state: Any = ()

    def __setstate__(self, state: Any) -> None:
        self.state = state


class Type(StandIn):
    """Stands for ``numpy.dtype``."""

    def __init__(self, code: Any, align: Any = False, copy: Any = False) -> None:
        # Python 2, which wrote the official files, has bytes here.
        self.is_byte = code in ("u1", b"u1")


class Array(StandIn):
    """Stands for ``numpy.ndarray``, which is made empty and then given its state."""

    def __init__(self, subtype: Any, shape: Any, typecode: Any) -> None:
        pass

    def uint8(self) -> np.ndarray | None:
        """The array, if it is one of unsigned bytes and as long as it says."""
        try:
            _, shape, dtype, column_major, raw = self.state
            if not (dtype.is_byte and isinstance(raw, bytes)):
                return None
            order = "F" if column_major else "C"
            return np.frombuffer(raw, np.uint8).reshape(shape, order=order).copy()
        except (AttributeError, TypeError, ValueError):
            return None


class Encoded(StandIn):
    """Stands for ``_codecs.encode``, which Python 3 writes for bytes in the older protocols."""

    def __new__(cls, text: Any, encoding: Any) -> Any:
        if encoding != "latin1" or not isinstance(text, str):
            raise pickle.UnpicklingError("it encodes something that is not latin1 text")
        return text.encode("latin1")


ALLOWED = {
    ("_codecs", "encode"): Encoded,
    ("numpy", "dtype"): Type,
    ("numpy", "ndarray"): Array,
    ("numpy.core.multiarray", "_reconstruct"): Array,
    ("numpy._core.multiarray", "_reconstruct"): Array,  # the name since numpy 2
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(
                f"it asks for {module}.{name}, which such a file does not need; nothing was run"
            )
        return ALLOWED[module, name]


def unpickle(raw: bytes) -> Any:
    """What the pickle holds, its arrays as `Array` and Python 2's strings as bytes."""
    return _Unpickler(io.BytesIO(raw), encoding="bytes").load()
