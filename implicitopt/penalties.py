"""Penalties that keep an equilibrium model contractive."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from implicitopt.inputs import (
    call_unchanged,
    check_batch,
    check_image,
    out_of_inference,
    refuse_transforms,
    tensors,
)
from implicitopt.options import check_callable, check_option
from implicitopt.tree import Layout, Tree

__all__ = ["jacobian_penalty"]


def jacobian_penalty(
    f: Callable[[Tree, Tree], Tree], z: Tree, x: Tree, probes: int = 1, *, batched: bool = True
) -> Tensor:
    """Hutchinson's estimate of ‖∂f/∂z‖²_F, per problem; differentiable.

        ‖∂f/∂z‖²_F = E ‖(∂f/∂z)ᵀ ε‖²,   ε ~ N(0, I)

    Args:
        f: the fixed-point map.
        z, x: where to evaluate it, for example ``sol.iterate`` of ``solve(...,
            sample_iterate=True)``, which is where the paper does.
        probes: random vectors to average over.
        batched: dim 0 of every leaf of z is a batch; False: one problem.

    Returns:
        ``(B,)``, or ``()`` with ``batched=False``; divide by the size of a state for a number
        that does not depend on it.

    Raises:
        TypeError, ValueError: an argument, or what f returns, is not as above.

    Source: JIIO eq. 27; Bai, Koltun, Kolter, "Stabilizing equilibrium models by Jacobian
    regularization", ICML 2021.

    >>> import torch, implicitopt
    >>> _ = torch.manual_seed(0)
    >>> z = torch.zeros(2, 3, dtype=torch.float64)
    >>> penalty = implicitopt.jacobian_penalty(lambda z, x: 0.5 * z + x, z, z, probes=4000)
    >>> bool((penalty - 3 * 0.25).abs().max() < 0.05)
    True
    """
    refuse_transforms("jacobian_penalty")
    check_callable("f", f, "f(z, x)")
    check_option("probes", probes, int, least=1)
    check_option("batched", batched, bool)
    tensors("z", z)
    check_batch("z", z, batched)
    z, x = out_of_inference(z), out_of_inference(x)
    with torch.enable_grad():
        z = pytree.tree_map(
            lambda leaf: leaf if leaf.requires_grad else leaf.detach().requires_grad_(), z
        )
        layout = Layout.of(z, batched=batched)
        image = call_unchanged(f, z, x)
        check_image(image, z)
        image = layout.flatten(image)
        total = image.new_zeros(image.shape[0])
        for _ in range(probes):
            pulled = torch.autograd.grad(
                image, pytree.tree_leaves(z), torch.randn_like(image), create_graph=True,
                materialize_grads=True,
            )  # fmt: skip
            total = total + sum((part.reshape(len(total), -1) ** 2).sum(dim=1) for part in pulled)
    return (total if batched else total[0]) / probes
