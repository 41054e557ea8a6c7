"""The plain equilibrium z = f(z, x), with its implicit gradient."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from implicitopt.accelerators.anderson import Anderson
from implicitopt.accelerators.protocol import Accelerator, accelerate, check_accelerator
from implicitopt.adjoint.implicit import LinearOptions, attach_root
from implicitopt.autocast import autocast_as_now, autocast_off
from implicitopt.inputs import (
    call_unchanged,
    check_batch,
    check_finite,
    check_map,
    detached,
    initial_state,
    out_of_inference,
    refuse_transforms,
    same_kind,
    tensors,
    without_gradient,
)
from implicitopt.kkt import at_hand, choose, norm
from implicitopt.options import check_callable, check_option
from implicitopt.solution import AdjointReport
from implicitopt.tree import Layout, Tree

__all__ = ["ConvergenceWarning", "fixed_point", "picard_to_rest"]

#: Steps between looks at whether all problems are done, where a look waits for the device.
CHECK_EVERY = 5
#: What helps where the backward pass fails.
REMEDY = "Raise adjoint_max_steps, or loosen adjoint_tol."


class ConvergenceWarning(UserWarning):
    """A fixed point was not reached to its tolerance.

    >>> import torch, implicitopt, warnings
    >>> with warnings.catch_warnings():
    ...     warnings.simplefilter("error", implicitopt.ConvergenceWarning)
    ...     implicitopt.fixed_point(lambda z, x: 0.9 * z + x, torch.ones(1, 1), max_steps=1)
    Traceback (most recent call last):
        ...
    implicitopt.fixed_point.ConvergenceWarning: 1 of 1 fixed points did not reach ...
    """


def picard_to_rest(
    map_: Callable[[Tensor], Tensor],
    v: Tensor,
    accelerator: Accelerator,
    *,
    max_steps: int,
    tol: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Accelerated iteration v ← map_(v); the best iterate, its residual and the steps, ``(B,)``.

    The residual is ‖map_(v) − v‖ / (1 + ‖v‖) per problem; a problem that reaches ``tol`` stays.
    """
    state = accelerator.init(v)
    best = v
    lowest = torch.full_like(norm(v), float("inf"))
    steps = torch.zeros_like(lowest, dtype=torch.int64)
    active = torch.ones_like(lowest, dtype=torch.bool)
    every = 1 if at_hand(active) else CHECK_EVERY
    for step in range(max_steps):
        image = map_(v)
        r = image - v
        residual = norm(r) / (1 + norm(v))
        better = active & (residual < lowest)  # False for NaN
        best, lowest = choose(better, (v, residual), (best, lowest))
        steps = steps + active
        active = active & (lowest > tol) & (residual < math.inf)
        last = step + 1 == max_steps
        if last or ((step + 1) % every == 0 and not bool(active.any())):
            break
        moved, state = accelerate(accelerator, state, v, r, image)
        v = choose(active, moved, v)
    return best, lowest, steps


def fixed_point(
    f: Callable[[Tree, Tree], Tree],
    x: Tree,
    z0: Any = None,
    *,
    accelerator: Accelerator | None = None,
    max_steps: int = 100,
    tol: float | None = None,
    adjoint_tol: float | None = None,
    adjoint_max_steps: int = 200,
    batched: bool | None = None,
) -> Tree:
    """The state z with z = f(z, x), differentiable in x and in everything f closes over.

    The gradient is that of the implicit function theorem, dz = (I − ∂f/∂z)⁻¹ (∂f/∂θ) dθ, whatever
    the forward iteration did. Second derivatives are right too; third ones raise.

    Args:
        f: the fixed-point map, ``f(z, x) -> z``, on tensors or pytrees of tensors.
        x: its input.
        z0: the state to start from, tensors or a callable ``x -> z0``; None: zeros shaped like
            ``x`` if f maps those to their own shape.
        accelerator: ``Anderson(...)`` (default: type II), ``Broyden(...)``, ``Picard(...)`` or
            your own.
        max_steps: evaluations of f at most.
        tol: bound on ‖f(z, x) − z‖ / (1 + ‖z‖), per problem. Default 1e-6 in float64, 1e-4 in
            float32, 1e-2 in half precision.
        adjoint_tol, adjoint_max_steps: of the linear solve in the backward pass.
        batched: whether dim 0 of every leaf of z is a batch of independent problems, or all of it
            is one problem. None: one problem where no leaf has more than one dimension.

    Returns:
        z, shaped like z0: per problem the iterate with the smallest residual.

    Raises:
        TypeError, ValueError: an argument is not as above.

    Warns:
        ConvergenceWarning: a problem did not reach ``tol``.
        AdjointWarning: in the backward pass, a linear system was not solved to its tolerance.

    Source: Bai, Kolter, Koltun, "Deep equilibrium models", NeurIPS 2019.

    >>> import torch, implicitopt
    >>> x = torch.ones(1, 1, requires_grad=True)
    >>> z = implicitopt.fixed_point(lambda z, x: 0.5 * z + x, x)  # z = 2x
    >>> z.sum().backward()
    >>> round(z.item(), 3), round(x.grad.item(), 3)
    (2.0, 2.0)
    """
    from implicitopt.solve import default_tol

    refuse_transforms("fixed_point")
    check_callable("f", f, "f(z, x)")
    accelerator = Anderson("II") if accelerator is None else accelerator
    check_accelerator("accelerator", accelerator)
    check_option("max_steps", max_steps, int, least=1)
    if batched is not None:
        check_option("batched", batched, bool)
    if tol is not None:
        check_option("tol", tol, float, least=0)
    options = LinearOptions(adjoint_tol, adjoint_max_steps)
    first = tensors("x", x)[0]
    check_finite("x", x)
    x = out_of_inference(x)
    constant = detached(x)
    z0 = initial_state(f, constant, z0)
    same_kind("z0", z0, "x", first)
    check_finite("z0", z0)
    if batched is None:
        batched = any(leaf.dim() > 1 for leaf in tensors("z0", z0))
    check_batch("z0", z0, batched)
    layout = Layout.of(z0, batched=batched)
    start = layout.flatten(check_map(f, z0, constant)).to(first.dtype)
    tol = default_tol(first.dtype) if tol is None else float(tol)
    autocast = autocast_as_now(first.device)

    def image(z: Tensor, at: Tree) -> Tensor:
        return layout.flatten(call_unchanged(f, layout.unflatten(z), at), "f(z, x)").to(z.dtype)

    def constant_image(z: Tensor) -> Tensor:
        with autocast():
            return image(z, constant)

    with without_gradient(), autocast_off(first.device):
        z, residual, _ = picard_to_rest(
            constant_image, start, accelerator, max_steps=max_steps, tol=tol
        )
    if not bool((residual <= tol).all()):
        warnings.warn(
            f"{int((~(residual <= tol)).sum())} of {len(residual)} fixed points did not reach the "
            f"relative residual tol={tol:g} in {max_steps} steps (worst {residual.max().item():.1e}"
            "). Raise max_steps, loosen tol, or make f more contractive (jacobian_penalty).",
            ConvergenceWarning,
            stacklevel=2,
        )
    if torch.is_grad_enabled():
        z = attach_root(
            lambda z: image(z, x) - z, z, options, AdjointReport(), symmetric=False, remedy=REMEDY
        )
    return layout.unflatten(z)
