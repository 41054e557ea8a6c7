"""
# Coming from torchdeq, jaxopt or torchopt

The same task side by side: an equilibrium layer for those who come from torchdeq, the derivative of
a fit for those who come from jaxopt or torchopt, and then what needs a loop there and is one call
here.

The three are not needed to build this site. Their code runs where they are installed (`pip install
torchdeq jaxopt torchopt`), and the page says below which were. Where one is missing its code is
shown, and not run.

| there | here |
|---|---|
| torchdeq: `get_deq(...)`, then `deq(f, z0)` | `fixed_point(f, x, z0)` |
| torchdeq: `jac_reg(f0, z0)` | `jacobian_penalty(f, z, x)` |
| jaxopt: `AndersonAcceleration(f).run(z0, x)` | `fixed_point(f, x, z0)` |
| jaxopt: `LBFGS(fun).run(x0, theta)`, then `jax.grad` | `solve(f, loss, x0, adjoint=Implicit())` |
| jaxopt: `ProjectedGradient(fun, projection)` | `solve(..., project=...)` |
| torchopt: `@custom_root(optimality, argnums=1)` around your own loop | `solve(f, loss, x0, adjoint=Implicit())` |
| a loop of Adam around an equilibrium | `solve(f, loss, x0, z0)` |
"""  # noqa: E501 (a table's row is one line)

# %%
# ## One data set, and who is here

import warnings
from importlib.util import find_spec

import matplotlib.pyplot as plt
import numpy as np
import torch
from sklearn.datasets import load_diabetes, load_digits

import implicitopt

present = {name: find_spec(name) is not None for name in ("torchdeq", "jaxopt", "torchopt")}
print("installed:", present)
for kind in (FutureWarning, DeprecationWarning):  # of names that torch and numpy have renamed since
    warnings.filterwarnings("ignore", category=kind)
torch.manual_seed(0)
images = torch.tensor(load_digits().data[:32] / 16)  # float64
W = torch.randn(80, 80, dtype=torch.float64)
W = (0.8 * W / torch.linalg.matrix_norm(W, 2)).requires_grad_()
U = torch.randn(64, 80, dtype=torch.float64) / 8
z0 = torch.zeros(32, 80, dtype=torch.float64)
apart = {}


def compare(name, theirs, ours):
    """By how much two results differ, relatively."""
    theirs, ours = np.asarray(theirs), np.asarray(ours)
    apart[name] = float(np.abs(theirs - ours).max() / np.abs(ours).max())
    print(f"{name}: {apart[name]:.0e} apart")


# %%
# ## An equilibrium layer: torchdeq
#
# The state of 32 digits, and the gradient of its mean square in the weight. First here. `f` takes
# `z` and the input. The tolerance is relative, one a problem, and a state that was not reached
# warns.


def f(z, x):
    """The layer."""
    return torch.tanh(z @ W + x @ U)


z = implicitopt.fixed_point(f, images, z0, tol=1e-10)
(slope,) = torch.autograd.grad(z.square().mean(), W)

# %%
# In torchdeq `get_deq` makes a module from options, and the module takes a function of `z` alone.
# It returns a list of states, of which the last is the equilibrium, and a dict of statistics.
# `ift=True` asks for the implicit gradient; without it, the default is a few unrolled steps
# ("phantom gradient").

if present["torchdeq"]:
    from torchdeq import get_deq

    deq = get_deq(
        f_solver="anderson", f_tol=1e-10, b_tol=1e-10, f_max_iter=100, b_max_iter=100, ift=True
    )
    states, info = deq(lambda z: f(z, images), z0)
    (their_slope,) = torch.autograd.grad(states[-1].square().mean(), W)
    compare("torchdeq, state", states[-1].detach(), z.detach())
    compare("torchdeq, gradient", their_slope, slope)

# %%
# ## The derivative of a fit: jaxopt and torchopt
#
# Ridge regression of the diabetes data: the weights `w*(λ)`, and the derivative of their squared
# norm in `log λ`. Here the fit is a `solve` with `adjoint=Implicit()`; the map is what the weights
# predict and does not depend on `z` ([more on that](4_hyperparameters.md)).

table = load_diabetes()
A = torch.tensor(table.data / table.data.std(axis=0))
y = torch.tensor((table.target - table.target.mean()) / table.target.std())
log_decay = torch.tensor(-2.0, dtype=torch.float64, requires_grad=True)

sol = implicitopt.solve(
    lambda z, w: A @ w,
    lambda z, w: (z - y).square().mean() / 2 + log_decay.exp() / 2 * w.square().sum(),
    torch.zeros(10, dtype=torch.float64),
    torch.zeros(len(y), dtype=torch.float64),
    adjoint=implicitopt.Implicit(),
    tol=1e-10,
    max_steps=500,
)
(decay_slope,) = torch.autograd.grad(sol.x.square().sum(), log_decay)
print(sol, f"derivative {decay_slope:+.6f}")

