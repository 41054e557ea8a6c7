"""Functions and inputs that a user might hand over by mistake, each by a name.

An exception that passes through a function of this module is the user's own, not the library's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

NAN, INF = float("nan"), float("inf")


class UsersError(Exception):
    """What a user's f, loss, project or callback raises."""


class Problem:
    """A sound problem: z = tanh(z W + x), a batch of B rows of n numbers, or a pytree of those."""

    def __init__(self, seed: int, batch: int, n: int, dtype: torch.dtype, *, scalar: bool) -> None:
        generator = torch.Generator().manual_seed(seed)
        W = torch.randn(n, n, generator=generator, dtype=torch.float64)
        self.W = (0.6 * W / torch.linalg.matrix_norm(W, 2)).to(dtype).requires_grad_()
        self.target = torch.randn(batch, n, generator=generator, dtype=torch.float64).to(dtype) / 3
        self.batch, self.n, self.dtype, self.scalar = batch, n, dtype, scalar
        self.calls = 0

    def f(self, z: Any, x: Any) -> Any:
        return pytree.tree_map(lambda a, b: torch.tanh(a @ self.W + b), z, x)

    def loss(self, z: Any, x: Any) -> Tensor:
        squares = [(leaf - self.target).square().sum(-1) for leaf in pytree.tree_leaves(z)]
        squares += [0.05 * leaf.square().sum(-1) for leaf in pytree.tree_leaves(x)]
        value = torch.stack(squares).sum(0)
        return value.sum() if self.scalar else value

    def x(self) -> Tensor:
        return torch.zeros(self.batch, self.n, dtype=self.dtype)


def on_call(k: int, odd: Callable[..., Any]) -> Callable[[Problem, Any], Any]:
    """f that turns odd at its k-th call."""

    def make(p: Problem, plain: Callable[..., Any]) -> Any:
        calls = 0

        def f(z: Any, x: Any) -> Any:
            nonlocal calls
            calls += 1
            return odd(plain, z, x) if calls >= k else plain(z, x)

        return f

    return make


def always(odd: Callable[..., Any]) -> Callable[[Problem, Any], Any]:
    return on_call(1, odd)


def _raise(plain: Any, z: Any, x: Any) -> Any:
    raise UsersError("the user's own")


def _leaf(tree: Any) -> Tensor:
    return pytree.tree_leaves(tree)[0]


def _in_place(tree: Any) -> Any:
    return pytree.tree_map(lambda leaf: leaf.mul_(0.5), tree)


def _under_no_grad(plain: Any, z: Any, x: Any) -> Any:
    with torch.no_grad():
        return plain(z, x)


def _nan_rows(tree: Any) -> Any:
    def spoil(leaf: Tensor) -> Tensor:
        if not leaf.dim():
            return leaf * NAN
        row = torch.arange(leaf.shape[0]) == leaf.shape[0] - 1
        return torch.where(row.reshape(-1, *[1] * (leaf.dim() - 1)), NAN, leaf)

    return pytree.tree_map(spoil, tree)


def each(function: Callable[[Tensor], Any]) -> Callable[..., Any]:
    """The plain f with ``function`` applied to each leaf of what it returns."""
    return lambda plain, z, x: pytree.tree_map(function, plain(z, x))


