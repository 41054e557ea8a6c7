"""
# Write your own accelerator

An accelerator turns a fixed-point iteration that converges slowly into one that converges fast.
Write one in fifteen lines, give it to the solver and to `fixed_point`, and measure it against
those that are built in, on handwritten digits.

An accelerator is an object with two methods. It sees matrices of shape `(B, n)`, a row for each
problem, and nothing of what the numbers mean:

| method | called | returns |
|---|---|---|
| `init(v)` | once, with the first iterate | the state: whatever `step` needs to remember |
| `step(state, v, Fv)` | after each evaluation `Fv = F(v)` | the next iterate, and the new state |
"""

# %%
# ## The idea
#
# The plain iteration is `v ← v + r` with the residual `r = F(v) − v`. A longer or a shorter step,
# `v ← v + ω r`, may do better, and two iterates are enough to guess how long: if `r` is linear
# along the last step `Δv`, then the `ω` that would have made the new residual smallest is
#
# ```text
# ω = − ⟨Δv, Δr⟩ / ⟨Δr, Δr⟩
# ```
#
# which is the step length of Barzilai and Borwein (1988). Two rules matter. Each problem has its
# own `ω`: no sum or mean over dimension 0. And where there is no `ω` to be had (in the first step,
# or where `Δr` is 0) choose with `torch.where`, never by multiplying with a mask: `0 * nan` is
# `nan`.

from dataclasses import dataclass

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits

import implicitopt


@dataclass(frozen=True)
class BarzilaiBorwein:
    """v ← v + ω (F(v) − v), with ω from the last two iterates."""

    longest: float = 3.0

    def init(self, v):
        return None  # no iterate yet

    def step(self, state, v, Fv):
        r = Fv - v
        omega = torch.ones_like(v[:, :1])
        if state is not None:
            dv, dr = v - state[0], r - state[1]
            square = (dr * dr).sum(dim=1, keepdim=True)
            omega = -(dv * dr).sum(dim=1, keepdim=True) / torch.where(square > 0, square, 1.0)
            omega = torch.where((square > 0) & (omega > 0), omega.clamp(max=self.longest), 1.0)
        return v + omega * r, (v, r)


# %%
# ## On a fixed point
#
# An equilibrium layer of 100 units reads 64 digits. Its weight has norm 0.95, so the plain
# iteration may shrink the residual by as little as 5 % a step. `fixed_point` takes an accelerator;
# let it count how often each calls the layer.

torch.manual_seed(0)
images = torch.tensor(load_digits().data[:64] / 16, dtype=torch.float64)
W = torch.randn(100, 100, dtype=torch.float64)
W = 0.95 * (W + W.T) / torch.linalg.matrix_norm(W + W.T, 2)
U = torch.randn(64, 100, dtype=torch.float64) / 8
z0 = torch.zeros(64, 100, dtype=torch.float64)
calls = 0


def f(z, x):
    """The layer."""
    global calls
    calls += 1
    return torch.tanh(z @ W + x @ U)


accelerators = {
    "Picard": implicitopt.Picard(),
    "Barzilai–Borwein": BarzilaiBorwein(),
    "Broyden": implicitopt.Broyden(),
    "Anderson": implicitopt.Anderson("II"),
}
counts, states = {}, {}
with torch.no_grad():
    for name, accelerator in accelerators.items():
        calls = 0
        states[name] = implicitopt.fixed_point(
            f, images, z0, accelerator=accelerator, tol=1e-10, max_steps=500
        )
        counts[name] = calls
        print(f"{name:<18}{calls:>4} calls of the layer")
assert all((states[name] - states["Picard"]).abs().max() < 1e-7 for name in states)

# %%
# Fifteen lines save half of the calls. All find the same states, and the gradient does not depend
# on the accelerator at all: it comes from the implicit function theorem at the fixed point, not
# from the steps that led there.

# %%
# ## In the joint iteration
#
# `Joint` runs on the state, the adjoint and the input side by side: a row is `(z, μ, x)`. The
# problem: find an image that puts the layer into a given state, the mean state of the digit's
# class, and stay small.

labels = torch.tensor(load_digits().target[:64])
means = torch.stack([states["Picard"][labels == digit].mean(dim=0) for digit in range(10)])


def loss(z, x):
    """One value a problem."""
    return 0.5 * (z - means[labels]).square().sum(dim=1) + 0.5 * x.square().sum(dim=1)


curves, solutions = {}, {}
for name, accelerator in accelerators.items():
    with torch.no_grad():
        sol = implicitopt.solve(
            f,
            loss,
            torch.zeros_like(images),
            z0,
            solver=implicitopt.Joint(accelerator),
            tol=1e-8,
            max_steps=300,
            history=True,
        )
    solutions[name] = sol
    curves[name] = sol.history.residuals.total.median(dim=1).values
    print(f"{name:<18}{sol}")

plt.figure(figsize=(6, 3.2), layout="constrained")
for name, curve in curves.items():
    plt.semilogy(curve, label=name)
plt.xlabel("sweep")
plt.ylabel("KKT residual, median")
plt.legend()
plt.show()

# %%
# Here neither the plain iteration nor ours settles. Their maps are not contractive: the input
# moves before the state and the adjoint have caught up. One number `ω` for a whole row, in which
# three kinds of unknowns lie side by side, is little to go by. The built-in accelerators remember
# more than one pair of iterates and find the solution. `sol.status` told, and nothing was silently
# wrong.

# %%
# ## One problem must not disturb another
#
# A NaN in one problem's data must leave the others bit for bit as they are. Test yours like this.

spoiled = images.clone()
spoiled[5] = torch.nan
with torch.no_grad():
    v = torch.zeros_like(z0)
    both = []
    for x in (images, spoiled):
        accelerator = BarzilaiBorwein()
        state, at = accelerator.init(v), v
        for _ in range(20):
            at, state = accelerator.step(state, at, f(at, x))
        both.append(at)
others = torch.arange(64) != 5
assert torch.equal(both[0][others], both[1][others])
print("the other 63 problems are bit for bit the same")

# %%
# ## What to try next
#
# - Alternate the step length with its twin `ω = − ⟨Δv, Δv⟩ / ⟨Δv, Δr⟩`, which is longer.
# - An optional third method, `restart(state, mask)`, lets `Joint` make one problem forget its past
#   after a non-finite value: [your own accelerator](../accelerators.md) has an example.
# - Keep a window: `implicitopt/accelerators/anderson.py` is the built-in one, and `broyden.py`
#   beside it is shorter.
# - `implicitopt.check` measures how contractive your own layer is, which tells what to expect.
