"""What comes in, checked: every message says what was expected, what came, and what to do."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from implicitopt.projections import DTYPES, Box, L2Ball, LinfBall, Simplex
from implicitopt.tree import Layout, Tree, leaves

__all__ = [
    "call_unchanged",
    "check_batch",
    "check_finite",
    "check_image",
    "check_map",
    "check_projection",
    "check_warm_start",
    "detached",
    "initial_state",
    "one_layout",
    "out_of_inference",
    "problem_count",
    "refuse_transforms",
    "same_kind",
    "shapes",
    "tensors",
    "warn_of_gradient",
    "without_gradient",
]


def tensors(name: str, tree: Tree) -> list[Tensor]:
    """The leaves of ``tree``: floating-point tensors of one dtype on one device, not all empty."""
    found = leaves(tree)
    if not found:
        raise ValueError(
            f"{name} must hold at least one tensor; got {tree!r}. Pass a tensor, or a pytree of "
            f"tensors."
        )
    for leaf in found:
        if not isinstance(leaf, Tensor):
            raise TypeError(
                f"{name} must be a tensor or a pytree of tensors; got a leaf of type "
                f"{type(leaf).__name__}. Wrap numbers and arrays with torch.as_tensor(...); let f "
                f"and loss close over anything else."
            )
        if leaf.dtype not in DTYPES:
            raise TypeError(
                f"{name} must be floating point (float64, float32, bfloat16 or float16), since it "
                f"is differentiated; got {leaf.dtype}. Convert it with .to(torch.float32)."
            )
        if leaf.layout != torch.strided:
            raise TypeError(
                f"{name} must be dense; got layout {leaf.layout}. Convert it with .to_dense()."
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
    if not any(leaf.numel() for leaf in found):
        raise ValueError(
            f"{name} must hold at least one number; got shape {shapes(tree)}. Leave out the call "
            f"where there are no problems."
        )
    return found


def check_finite(name: str, tree: Tree) -> None:
    """No NaN or infinity in ``tree``; says where the first one is."""
    for path, leaf in pytree.tree_flatten_with_path(tree)[0]:
        if leaf.device.type == "meta":
            raise ValueError(
                f"{name} must hold numbers to compute with; got a tensor on device meta, which "
                f"has none. Make it on another device."
            )
        bad = ~torch.isfinite(leaf)
        if bool(bad.any()):
            where = tuple(bad.nonzero()[0].tolist())
            raise ValueError(
                f"{name} must be finite; got {leaf[where].item()} at {name}{pytree.keystr(path)}"
                f"{list(where) or ''}. Check the data it came from."
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


def check_batch(name: str, tree: Tree, batched: bool) -> None:
    """Where ``batched``, dim 0 of every leaf of ``tree`` must be one and the same batch."""
    if batched and len({leaf.shape[0] if leaf.dim() else -1 for leaf in leaves(tree)} | {-1}) != 2:
        raise ValueError(
            f"dim 0 of every leaf of {name} must be the batch of problems, of one size; got "
            f"{shapes(tree)}. Pass batched=False if all of it is one problem."
        )


def shapes(tree: Tree) -> str:
    """The shapes of a pytree's leaves, in its structure, for messages."""
    return str(
        pytree.tree_map(
            lambda leaf: tuple(leaf.shape) if isinstance(leaf, Tensor) else type(leaf).__name__,
            tree,
        )
    )


def detached(tree: Tree) -> Tree:
    """``tree`` without its graph; tensors made in inference mode are copied out of it."""

    def detach(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf.detach().clone() if leaf.is_inference() else leaf.detach()

    return pytree.tree_map(detach, tree)


def warn_of_gradient(**starts: Any) -> None:
    """Warn where a start asks for a gradient: it gets none, as no solution depends on its start."""
    for name, tree in starts.items():
        asked = any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves(tree))
        if asked and torch.is_grad_enabled():
            warnings.warn(
                f"{name} requires a gradient and will get none: the solution does not depend on "
                f"where it starts. Pass {name}.detach(), and let f or the loss read what should "
                "get one.",
                UserWarning,
                stacklevel=4,
            )


