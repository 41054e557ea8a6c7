"""Hypergradients: d/dθ of a validation loss at w*(θ), the minimum of a regularized training loss.

    w*(θ) = argmin over w of  misfit(predict(w)) + ½ Σ exp(θᵢ) wᵢ²

The three problems are a ridge regression, a logistic regression and a perceptron with a hidden
layer, with a weight decay for each parameter, in float64. In implicitopt the state is the
prediction, z = predict(w), and the input is w. Everything is written once, for torch and for
jax.numpy (the argument ``xp``).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import implicitopt

__all__ = ["CONTENDERS", "PROBLEMS", "TOL", "Bilevel", "Solved", "stationarity"]

#: Of the gradient in w, and of the linear system of the backward pass.
TOL, MAX_STEPS = 1e-8, 1000
FEATURES, HIDDEN, ROWS = 20, 8, 100


class Solved(NamedTuple):
    """What a contender found; ``products`` with the Hessian in the backward pass, where known."""

    w: Tensor
    grad: Tensor
    products: int | None = None


class Bilevel(NamedTuple):
    """Training and validation data of one problem; ``kind``: ridge, logistic or mlp."""

    kind: str
    X: Any  # (N, d)
    y: Any  # (N,)
    X_val: Any
    y_val: Any
    w0: Any
    theta: Any

    def predict(self, xp: Any, w: Any, X: Any) -> Any:
        """Outputs over √N, so that the misfit is a sum of squares of about unit size."""
        if self.kind != "mlp":
            return X @ w / len(X) ** 0.5
        cut = FEATURES * HIDDEN
        hidden = xp.tanh(X @ w[:cut].reshape(FEATURES, HIDDEN) + w[cut : cut + HIDDEN])
        return hidden @ w[cut + HIDDEN :] / len(X) ** 0.5

    def misfit(self, xp: Any, z: Any, y: Any) -> Any:
        if self.kind == "logistic":
            margin = y * z * len(y) ** 0.5
            return xp.logaddexp(xp.zeros_like(margin), -margin).mean()
        return 0.5 * ((z - y / len(y) ** 0.5) ** 2).sum()

    def penalty(self, xp: Any, w: Any, theta: Any) -> Any:
        return 0.5 * (xp.exp(theta) * w**2).sum()

    def inner(self, xp: Any, w: Any, theta: Any) -> Any:
        return self.misfit(xp, self.predict(xp, w, self.X), self.y) + self.penalty(xp, w, theta)

    def outer(self, xp: Any, w: Any) -> Any:
        return self.misfit(xp, self.predict(xp, w, self.X_val), self.y_val)

    def known(self, w: Tensor) -> Tensor | None:
        """The hypergradient at the solution nearest to w: closed form, or Newton and the Hessian.

        The perceptron has many minima; each contender is compared with the one that it found, and
        None says that w is near none.
        """
        theta = self.theta.clone().requires_grad_()
        if self.kind == "ridge":
            gram = self.X.T @ self.X / len(self.X)
            w = torch.linalg.solve(gram + theta.exp().diag(), self.X.T @ self.y / len(self.X))
            (grad,) = torch.autograd.grad(self.outer(torch, w), theta)
            return grad
        inner = partial(self.inner, torch)
        slope, hessian = torch.func.grad(inner), torch.func.hessian(inner)
        for _ in range(20):
            step = torch.linalg.solve(hessian(w, self.theta), slope(w, self.theta))
            w = w - step
            if step.norm() < 1e-12 * (1 + w.norm()):
                break
        else:
            return None
        pull = torch.linalg.solve(
            hessian(w, self.theta), torch.func.grad(partial(self.outer, torch))(w)
        )
        (grad,) = torch.autograd.grad((slope(w, theta) * -pull).sum(), theta)
        return grad


def draw(kind: str) -> Bilevel:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    X, X_val = normal(ROWS, FEATURES), normal(ROWS, FEATURES)
    truth = normal(FEATURES)

    def target(X: Tensor) -> Tensor:
        y = X @ truth + normal(ROWS)
        return y.sign() if kind == "logistic" else y / y.std()

    count = (FEATURES + 2) * HIDDEN if kind == "mlp" else FEATURES
    w0 = 0.3 * normal(count) if kind == "mlp" else torch.zeros(count, dtype=torch.float64)
    theta = torch.full_like(w0, 0.03).log() + 0.1 * normal(count)
    return Bilevel(kind, X, target(X), X_val, target(X_val), w0, theta)


PROBLEMS: dict[str, Callable[[], Bilevel]] = {
    "ridge regression": partial(draw, "ridge"),
    "logistic regression": partial(draw, "logistic"),
    "MLP": partial(draw, "mlp"),
}


def stationarity(problem: Bilevel, w: Tensor) -> float:
    """‖∇ of the training loss in w‖ / (1 + ‖w‖)."""
    slope = torch.func.grad(partial(problem.inner, torch))(w, problem.theta)
    return (slope.norm() / (1 + w.norm())).item()


# Each contender: (problem, tick) -> a call that solves it; ``tick()`` counts one evaluation of the
# training loss, or is None where time is measured.
Tick = Callable[[], None] | None


def by_implicitopt(problem: Bilevel, tick: Tick) -> Callable[[], Solved]:
    def run() -> Solved:
        theta = problem.theta.clone().requires_grad_()

        def f(z: Tensor, w: Tensor) -> Tensor:
            if tick is not None:
                tick()
            return problem.predict(torch, w, problem.X)

        def loss(z: Tensor, w: Tensor) -> Tensor:
            return problem.misfit(torch, z, problem.y) + problem.penalty(torch, w, theta)

        sol = implicitopt.solve(
            f, loss, problem.w0, torch.zeros_like(problem.y), tol=TOL, max_steps=MAX_STEPS,
            solver=implicitopt.Adaptive(implicitopt.Joint()),  # f is cheap
            adjoint=implicitopt.Implicit(tol=TOL, max_steps=MAX_STEPS),
        )  # fmt: skip
        (grad,) = torch.autograd.grad(problem.outer(torch, sol.x), theta)
        return Solved(sol.x.detach(), grad, sol.adjoint.products)

    return run


def by_torchopt(problem: Bilevel, tick: Tick) -> Callable[[], Solved]:
    """torchopt leaves the forward solve to its user: here PyTorch's L-BFGS."""
    import torchopt

    def inner(w: Tensor, theta: Tensor) -> Tensor:
        if tick is not None:
            tick()
        return problem.inner(torch, w, theta)

    def minimize(w: Tensor, theta: Tensor) -> Tensor:
        w, theta = w.detach().clone().requires_grad_(), theta.detach()
        optimizer = torch.optim.LBFGS(
            [w], max_iter=MAX_STEPS, history_size=20, tolerance_grad=TOL / w.numel() ** 0.5,
            tolerance_change=0, line_search_fn="strong_wolfe",
        )  # fmt: skip

        def closure() -> Tensor:
            optimizer.zero_grad()
            value = inner(w, theta)
            value.backward()
            return value

        with torch.enable_grad():
            optimizer.step(closure)
        return w.detach()

    solver = torchopt.diff.implicit.custom_root(
        torch.func.grad(inner), argnums=1,
        solve=torchopt.linear_solve.solve_cg(rtol=TOL, maxiter=MAX_STEPS),
    )(minimize)  # fmt: skip

    def run() -> Solved:
        theta = problem.theta.clone().requires_grad_()
        w = solver(problem.w0.clone(), theta)
        (grad,) = torch.autograd.grad(problem.outer(torch, w), theta)
        return Solved(w.detach(), grad)

    return run