# %%
# In jaxopt a solver is made of the objective, and what to differentiate in is an argument of `run`.
# The gradient is implicit by default.

if present["jaxopt"]:
    import jax
    import jax.numpy as jnp
    import jaxopt

    with jax.enable_x64(True):

        def ridge(w, log_decay, A, y):
            """The objective."""
            error = jnp.mean((A @ w - y) ** 2) / 2
            return error + jnp.exp(log_decay) / 2 * jnp.sum(w**2)

        fit = jaxopt.LBFGS(ridge, tol=1e-10, maxiter=500)

        def size(log_decay):
            """The squared norm of the weights."""
            found = fit.run(jnp.zeros(10), log_decay, jnp.array(A.numpy()), jnp.array(y.numpy()))
            return jnp.sum(found.params**2)

        compare("jaxopt, derivative", jax.grad(size)(jnp.array(-2.0)), decay_slope)

# %%
# In torchopt you write the loop, and an optimality condition beside it. `custom_root` then gives
# the loop its implicit gradient. That the two belong together is yours to see to.

if present["torchopt"]:
    import torchopt
    from torchopt.diff.implicit import custom_root

    def objective(w, log_decay):
        """The ridge objective."""
        return (A @ w - y).square().mean() / 2 + log_decay.exp() / 2 * w.square().sum()

    @custom_root(
        torch.func.grad(objective),
        argnums=1,
        solve=torchopt.linear_solve.solve_normal_cg(rtol=1e-12),
    )
    def fit_by_hand(w, log_decay):
        w = w.clone().requires_grad_()
        optimizer = torch.optim.LBFGS([w], max_iter=500, tolerance_grad=1e-11, tolerance_change=0)

        def closure():
            optimizer.zero_grad()
            value = objective(w, log_decay)
            value.backward()
            return value

        with torch.enable_grad():
            optimizer.step(closure)
        return w.detach()

    w = fit_by_hand(torch.zeros(10, dtype=torch.float64), log_decay)
    (their_slope,) = torch.autograd.grad(w.square().sum(), log_decay)
    compare("torchopt, derivative", their_slope, decay_slope)

# %%
# ## Optimizing the input of an equilibrium
#
# This is what implicitopt is for, and what none of the three has as one call. Find, for each of the
# 32 problems, the input that brings the state nearest to the state of its digit, with small inputs
# preferred. With an equilibrium layer alone, it is a loop: a solve for the state and one for the
# adjoint at every step.

target = z.detach()
calls = 0


def counted(z, x):
    """The layer, with fixed weights; counts its calls."""
    global calls
    calls += 1
    return torch.tanh(z @ W.detach() + x @ U)


def distance(z, x):
    """One value a problem."""
    return 0.5 * (z - target).square().sum(dim=1) + 0.05 * x.square().sum(dim=1)


x = torch.zeros_like(images, requires_grad=True)
optimizer = torch.optim.Adam([x], lr=0.05)
nested = []
for _ in range(150):
    optimizer.zero_grad()
    at = implicitopt.fixed_point(counted, x, z0, tol=1e-6)  # or deq(...), as above
    value = distance(at, x)
    value.sum().backward()
    optimizer.step()
    nested.append((calls, value.mean().item()))

# %%
# Here it is one call, which moves state, adjoint and input together. The calls of the layer are
# what is compared. Each call here comes with one vector-Jacobian product; the loop needs some more
# of those for its adjoints, which the count leaves out.

with torch.no_grad():
    joint = implicitopt.solve(counted, distance, torch.zeros_like(images), z0, history=True)
print(joint)
print(f"loop of Adam: loss {nested[-1][1]:.4f} after {nested[-1][0]} calls of the layer")
print(f"solve:        loss {joint.value.mean():.4f} after {joint.sweeps.f} calls")

plt.figure(figsize=(6, 3), layout="constrained")
plt.loglog(*np.array(nested).T, label="loop of Adam")
curve = joint.history.value.mean(dim=1)
plt.loglog(np.arange(1, len(curve) + 1), curve.numpy(), label="solve")
plt.xlabel("calls of the layer")
plt.ylabel("loss, mean of 32 problems")
plt.legend(loc="lower left")
plt.show()

# %%
# ## What to try next
#
# - Keep your torchdeq model: hand its layer to `solve` as `f`, and its equilibrium as `z0`.
# - jaxopt's inner and outer problem, with ten hyperparameters and cross-validation:
#   [hyperparameters](4_hyperparameters.md).
# - `implicitopt.Nested(...)` is that loop of any `torch.optim` optimizer as a solver, for
#   comparing.
# - Stay where you are if your inner problem has no equilibrium in it and your program is in JAX.