#: name -> (problem, plain f) -> f. Those in ``IMPURE`` are no functions of z and x.
STATE_MAPS: dict[str, Callable[[Problem, Any], Any]] = {
    "raises": always(_raise),
    "raises at call 4": on_call(4, _raise),
    "raises at call 9": on_call(9, _raise),
    "changes z in place": always(lambda f, z, x: f(_in_place(z), x)),
    "changes x in place": always(lambda f, z, x: f(z, _in_place(x))),
    "changes z in place from call 4": on_call(4, lambda f, z, x: f(_in_place(z), x)),
    "changes x in place from call 5": on_call(5, lambda f, z, x: f(z, _in_place(x))),
    "returns z": always(lambda f, z, x: z),
    "returns x": always(lambda f, z, x: x),
    "returns a view of z": always(lambda f, z, x: pytree.tree_map(lambda a: a[:], z)),
    "returns None": always(lambda f, z, x: None),
    "returns None at call 5": on_call(5, lambda f, z, x: None),
    "returns a number": always(lambda f, z, x: 1.0),
    "returns numpy": always(each(lambda a: a.detach().numpy())),
    "returns a tuple": always(lambda f, z, x: (f(z, x), f(z, x))),
    "returns a list": always(lambda f, z, x: [f(z, x)]),
    "other shape": always(each(lambda a: a.sum(-1))),
    "other shape from call 5": on_call(5, each(lambda a: a.sum(-1))),
    "one column more": always(each(lambda a: torch.cat([a, a[..., :1]], -1))),
    "transposed": always(each(lambda a: a.mT if a.dim() > 1 else a)),
    "one row for all": always(each(lambda a: a[:1])),
    "expanded": always(each(lambda a: a[:1].expand_as(a))),
    "non-contiguous": always(each(lambda a: torch.stack([a, a], -1)[..., 0])),
    "float64": always(each(Tensor.double)),
    "float16": always(each(Tensor.half)),
    "float64 from call 5": on_call(5, each(Tensor.double)),
    "integers": always(each(Tensor.long)),
    "complex": always(each(lambda a: torch.complex(a, a))),
    "complex from call 5": on_call(5, each(lambda a: torch.complex(a, a))),
    "sparse": always(each(lambda a: a.to_sparse())),
    "on meta": always(each(lambda a: a.to("meta"))),
    "detached": always(each(Tensor.detach)),
    "detached from call 5": on_call(5, each(Tensor.detach)),
    "under no_grad": always(_under_no_grad),
    "constant": always(lambda f, z, x: pytree.tree_map(torch.ones_like, z)),
    "NaN": always(each(lambda a: a * NAN)),
    "NaN in one row": always(lambda f, z, x: _nan_rows(f(z, x))),
    "NaN from call 6": on_call(6, each(lambda a: a * NAN)),
    "infinite": always(each(lambda a: a + INF)),
    "huge": always(each(lambda a: a * 1e30)),
    "denormal": always(each(lambda a: a * 1e-40)),
    "explodes": always(lambda f, z, x: pytree.tree_map(lambda a, b: a.exp() + b, z, x)),
    "expands by 3": always(lambda f, z, x: pytree.tree_map(lambda a, b: 3 * a + b + 1, z, x)),
    "discontinuous": always(lambda f, z, x: pytree.tree_map(lambda a, b: a + b.sign(), f(z, x), x)),
    "square root of what is negative": always(lambda f, z, x: pytree.tree_map(
        lambda a, b: a + (b - 0.01).sqrt(), f(z, x), x
    )),
    "random": always(each(lambda a: a + 0.1 * torch.rand_like(a))),
    "batch norm": always(each(lambda a: (a - a.mean(0)) / (1 + a.std(0, correction=0)))),
    "ignores x": always(lambda f, z, x: f(z, pytree.tree_map(torch.zeros_like, x))),
    "ignores z": always(lambda f, z, x: f(pytree.tree_map(torch.zeros_like, z), x)),
    "needs three arguments": lambda p, plain: lambda z, x, y: plain(z, x),
    "not callable": lambda p, plain: 3,
    "None": lambda p, plain: None,
    "a class": always(lambda f, z, x: torch.nn.Linear(z, x)),
    "a module of one argument": always(lambda f, z, x: torch.nn.Linear(3, 3)(z, x)),
}  # fmt: skip

#: Those whose values depend on more than z and x: their results cannot be checked afterwards.
IMPURE = {name for name in STATE_MAPS if "call " in name} | {"random"}
#: Those that couple the problems of a batch, for which nothing is promised.
COUPLED = {"one row for all", "expanded", "batch norm"}

LOSSES: dict[str, Callable[[Problem, Any], Any]] = {
    "raises": always(_raise),
    "raises at call 5": on_call(5, _raise),
    "changes z in place": always(lambda g, z, x: g(_in_place(z), x)),
    "changes x in place": always(lambda g, z, x: g(z, _in_place(x))),
    "detached": always(lambda g, z, x: g(z, x).detach()),
    "detached from call 5": on_call(5, lambda g, z, x: g(z, x).detach()),
    "under no_grad": always(_under_no_grad),
    "of a count": always(lambda g, z, x: (_leaf(z) > 0).sum(-1)),
    "a number": always(lambda g, z, x: float(g(z, x).sum())),
    "None": always(lambda g, z, x: None),
    "numpy": always(lambda g, z, x: np.float32(1)),
    "not summed": always(lambda g, z, x: _leaf(z)),
    "(B, 1)": always(lambda g, z, x: g(z, x)[..., None]),
    "(1,)": always(lambda g, z, x: g(z, x).sum()[None]),
    "(B + 1,)": always(lambda g, z, x: torch.cat([g(z, x), g(z, x)[:1]])),
    "()": always(lambda g, z, x: g(z, x).sum()),
    "other shape from call 5": on_call(5, lambda g, z, x: g(z, x).sum()[None, None]),
    "complex": always(lambda g, z, x: torch.complex(g(z, x), g(z, x))),
    "float64": always(lambda g, z, x: g(z, x).double()),
    "float16": always(lambda g, z, x: g(z, x).half()),
    "on meta": always(lambda g, z, x: g(z, x).to("meta")),
    "constant": always(lambda g, z, x: 0 * g(z, x)),
    "of x alone": always(lambda g, z, x: (_leaf(x) - 1).square().sum(-1)),
    "of z alone": always(lambda g, z, x: (_leaf(z) - 0.1).square().sum(-1)),
    "unbounded below": always(lambda g, z, x: -_leaf(x).square().sum(-1) + _leaf(z).sum(-1)),
    "linear": always(lambda g, z, x: _leaf(x).sum(-1) + _leaf(z).sum(-1)),
    "NaN": always(lambda g, z, x: g(z, x) * NAN),
    "NaN in one row": always(lambda g, z, x: _nan_rows(g(z, x))),
    "NaN from call 6": on_call(6, lambda g, z, x: g(z, x) * NAN),
    "infinite": always(lambda g, z, x: g(z, x) + INF),
    "huge": always(lambda g, z, x: g(z, x) * 1e30),
    "denormal": always(lambda g, z, x: g(z, x) * 1e-40),
    "infinite slope": always(lambda g, z, x: g(z, x) + _leaf(x).abs().sqrt().sum(-1)),
    "step": always(lambda g, z, x: g(z, x) + (_leaf(x) > 0.05).sum(-1)),
    "kink": always(lambda g, z, x: g(z, x) + _leaf(x).abs().sum(-1)),
    "expanded": always(lambda g, z, x: g(z, x).sum().expand(len(_leaf(x)))),
    "not callable": lambda p, plain: "loss",
}
IMPURE_LOSSES = {name for name in LOSSES if "call " in name}


