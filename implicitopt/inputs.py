"""What comes in, checked: every message says what was expected, what came, and what to do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from implicitopt.projections import Box, L2Ball, LinfBall, Simplex
from implicitopt.tree import Layout, Tree, leaves

__all__ = ["check_finite", "check_map", "check_option", "check_projection", "initial_state", "problem_count", "tensors"]


def check_option(name: str, value: Any, kind: type, *, least: float | None = None) -> None:
    """``value`` must be a ``kind`` (an int will do for a float), and at least ``least``."""
    numeric = (int, float) if kind is float else kind
    if not isinstance(value, numeric) or (isinstance(value, bool) and kind is not bool):
        raise TypeError(f"{name} must be a {kind.__name__}; got {value!r}")
    if least is not None and not value >= least:
        raise ValueError(f"{name} must be at least {least}; got {value!r}")


def tensors(name: str, tree: Tree) -> list[Tensor]:
    """The leaves of ``tree``: floating-point tensors of one dtype on one device."""
    found = leaves(tree)
    if not found:
        raise ValueError(f"{name} must hold at least one tensor; got {tree!r}")
    for leaf in found:
        if not isinstance(leaf, Tensor):
            raise TypeError(
                f"{name} must be a tensor or a pytree of tensors; got a leaf of type "
                f"{type(leaf).__name__}. Wrap numbers with torch.tensor(...)."
            )
        if not leaf.dtype.is_floating_point:
            raise TypeError(
                f"{name} must be floating point, since it is differentiated; got {leaf.dtype}. "
                f"Convert it with .to(torch.float32)."
            )
    first = found[0]
    for leaf in found:
        if leaf.dtype != first.dtype:
            raise TypeError(
                f"all of {name} must have one dtype; got {first.dtype} and {leaf.dtype}. "
                f"Convert with .to({first.dtype})."
            )
        if leaf.device != first.device:
            raise ValueError(
                f"all of {name} must be on one device; got {first.device} and {leaf.device}. "
                f"Move it with .to({str(first.device)!r})."
            )
    return found


def check_finite(name: str, tree: Tree) -> None:
    """No NaN or infinity in ``tree``; says where the first one is."""
    for leaf in leaves(tree):
        bad = ~torch.isfinite(leaf)
        if bool(bad.any()):
            where = tuple(bad.nonzero()[0].tolist())
            raise ValueError(
                f"{name} must be finite; got {leaf[where].item()} at index {where}. "
                f"Check the data it came from."
            )


def same_kind(name: str, tree: Tree, other_name: str, other: Tensor) -> None:
    """``tree`` must have the dtype and device of ``other``."""
    leaf = tensors(name, tree)[0]
    if leaf.dtype != other.dtype:
        raise TypeError(
            f"{name} and {other_name} must have one dtype; got {leaf.dtype} and {other.dtype}. "
            f"Convert {name} with .to({other.dtype})."
        )
    if leaf.device != other.device:
        raise ValueError(
            f"{name} and {other_name} must be on one device; got {leaf.device} and "
            f"{other.device}. Move {name} with .to({str(other.device)!r})."
        )


def shapes(tree: Tree) -> str:
    """The shapes of a pytree's leaves, for messages."""
    found = [
        tuple(leaf.shape) if isinstance(leaf, Tensor) else type(leaf).__name__
        for leaf in leaves(tree)
    ]
    return str(found[0]) if len(found) == 1 else str(found)


def detached(tree: Tree) -> Tree:
    return pytree.tree_map(lambda leaf: leaf.detach() if isinstance(leaf, Tensor) else leaf, tree)


def initial_state(f: Callable[[Tree, Tree], Tree], x0: Tree, z0: Any) -> Tree:
    """z0 as given or computed from x0; by default zeros like x0, if f maps those to themselves."""
    if callable(z0) and not isinstance(z0, Tensor):
        z0 = z0(x0)
    if z0 is not None:
        tensors("z0", z0)
        return detached(z0)
    guess = pytree.tree_map(torch.zeros_like, x0)
    try:
        with torch.no_grad():
            image = f(guess, x0)
        fits = _same_shapes(image, guess)
        found = f"f maps it to shape {shapes(image)}"
    except Exception as error:
        fits, found = False, f"f raises {type(error).__name__}: {error}"
    if not fits:
        raise ValueError(
            f"z0 was not given, and zeros shaped like x0, {shapes(x0)}, are no state of f: {found}."
            f" Pass z0, the state to start from: tensors, or a callable x0 -> z0."
        )
    return guess


def _same_shapes(a: Tree, b: Tree) -> bool:
    (a_leaves, a_spec), (b_leaves, b_spec) = pytree.tree_flatten(a), pytree.tree_flatten(b)
    return a_spec == b_spec and all(
        isinstance(p, Tensor) and p.shape == q.shape
        for p, q in zip(a_leaves, b_leaves, strict=True)
    )


