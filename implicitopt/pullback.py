"""A function's value with its transposed Jacobian, as ``torch.func.vjp`` gives them.

``torch.func.vjp`` wraps every operation, which takes a tenth of the time of a sweep of an MDEQ
decoder and two fifths of one of a small map, and runs compiled functions uncompiled. It refuses
functions that change what they capture, though. So a solve begins with it and goes on without: a
function that begins to change things later is not found out.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Protocol

import torch
from torch import Tensor, nn

__all__ = ["Pull", "guarded_pullback", "pullback"]


#: What torch.func says of a function that changes what it captures, and what to say besides.
CHANGES = "mutate a captured Tensor"
REMEDY = (
    "f or the loss changes a tensor of its own, as batch norm does in training mode. Call .eval() "
    "on the model, or use group norm."
)


class Pull(Protocol):
    """c ↦ Jᵀ c: a tensor for each input; once, or with ``retain_graph`` as often as asked."""

    def __call__(self, cotangent: Tensor, retain_graph: bool) -> tuple[Tensor, ...]: ...


def pullback(function: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, Pull]:
    """function(*inputs), and the product of its transposed Jacobian with a cotangent.

    Nothing that the function captures gets a gradient.
    """
    with torch.enable_grad():
        leaves = [block.detach().requires_grad_() for block in inputs]
        image = function(*leaves)

    def pull(cotangent: Tensor, retain_graph: bool) -> tuple[Tensor, ...]:
        if not image.requires_grad:  # a constant
            return tuple(torch.zeros_like(leaf) for leaf in leaves)
        return torch.autograd.grad(
            image, leaves, cotangent, retain_graph=retain_graph, materialize_grads=True
        )

    return image.detach(), pull


def guarded_pullback(function: Callable[..., Tensor], *inputs: Tensor) -> tuple[Tensor, Pull]:
    """``pullback``, by ``torch.func.vjp``: in-place changes of captured tensors are an error.

    It cannot transform an ``autograd.Function`` of the old style. Of a function that calls one only
    the buffers of modules are watched, as batch norm changes them.
    """
    try:
        with _uncompiled():
            image, pull = torch.func.vjp(function, *inputs)[:2]
    except RuntimeError as error:
        if CHANGES in str(error) and hasattr(error, "add_note"):  # from Python 3.11 on
            error.add_note(REMEDY)
        if "setup_context" not in str(error):
            raise
        with _unchanged_buffers():
            return pullback(function, *inputs)
    return image, pull


@contextmanager
def _unchanged_buffers() -> Iterator[None]:
    """Raise if a module that is called meanwhile changes a buffer of its own."""
    seen: list[tuple[nn.Module, Tensor, int]] = []

    def note(module: nn.Module, inputs: object) -> None:
        seen.extend((module, b, b._version) for b in module.buffers(recurse=False))

    with nn.modules.module.register_module_forward_pre_hook(note):
        yield
    for module, buffer, version in seen:
        if buffer._version != version:
            raise RuntimeError(
                f"f and the loss must not {CHANGES}; a {type(module).__name__} changed one of its "
                f"buffers. {REMEDY}"
            )


#: How many are in ``_uncompiled`` now, of all threads, and what they undo at last.
_inside, _undo, _lock = 0, ExitStack(), threading.Lock()


@contextmanager
def _uncompiled() -> Iterator[None]:
    """Run compiled functions as they were, as they do inside of ``torch.func``'s transforms.

    A compiler that meets one of its functions in there would leave it uncompiled for good.
    """
    global _inside
    stance = getattr(torch.compiler, "set_stance", None)  # from torch 2.6 on; of all threads
    # Where nothing has been compiled its module, which loads slowly, is not there yet.
    if stance is None or "torch._dynamo" not in sys.modules:
        yield
        return
    with _lock:
        if _inside == 0:
            with suppress(RuntimeError):  # refused where the caller of all this is compiled
                _undo.enter_context(stance("force_eager"))
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                _undo.close()