def _with(x: Tensor, value: float) -> Tensor:
    x = x.clone()
    x.view(-1)[-1] = value
    return x


#: name -> sound x -> odd x, or what should be one.
INPUTS: dict[str, Callable[[Tensor], Any]] = {
    "dict": lambda x: {"a": x},
    "tuple of two": lambda x: (x, x + 0.1),
    "nested": lambda x: {"a": [x, (x,)]},
    "empty dict": lambda x: {},
    "None": lambda x: None,
    "number": lambda x: 0.0,
    "string": lambda x: "x",
    "list of numbers": lambda x: [0.0, 1.0],
    "numpy": lambda x: x.float().numpy(),
    "with a leaf None": lambda x: (x, None),
    "with a leaf of size zero": lambda x: (x, x[:, :0]),
    "leaves of two dtypes": lambda x: (x, x.to(torch.bfloat16)),
    "leaves of two batches": lambda x: (x, x[:-1]),
    "no problems": lambda x: x[:0],
    "no numbers": lambda x: x[:, :0],
    "0-d": lambda x: x.sum(),
    "1-d": lambda x: x[0],
    "3-d": lambda x: x[:, None],
    "4-d, channels last": lambda x: x[:, :, None, None].to(memory_format=torch.channels_last),
    "NaN": lambda x: _with(x, NAN),
    "inf": lambda x: _with(x, INF),
    "-inf": lambda x: _with(x, -INF),
    "denormal": lambda x: x + 1e-40,
    "huge": lambda x: x + 1e30,
    "close to overflow": lambda x: x + 0.9 * torch.finfo(x.dtype).max,
    "non-contiguous": lambda x: torch.stack([x, x], -1)[..., 0],
    "reversed": lambda x: x.flip(0),
    "expanded": lambda x: x[:1].expand_as(x),
    "one number expanded": lambda x: x.new_zeros(()).expand_as(x),
    "leaf that requires grad": lambda x: x.clone().requires_grad_(),
    "result that requires grad": lambda x: x.clone().requires_grad_() * 1,
    "Parameter": lambda x: torch.nn.Parameter(x),
    "integers": lambda x: x.long(),
    "bool": lambda x: x > 0,
    "complex": lambda x: torch.complex(x, x),
    "float8": lambda x: x.to(torch.float8_e4m3fn),
    "float16": lambda x: x.half(),
    "bfloat16": lambda x: x.bfloat16(),
    "sparse": lambda x: x.to_sparse(),
    "on meta": lambda x: x.to("meta"),
    "inference tensor": lambda x: _inferred(x),
    "Module": lambda x: torch.nn.Linear(1, 1),
}


def _inferred(x: Tensor) -> Tensor:
    with torch.inference_mode():
        return x.clone()


def raising(*args: Any, **kwargs: Any) -> Any:
    raise UsersError("the user's own")


#: Values that an option of any kind might be given by mistake.
JUNK: list[Any] = [
    None, -1, 0, 1, 2, 0.0, -0.5, 0.5, 1e300, NAN, INF, "best", "", True, False, [], (), {}, object,
    object(), torch.zeros(3), torch.tensor(2), torch.tensor(0.5), np.float32(0.3), np.int64(3),
    1 + 2j, raising, UsersError, b"x",
]  # fmt: skip