def refuse_transforms(name: str) -> None:
    """Raise inside of ``torch.func``'s transforms: autograd, which ``name`` needs, is off there."""
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            f"{name} must be called outside of torch.func's transforms; got a call inside of grad, "
            "vjp, jacrev, vmap or the like. Use torch.autograd.grad and "
            "torch.autograd.functional.jacobian for derivatives, and for vmap a larger batch."
        )


def out_of_inference(tree: Tree) -> Tree:
    """``tree`` with those tensors copied that inference mode made: autograd bars them."""

    def copy(leaf: Any) -> Any:
        return leaf.clone() if isinstance(leaf, Tensor) and leaf.is_inference() else leaf

    return pytree.tree_map(copy, tree)


@contextlib.contextmanager
def without_gradient() -> Iterator[None]:
    """``torch.no_grad()``, after which autocast does not reuse the casts of weights made in it.

    They have no gradient, and torch 2.5 gives them to calls that want one as well.
    """
    try:
        with torch.no_grad():
            yield
    finally:
        torch.clear_autocast_cache()


def _copied(tree: Tree) -> Tree:
    return pytree.tree_map(lambda leaf: leaf.detach().clone(), tree)


def initial_state(f: Callable[[Tree, Tree], Tree], x0: Tree, z0: Any) -> Tree:
    """z0 as given or computed from x0; by default zeros like x0, if f maps those to themselves."""
    if callable(z0) and not isinstance(z0, Tensor):
        z0 = z0(_copied(x0))
    if z0 is not None:
        tensors("z0", z0)
        return detached(z0)
    guess = pytree.tree_map(torch.zeros_like, x0)
    error = None
    try:
        with torch.no_grad():
            image = f(_copied(guess), _copied(x0))
        if _same_shapes(image, guess):
            return guess
        found = f"f maps it to {shapes(image)}"
    except Exception as raised:
        error, found = raised, f"f raises {type(raised).__name__}: {raised}"
    raise ValueError(
        f"z0 was not given, and zeros shaped like x0, {shapes(x0)}, are no state of f: {found}."
        f" Pass z0, the state to start from: tensors, or a callable x0 -> z0."
    ) from error


def _same_shapes(a: Tree, b: Tree) -> bool:
    (a_leaves, a_spec), (b_leaves, b_spec) = pytree.tree_flatten(a), pytree.tree_flatten(b)
    return bool(a_spec == b_spec) and all(
        isinstance(p, Tensor) and p.shape == q.shape
        for p, q in zip(a_leaves, b_leaves, strict=True)
    )


def check_warm_start(earlier: Any, x0: Tree) -> None:
    """The earlier solution must be finite, and its x of the kind of x0 in every respect."""
    given, expected = tensors("warm_start.x", earlier.x), leaves(x0)
    first = expected[0]
    if (
        not _same_shapes(earlier.x, x0)
        or given[0].dtype != first.dtype
        or given[0].device != first.device
    ):
        raise ValueError(
            f"warm_start must solve problems of the shape, dtype and device of x0, {shapes(x0)} "
            f"{first.dtype} {first.device}; got {shapes(earlier.x)} {given[0].dtype} "
            f"{given[0].device}. Leave it out, or pass a solution of such problems."
        )
    same_kind("warm_start.mu", earlier.mu, "warm_start.z", tensors("warm_start.z", earlier.z)[0])
    if not _same_shapes(earlier.mu, earlier.z):
        raise ValueError(
            f"warm_start.mu must have the shape of warm_start.z, {shapes(earlier.z)}; got "
            f"{shapes(earlier.mu)}. Leave it out, or pass zeros where nothing is known."
        )
    for name in ("x", "z", "mu"):
        check_finite(f"warm_start.{name}", detached(getattr(earlier, name)))