def check_map(f: Callable[[Tree, Tree], Tree], z: Tree, x: Tree) -> Tree:
    """f(z, x), after checking that f maps states to states and can be differentiated."""
    with torch.enable_grad():
        z, x = (
            pytree.tree_map(lambda leaf: leaf.detach().clone().requires_grad_(), tree)
            for tree in (z, x)
        )
        inputs = leaves(z) + leaves(x)
        probes = [leaf.view_as(leaf) for leaf in inputs]
        versions = [leaf._version for leaf in probes]
        z_spec, x_spec = pytree.tree_structure(z), pytree.tree_structure(x)
        split = len(leaves(z))
        image = f(
            pytree.tree_unflatten(probes[:split], z_spec),
            pytree.tree_unflatten(probes[split:], x_spec),
        )
        if [leaf._version for leaf in probes] != versions:
            raise ValueError(
                "f must leave its arguments as they are; it changed one in place. Use the "
                "out-of-place operation (torch.relu(z), not z.relu_()), or clone first."
            )
        if not _same_shapes(image, z):
            raise ValueError(
                f"f(z, x) must return a state shaped like z: expected {shapes(z)}, got "
                f"{shapes(image)}. Make f return its next state, or pass a z0 of that shape."
            )
        for got, given in zip(leaves(image), leaves(z), strict=True):
            if got.device != given.device:
                raise ValueError(
                    f"f(z, x) must stay on the device of z, {given.device}; got {got.device}. "
                    f"Move the model with .to({str(given.device)!r})."
                )
            autocast = torch.is_autocast_enabled(given.device.type)
            if got.dtype != given.dtype and not autocast:
                raise TypeError(
                    f"f(z, x) must keep the dtype of z, {given.dtype}; got {got.dtype}. "
                    f"Convert the model or x0 and z0 to one dtype."
                )
        if not any(leaf.requires_grad for leaf in leaves(image)):
            raise ValueError(
                "f(z, x) must be differentiable in z or x; its output carries no gradient to "
                "either. Remove torch.no_grad(), .detach() or .data from f."
            )
        return detached(image)


def problem_count(loss: Callable[[Tree, Tree], Tensor], z: Tree, x: Tree) -> int | None:
    """B where the loss returns ``(B,)``; None where it returns ``()``."""
    with torch.enable_grad():
        z, x = (
            pytree.tree_map(lambda leaf: leaf.detach().clone().requires_grad_(), tree)
            for tree in (z, x)
        )
        value = loss(z, x)
    if not isinstance(value, Tensor):
        raise TypeError(
            f"loss(z, x) must return a tensor of shape () or (B,); got {type(value).__name__}."
        )
    if not value.dtype.is_floating_point:
        raise TypeError(f"loss(z, x) must be floating point; got {value.dtype}.")
    batch = leaves(x)[0].shape[0] if leaves(x)[0].dim() else None
    one_each = f" or ({batch},)" if batch is not None else ""
    if value.dim() > 1 or (value.dim() == 1 and batch is None):
        raise ValueError(
            f"loss must return one value per problem, shape (){one_each}; got "
            f"{tuple(value.shape)}. Sum or average over the other dimensions."
        )
    if value.dim() == 1:
        _check_batch(value.shape[0], {"x0": leaves(x), "z0": leaves(z)})
    first = leaves(x)[0]
    if value.device != first.device:
        raise ValueError(
            f"loss(z, x) must stay on the device of x0, {first.device}; got {value.device}. "
            f"Move what the loss reads with .to({str(first.device)!r})."
        )
    if not value.requires_grad:
        raise ValueError(
            "loss(z, x) must be differentiable in z or x; its value carries no gradient to "
            "either. Remove torch.no_grad(), .detach(), .item() or .argmax() from the loss."
        )
    return value.shape[0] if value.dim() else None


def check_projection(
    project: Callable[..., Tree] | None, x: Tree, layout: Layout
) -> Callable[[Tensor], Tensor] | None:
    """The projection on matrices, after checking that it keeps shapes and is idempotent."""
    if project is None:
        return None
    per_problem = isinstance(project, (L2Ball, LinfBall, Box, Simplex))

    def on_matrix(rows: Tensor) -> Tensor:
        tree = layout.unflatten(rows)
        image = project(tree, batched=layout.batched) if per_problem else project(tree)
        return layout.flatten(image).to(rows.dtype)

    with torch.no_grad():
        once = project(x, batched=layout.batched) if per_problem else project(x)
        if not _same_shapes(once, x):
            raise ValueError(
                f"project must return what it is given, shaped like x0, {shapes(x)}; got "
                f"{shapes(once)}."
            )
        rows = layout.flatten(once)
        again = on_matrix(rows)
        slack = torch.finfo(rows.dtype).eps ** 0.5 * (1 + rows.abs().amax()) if rows.numel() else 0
        if rows.numel() and not bool(((again - rows).abs() <= slack).all()):
            raise ValueError(
                "project must be a projection, so that project(project(x)) is project(x); it moved "
                f"a projected x0 by {(again - rows).abs().amax().item():.1e}. See implicitopt.L2Ball "
                "for an example."
            )
    return on_matrix


def _check_batch(count: int, trees: dict[str, Sequence[Tensor]]) -> None:
    for name, found in trees.items():
        for leaf in found:
            if leaf.dim() == 0 or leaf.shape[0] != count:
                raise ValueError(
                    f"loss returns {count} values, so dim 0 of every leaf of {name} must be "
                    f"{count}; got shape {tuple(leaf.shape)}. Return one value per problem from "
                    f"the loss, or () for a single problem."
                )


def one_layout(tree: Tree, batch: int | None) -> Layout:
    """The layout of ``tree`` for ``batch`` problems, or for one problem where that is None."""
    return Layout.of(tree, batched=batch is not None)
