"""Euclidean projections onto the constraint set C, one per problem of a batch.

Each is a callable ``x -> P_C(x)`` for tensors and pytrees of tensors. Dim 0 of every leaf counts
the problems, and a problem is all that shares its index, over all leaves; with ``batched=False``
the whole pytree is one problem. Dtypes are kept; float16 and bfloat16 are computed in float32.

Autograd differentiates them, twice too, in x and in every bound given as a tensor, almost
everywhere; on the boundary they take the derivative of the inside. A problem with a NaN comes back
with it, and no other problem, nor the gradient of a bound they share, sees it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import reduce
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

PyTree = Any
#: What is computed with.
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, eq=False)
class L2Ball:
    """The ball C = {x : ‖x − center‖₂ ≤ radius}, the norm taken over the whole problem.

    P(x) = center + (x − center) · min(1, radius / ‖x − center‖₂).

    Args:
        radius: finite and at least 0; a number, or a tensor of shape () or (B,), one per problem.
        center: None for the origin; or a number or a tensor that broadcasts to each leaf of x, or
            a pytree of those with the structure of x.

    Raises:
        TypeError, ValueError: radius is not as above; on calling, center or x do not fit.

    >>> import torch, implicitopt
    >>> implicitopt.L2Ball(1.0)(torch.tensor([[3.0, 4.0], [0.1, 0.2]]))
    tensor([[0.6000, 0.8000],
            [0.1000, 0.2000]])
    """

    radius: float | Tensor
    center: PyTree = None

    def __post_init__(self) -> None:
        _check_size("radius", self.radius, zero_allowed=True)
        _values("center", 0.0 if self.center is None else self.center)

    def __call__(self, x: PyTree, *, batched: bool = True) -> PyTree:
        layout = _Layout(x, batched)
        row, center = layout.rows, layout.spread("center", self.center)
        radius = layout.per_problem("radius", self.radius)
        offset = row - center
        norm = _norm(offset.detach())
        outside = norm.isfinite() & (norm > radius)
        # Elsewhere the branch not taken works on ones: 0/0 at the center, or a NaN, would reach
        # the gradient through torch.where.
        offset = torch.where(outside, offset, 1.0)
        return layout.restore(torch.where(outside, center + radius / _norm(offset) * offset, row))


@dataclass(frozen=True, eq=False)
class LinfBall:
    """The ball C = {x : |xᵢ − centerᵢ| ≤ radius for all i}.

    P(x) = min(max(x, center − radius), center + radius).

    Args:
        radius: finite and at least 0; a number, or a tensor of shape () or (B,), one per problem.
        center: as in `L2Ball`.

    Raises:
        TypeError, ValueError: radius is not as above; on calling, center or x do not fit.

    >>> import torch, implicitopt
    >>> implicitopt.LinfBall(1.0, center=1.0)(torch.tensor([[3.0, -4.0], [0.1, 0.2]]))
    tensor([[2.0000, 0.0000],
            [0.1000, 0.2000]])
    """

    radius: float | Tensor
    center: PyTree = None

    def __post_init__(self) -> None:
        _check_size("radius", self.radius, zero_allowed=True)
        _values("center", 0.0 if self.center is None else self.center)

    def __call__(self, x: PyTree, *, batched: bool = True) -> PyTree:
        layout = _Layout(x, batched)
        center = layout.spread("center", self.center)
        radius = layout.per_problem("radius", self.radius)
        return layout.restore(_clip(layout.rows, center - radius, center + radius))


@dataclass(frozen=True, eq=False)
class Box:
    """The box C = {x : lower ≤ x ≤ upper}; P(x) = min(max(x, lower), upper).

    Args:
        lower, upper: each a number (±inf for no bound) or a tensor that broadcasts to each leaf of
            x, or a pytree of those with the structure of x.

    Raises:
        TypeError, ValueError: not lower ≤ upper; on calling, the bounds or x do not fit.

    >>> import torch, implicitopt
    >>> box = implicitopt.Box(0.0, torch.tensor([1.0, 2.0]))
    >>> box(torch.tensor([[3.0, 4.0], [-1.0, 0.2]]))
    tensor([[1.0000, 2.0000],
            [0.0000, 0.2000]])
    """

    lower: PyTree
    upper: PyTree

    def __post_init__(self) -> None:
        lower, upper = _values("lower", self.lower), _values("upper", self.upper)
        count = max(len(lower), len(upper))
        lower, upper = (v * count if len(v) == 1 else v for v in (lower, upper))
        try:
            ordered = all((low <= up).all() for low, up in zip(lower, upper, strict=True))
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                "lower and upper must fit one x; got the shapes "
                f"{[tuple(v.shape) for v in lower]} and {[tuple(v.shape) for v in upper]}. "
                "Give both the structure of x, or a number."
            ) from error
        if not ordered:
            raise ValueError(
                f"lower must be <= upper in every entry, and neither may be NaN; got lower "
                f"{self.lower} and upper {self.upper}. Swap or correct them."
            )

    def __call__(self, x: PyTree, *, batched: bool = True) -> PyTree:
        layout = _Layout(x, batched)
        lower, upper = layout.spread("lower", self.lower), layout.spread("upper", self.upper)
        return layout.restore(_clip(layout.rows, lower, upper))


@dataclass(frozen=True, eq=False)
class Simplex:
    """The simplex C = {x : x ≥ 0, Σᵢ xᵢ = total}, the sum taken over the whole problem.

    P(x) = max(x − θ, 0), θ such that the sum is total. The entries that stay positive are found by
    sorting: Held, Wolfe, Crowder (1974); Duchi et al. (ICML 2008), figure 1.

    Args:
        total: finite and above 0; a number, or a tensor of shape () or (B,), one per problem.

    Raises:
        TypeError, ValueError: total is not as above; on calling, total or x do not fit.

    >>> import torch, implicitopt
    >>> implicitopt.Simplex()(torch.tensor([[0.5, 0.75, -1.0]]))
    tensor([[0.3750, 0.6250, 0.0000]])
    """

    total: float | Tensor = 1.0

    def __post_init__(self) -> None:
        _check_size("total", self.total, zero_allowed=False)

    def __call__(self, x: PyTree, *, batched: bool = True) -> PyTree:
        layout = _Layout(x, batched)
        row, total = layout.rows, layout.per_problem("total", self.total)
        # P(x) = P(x − c): with the largest entry at 0 the sums below lose no digits.
        top = row.detach().amax(dim=1, keepdim=True)
        shifted = torch.where(top.isfinite(), row - top, 0.0)
        ordered = shifted.detach().sort(dim=1, descending=True).values
        rank = torch.arange(1, row.shape[1] + 1, device=row.device)
        last = (ordered * rank > ordered.cumsum(dim=1) - total).sum(dim=1, keepdim=True) - 1
        support = shifted >= ordered.gather(1, last.clamp(min=0))
        surplus = torch.where(support, shifted, 0.0).sum(dim=1, keepdim=True) - total
        theta = surplus / support.sum(dim=1, keepdim=True)
        projected = torch.where(support & (shifted > theta), shifted - theta, 0.0)
        return layout.restore(torch.where(top.isfinite(), projected, row))


class _Layout:
    """A pytree x as the rows of one (B, n) tensor, and back."""

    def __init__(self, x: PyTree, batched: bool) -> None:
        leaves, self.spec = pytree.tree_flatten(x)
        for leaf in leaves:
            if not isinstance(leaf, Tensor) or leaf.dtype not in DTYPES:
                found = f"a {leaf.dtype} tensor" if isinstance(leaf, Tensor) else repr(leaf)
                raise TypeError(f"x must hold floating-point tensors; got {found}. Convert it.")
            if leaf.layout != torch.strided:
                raise TypeError(
                    f"x must be dense; got layout {leaf.layout}. Convert it with .to_dense()."
                )
        self.batched = batched
        self.leaves = leaves if batched else [leaf.unsqueeze(0) for leaf in leaves]
        batches = {leaf.shape[:1] for leaf in self.leaves}
        if len(batches) != 1 or torch.Size() in batches:
            raise ValueError(
                f"every leaf of x must have the same dim 0, the batch; got the shapes "
                f"{[tuple(leaf.shape) for leaf in leaves]}. Pass batched=False if x is one problem."
            )
        dtypes = [leaf.dtype for leaf in leaves]
        self.dtype = reduce(torch.promote_types, dtypes, torch.float32)
        self.rows = self._join(self.leaves)

    def _join(self, leaves: list[Tensor]) -> Tensor:
        parts = [leaf.to(self.dtype).unsqueeze(-1).flatten(1) for leaf in leaves]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def restore(self, rows: Tensor) -> PyTree:
        """The pytree with these rows, in the shapes and dtypes of x."""
        parts = rows.split([leaf.shape[1:].numel() for leaf in self.leaves], dim=1)
        pairs = zip(parts, self.leaves, strict=True)
        leaves = [part.reshape(leaf.shape).to(leaf.dtype) for part, leaf in pairs]
        return pytree.tree_unflatten(
            leaves if self.batched else [leaf.squeeze(0) for leaf in leaves], self.spec
        )

    def spread(self, name: str, value: PyTree) -> Tensor:
        """A bound for each entry: (B, n), or () where one number serves all."""
        if value is None or isinstance(value, Real):
            return self._number(value or 0.0).to(self.rows.device)
        bounds, spec = pytree.tree_flatten(value)
        if isinstance(value, Tensor):
            bounds = bounds * len(self.leaves)
        elif spec != self.spec:
            raise ValueError(
                f"{name} must be a number, a tensor, or a pytree with the structure of x, "
                f"{self.spec}; got {spec}. Give it the containers and keys of x."
            )
        bounds = [
            b if isinstance(b, Tensor) else self._number(b).to(self.rows.device) for b in bounds
        ]
        try:
            pairs = zip(bounds, self.leaves, strict=True)
            return self._join([bound.expand(leaf.shape) for bound, leaf in pairs])
        except RuntimeError as error:
            raise ValueError(
                f"{name} must broadcast to the leaves of x, of shapes "
                f"{[tuple(leaf.shape) for leaf in self.leaves]} with the batch first; got "
                f"{[tuple(bound.shape) for bound in bounds]}. Reshape it: one value per problem "
                "needs trailing dims of 1."
            ) from error

    def _number(self, value: Any) -> Tensor:
        # What overflows becomes infinite: no bound at all.
        return torch.tensor(float(value), dtype=torch.float64).to(self.dtype)

    def per_problem(self, name: str, value: float | Tensor) -> Tensor:
        """A number for each problem: (B, 1), or () where one serves all."""
        if not isinstance(value, Tensor):
            number = self._number(value)
            if not number.isfinite():
                raise ValueError(
                    f"{name} must be finite in {self.dtype}, the dtype of x; got {value}. Pass a "
                    "smaller one, or leave the constraint out."
                )
            return number.to(self.rows.device)
        if value.ndim and value.shape != self.rows.shape[:1]:
            raise ValueError(
                f"{name} must have shape () or ({len(self.rows)},), one value per problem; got "
                f"{tuple(value.shape)}. Pass as many values as x has problems, or one number."
            )
        return value.to(self.dtype).unsqueeze(-1) if value.ndim else value.to(self.dtype)


def _clip(row: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    # torch.maximum would halve the derivative on the boundary, where solutions often lie.
    return torch.where(row < lower, lower, torch.where(row > upper, upper, row))


def _norm(row: Tensor) -> Tensor:
    # Scaled by its largest entry, a row neither overflows nor underflows when squared.
    peak = row.detach().abs().amax(dim=1, keepdim=True)
    peak = torch.where(peak > 0, peak, 1.0)
    return peak * (row / peak).square().sum(dim=1, keepdim=True).sqrt()


def _values(name: str, value: PyTree) -> list[Tensor]:
    """The leaves of a bound as detached tensors, to be checked."""
    leaves = pytree.tree_flatten(value)[0]
    for leaf in leaves:
        if isinstance(leaf, bool) or not isinstance(leaf, Real | Tensor):
            raise TypeError(
                f"{name} must be given as numbers or tensors; got {leaf!r}. Convert it, for "
                "instance with torch.as_tensor."
            )
    return [
        leaf.detach() if isinstance(leaf, Tensor) else torch.tensor(float(leaf), dtype=torch.double)
        for leaf in leaves
    ]


def _check_size(name: str, value: float | Tensor, *, zero_allowed: bool) -> None:
    if not isinstance(value, Real | Tensor):
        raise TypeError(f"{name} must be a number or a tensor; got {value!r}. Pass one of these.")
    (size,) = _values(name, value)
    if size.ndim > 1:
        raise ValueError(
            f"{name} must have shape () or (B,), one value per problem; got {tuple(size.shape)}. "
            "Squeeze it."
        )
    if not (size.isfinite() & (size >= 0 if zero_allowed else size > 0)).all():
        raise ValueError(
            f"{name} must be finite and {'>= 0' if zero_allowed else '> 0'}; got {value}. "
            "Correct or clamp it."
        )