def _call(name: str, function: Callable[..., Any], *arguments: tuple[str, Tree]) -> Any:
    """The function's value, recording a graph, on copies of its arguments that it must not change.

    The copies are neither leaves of the graph nor views: torch itself would forbid changing those
    in place, in words that do not say what to do here.
    """
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            f"{name} must be differentiated, which torch.inference_mode() forbids. Call under "
            f"torch.no_grad() instead."
        )
    with torch.enable_grad():
        trees = [
            pytree.tree_map(lambda leaf: leaf.detach().requires_grad_().clone(), tree)
            for _, tree in arguments
        ]
        flat = [leaves(tree) for tree in trees]
        versions = [[leaf._version for leaf in found] for found in flat]
        try:
            value = function(*trees)
        except Exception as error:
            _add_note(error, name, arguments)
            raise
    for (label, tree), found, before in zip(arguments, flat, versions, strict=True):
        for leaf, given, version in zip(found, leaves(tree), before, strict=True):
            # Writes through .data leave the version as it is.
            same = torch.allclose(leaf, given, rtol=0, atol=0, equal_nan=True)
            if leaf._version != version or not same:
                raise _changed(name, label)
    return value


def _add_note(error: Exception, name: str, arguments: tuple[tuple[str, Tree], ...]) -> None:
    """Say what the function was called with, below torch's message (from Python 3.11 on).

    Exceptions of other types are of the caller's making, and pass as they are.
    """
    if type(error) not in (RuntimeError, TypeError) or not hasattr(error, "add_note"):
        return
    called = ", ".join(label for label, _ in arguments)
    given = " and ".join(
        f"{label} {shapes(tree)} {leaves(tree)[0].dtype}" for label, tree in arguments
    )
    error.add_note(
        f"{name} raised this when it was called as {name}({called}) with {given}. The state comes "
        f"first; z0 must have the shapes of a state, and x0 and z0 the dtype of the parameters."
    )


def call_unchanged(f: Callable[[Tree, Tree], Tree], z: Tree, x: Tree) -> Tree:
    """f(z, x), in the graph of z and x, after checking that it did not write on them."""
    given = [
        leaf for leaf in leaves((z, x)) if isinstance(leaf, Tensor) and not leaf.is_inference()
    ]
    before = [leaf._version for leaf in given]
    image = f(z, x)
    if [leaf._version for leaf in given] != before:
        raise _changed("f", "z or x")
    return image


def _changed(name: str, label: str) -> ValueError:
    return ValueError(
        f"{name} must leave its arguments as they are; it changed {label} in place. Use the "
        f"out-of-place operation (torch.relu(z), not z.relu_()), or clone {label} first."
    )


def check_map(f: Callable[[Tree, Tree], Tree], z: Tree, x: Tree) -> Tree:
    """f(z, x), after checking that f maps states to states and can be differentiated."""
    image = _call("f", f, ("z", z), ("x", x))
    check_image(image, z)
    return _copied(image)  # f may write its next image where this one is, as CUDA graphs do


def check_image(image: Tree, z: Tree) -> None:
    """What f returned for the state ``z`` must be a state that carries a gradient."""
    if not _same_shapes(image, z):
        raise ValueError(
            f"f(z, x) must return a state shaped like z: expected {shapes(z)}, got "
            f"{shapes(image)}. Make f return its next state, or pass a z0 of that shape."
        )
    for got, given in zip(leaves(image), leaves(z), strict=True):
        if got.layout != torch.strided:
            raise TypeError(
                f"f(z, x) must be dense; got layout {got.layout}. Convert it with .to_dense()."
            )
        if got.device != given.device:
            raise ValueError(
                f"f(z, x) must stay on the device of z, {given.device}; got {got.device}. "
                f"Move the model with .to({str(given.device)!r})."
            )
        if got.dtype != given.dtype and not torch.is_autocast_enabled(given.device.type):
            raise TypeError(
                f"f(z, x) must keep the dtype of z, {given.dtype}; got {got.dtype}. "
                f"Convert the model or x0 and z0 to one dtype."
            )
    if not any(leaf.requires_grad for leaf in leaves(image)):
        raise ValueError(
            "f(z, x) must be differentiable in z or x; its output carries no gradient to "
            "either. Remove torch.no_grad(), .detach() or .data from f."
        )


