"""A map whose forward and backward passes are replayed as CUDA graphs.

``torch.cuda.make_graphed_callables`` does the same for modules, by an autograd.Function of the old
style, which ``torch.func`` refuses and ``solve`` does not check for side effects; this one is of
the new style, and takes a pytree.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

__all__ = ["Graphed"]


class Graphed:
    """f(z, x) for inputs of one shape: z a tensor or a pytree, x a tensor.

    On the CPU, where there are no graphs, the passes are run instead of replayed. The parameters of
    f get no gradient; one backward pass may follow each forward pass, and no second derivative.
    """

    def __init__(self, f: Callable[[Any, Tensor], Any], z: Any, x: Tensor) -> None:
        leaves, self.spec = pytree.tree_flatten(z)
        self.f = f
        self.inputs = [t.detach().clone().requires_grad_() for t in (*leaves, x)]
        self.cotangents = [torch.zeros_like(leaf) for leaf in leaves]
        self.image: list[Tensor] = []
        self.pulled: tuple[Tensor, ...] = ()
        self.replay_forward, self.replay_backward = self._forward, self._backward
        if x.is_cuda:
            self._capture()

    def __call__(self, z: Any, x: Tensor) -> Any:
        found = _Replayed.apply(self, *pytree.tree_leaves(z), x)
        return pytree.tree_unflatten(list(found), self.spec)

    def _forward(self) -> None:
        with torch.enable_grad():
            *leaves, x = self.inputs
            image = self.f(pytree.tree_unflatten(list(leaves), self.spec), x)
        self.image = pytree.tree_leaves(image)

    def _backward(self) -> None:
        self.pulled = torch.autograd.grad(
            self.image, self.inputs, self.cotangents, retain_graph=True, materialize_grads=True
        )

    def _capture(self) -> None:
        # What is chosen or made at first use (algorithms, work spaces) must not be in the graph.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._forward()
                self._backward()
        torch.cuda.current_stream().wait_stream(side)
        pool = torch.cuda.graph_pool_handle()
        forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(forward, pool=pool):
            self._forward()
        with torch.cuda.graph(backward, pool=pool):
            self._backward()
        self.replay_forward, self.replay_backward = forward.replay, backward.replay


class _Replayed(torch.autograd.Function):
    """(graphed, *leaves of z, x) -> leaves of f(z, x)."""

    @staticmethod
    def forward(graphed: Graphed, *inputs: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            for static, given in zip(graphed.inputs, inputs, strict=True):
                static.copy_(given)
            graphed.replay_forward()
            return tuple(leaf.detach().clone() for leaf in graphed.image)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.graphed = inputs[0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        graphed = ctx.graphed
        for static, given in zip(graphed.cotangents, cotangents, strict=True):
            static.copy_(given)
        graphed.replay_backward()
        return None, *(grad.clone() for grad in graphed.pulled)