def by_xitorch(problem: Bilevel, tick: Tick) -> Callable[[], Solved]:
    import xitorch.optimize

    def inner(w: Tensor, theta: Tensor) -> Tensor:
        if tick is not None:
            tick()
        return problem.inner(torch, w, theta)

    def run() -> Solved:
        theta = problem.theta.clone().requires_grad_()
        w = xitorch.optimize.minimize(
            inner, problem.w0, params=(theta,), method="broyden1", f_tol=TOL, x_rtol=1.0,
            maxiter=MAX_STEPS, bck_options={"method": "cg", "rtol": TOL, "posdef": True},
        )  # fmt: skip
        (grad,) = torch.autograd.grad(problem.outer(torch, w), theta)
        return Solved(w.detach(), grad)

    return run


def in_jax(problem: Bilevel, tick: Tick, minimize: Callable[..., Any]) -> Callable[[], Solved]:
    """``minimize(inner, w0, theta) -> w`` in JAX, compiled as a whole."""
    import jax
    import jax.numpy as jnp

    jax.config.update("jax_enable_x64", True)
    arrays = (jnp.asarray(t.numpy()) for t in problem[1:])
    there = Bilevel(problem.kind, *arrays)

    def inner(w: Any, theta: Any) -> Any:
        if tick is not None:
            jax.debug.callback(tick)
        return there.inner(jnp, w, theta)

    def outer(theta: Any) -> Any:
        w = minimize(inner, there.w0, theta)
        return there.outer(jnp, w), w

    compiled = jax.jit(jax.grad(outer, has_aux=True))

    def run() -> Solved:
        grad, w = jax.block_until_ready(compiled(there.theta))
        jax.effects_barrier()
        return Solved(torch.tensor(w.tolist()).double(), torch.tensor(grad.tolist()).double())

    return run


def by_jaxopt(problem: Bilevel, tick: Tick) -> Callable[[], Solved]:
    import jaxopt

    def minimize(inner: Any, w0: Any, theta: Any) -> Any:
        solver = jaxopt.LBFGS(
            inner, tol=TOL, maxiter=MAX_STEPS, history_size=20, implicit_diff=True,
            implicit_diff_solve=partial(jaxopt.linear_solve.solve_cg, tol=TOL, maxiter=MAX_STEPS),
        )  # fmt: skip
        return solver.run(w0, theta).params

    return in_jax(problem, tick, minimize)


def by_optimistix(problem: Bilevel, tick: Tick) -> Callable[[], Solved]:
    import optimistix

    def minimize(inner: Any, w0: Any, theta: Any) -> Any:
        solver = optimistix.BFGS(rtol=TOL, atol=TOL)
        return optimistix.minimise(
            inner, solver, w0, args=theta, max_steps=MAX_STEPS, throw=False
        ).value

    return in_jax(problem, tick, minimize)


#: name -> (the module it needs, how it solves a problem)
CONTENDERS: dict[str, tuple[str, Callable[[Bilevel, Tick], Callable[[], Solved]]]] = {
    "implicitopt": ("implicitopt", by_implicitopt),
    "torchopt, L-BFGS of torch": ("torchopt", by_torchopt),
    "jaxopt, L-BFGS": ("jaxopt", by_jaxopt),
    "optimistix, BFGS": ("optimistix", by_optimistix),
    "xitorch, Broyden": ("xitorch", by_xitorch),
}