def problem_count(loss: Callable[[Tree, Tree], Tensor], z: Tree, x: Tree) -> int | None:
    """B where the loss returns ``(B,)``; None where it returns ``()``."""
    value = _call("loss", loss, ("z", z), ("x", x))
    first = leaves(x)[0]
    batch = first.shape[0] if first.dim() else None
    allowed = "()" if batch is None else f"() or ({batch},)"
    if not isinstance(value, Tensor):
        raise TypeError(
            f"loss(z, x) must return a tensor of shape {allowed}; got {type(value).__name__}. "
            f"Leave out .item(), float() and the like."
        )
    if not value.dtype.is_floating_point:
        raise TypeError(
            f"loss(z, x) must be floating point, since it is differentiated; got {value.dtype}. "
            f"Count or compare outside of the loss, and convert what it reads to {first.dtype}."
        )
    if value.dim() > 1 or (value.dim() == 1 and batch is None):
        raise ValueError(
            f"loss must return one value per problem, shape {allowed}; got "
            f"{tuple(value.shape)}. Sum or average over the other dimensions."
        )
    if value.dim() == 1:
        for name, found in (("x0", leaves(x)), ("z0", leaves(z))):
            _check_count(name, found, value.shape[0])
    if value.device != first.device:
        raise ValueError(
            f"loss(z, x) must stay on the device of x0, {first.device}; got {value.device}. "
            f"Move what the loss reads with .to({str(first.device)!r})."
        )
    coarser = torch.finfo(value.dtype).eps > torch.finfo(first.dtype).eps
    if coarser and not torch.is_autocast_enabled(first.device.type):
        raise TypeError(
            f"loss(z, x) must be as precise as x0, {first.dtype}; got {value.dtype}. "
            f"Convert what the loss reads with .to({first.dtype})."
        )
    if not value.requires_grad:
        raise ValueError(
            "loss(z, x) must be differentiable in z or x; its value carries no gradient to "
            "either. Remove torch.no_grad(), .detach(), .item() or .argmax() from the loss."
        )
    return value.shape[0] if value.dim() else None


def _check_count(name: str, found: list[Tensor], count: int) -> None:
    for leaf in found:
        if leaf.dim() == 0 or leaf.shape[0] != count:
            raise ValueError(
                f"loss returns {count} values, so dim 0 of every leaf of {name} must be "
                f"{count}; got shape {tuple(leaf.shape)}. Return one value per problem from "
                f"the loss, or () for a single problem."
            )


def check_projection(
    project: Callable[..., Tree] | None, x: Tree, layout: Layout
) -> Callable[[Tensor], Tensor] | None:
    """The projection on matrices, after checking that it keeps shapes and is idempotent."""
    if project is None:
        return None
    per_problem = isinstance(project, (L2Ball, LinfBall, Box, Simplex))

    def on_tree(tree: Tree) -> Tree:
        return project(tree, batched=layout.batched) if per_problem else project(tree)

    def on_matrix(rows: Tensor) -> Tensor:
        return layout.flatten(on_tree(layout.unflatten(rows)), "project(x)").to(rows.dtype)

    once = _call("project", on_tree, ("x", x))
    if not _same_shapes(once, x):
        raise ValueError(
            f"project must return what it is given, shaped like x0, {shapes(x)}; got "
            f"{shapes(once)}. Return the whole of x, projected."
        )
    same_kind("project(x0)", once, "x0", leaves(x)[0])
    check_finite("project(x0)", once)
    with torch.no_grad():
        rows = layout.flatten(detached(once))
        moved = (on_matrix(rows) - rows).abs().amax()
        if not bool(moved <= torch.finfo(rows.dtype).eps ** 0.5 * (1 + rows.abs().amax())):
            raise ValueError(
                f"project must be a projection, so that project(project(x)) is project(x); got "
                f"one that moved a projected x0 by {moved.item():.1e}. See implicitopt.L2Ball for "
                f"an example."
            )
    return on_matrix


def one_layout(tree: Tree, batch: int | None) -> Layout:
    """The layout of ``tree`` for ``batch`` problems, or for one problem where that is None."""
    return Layout.of(tree, batched=batch is not None)
