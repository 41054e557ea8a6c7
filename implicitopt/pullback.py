"""A function's value with its transposed Jacobian, as ``torch.func.vjp`` gives them.

``torch.func.vjp`` wraps every operation, which takes a tenth of the time of a sweep of an MDEQ
decoder and a third of one of a small map, and runs compiled functions uncompiled. It refuses
functions that change what they capture, though. So a solve begins with it and goes on without.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["Pull", "guarded_pullback", "pullback"]


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

    An ``autograd.Function`` of the old style, which it cannot transform, goes without this.
    """
    try:
        with _uncompiled():
            image, pull = torch.func.vjp(function, *inputs)[:2]
    except RuntimeError as error:
        if "setup_context" not in str(error):
            raise
        return pullback(function, *inputs)
    return image, pull


def _uncompiled() -> AbstractContextManager[object]:
    """Run compiled functions as they were, as they do inside of ``torch.func``'s transforms.

    A compiler that meets one of its functions in there would leave it uncompiled for good.
    """
    stance = getattr(torch.compiler, "set_stance", None)  # from torch 2.6 on
    if stance is None or "torch._dynamo" not in sys.modules:  # nothing is compiled; it loads slowly
        return nullcontext()
    return stance("force_eager")  # type: ignore[no-any-return]
