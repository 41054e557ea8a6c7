"""
# Supervised inverse problems with full double backprop

Learn to restore images whose pixels are mostly missing. The restoration is itself an optimization
problem, and training differentiates through its solution, the code included.

Given the visible pixels of an image, the restored image is that of the best code:

```text
x* = argmin over x   ‖visible · (image(z) − given)‖² + λ/2 ‖x‖²     subject to   z = f(z, x)
outer loss           ‖image(z*) − clean‖²
```

The outer loss counts *all* pixels, the inner one only those that can be seen. They differ, so the
envelope gradient of `sol.value` is not what is needed here. What is needed is how `z*` and `x*`
move with the weights.
"""

# %%
# ## Two gradients
#
# `Implicit()` differentiates the solution of the whole optimality system (KKT). That system holds
# first derivatives of `f` already, so its derivative holds second ones: double backprop. No matrix
# is formed: one linear system a batch is solved with products alone.
#
# `FrozenInput()` holds the code `x*` constant and differentiates only `z*`. It is cheaper, and
# biased: it is blind to how the weights, and λ, move the code.
#
# The data are scikit-learn's handwritten digits. Float64, so that the gradients can be checked.

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits

import implicitopt

torch.manual_seed(0)
images = torch.tensor(load_digits().data / 16)  # float64
images = images[torch.randperm(len(images))]
train, held_out = images[:1500], images[1500:1564]
latent, width, pixels = 12, 64, 64


def parameters():
    """The weights, and λ through its logarithm."""
    made = {
        "mix": 0.4 * torch.randn(width, width) / width**0.5,
        "enter": torch.randn(latent, width) / latent**0.5,
        "bias": torch.zeros(width),
        "head": torch.randn(width, pixels) / width**0.5,
        "average": train.mean(dim=0),
        "log_decay": torch.tensor(0.0),
    }
    return {name: value.double().requires_grad_() for name, value in made.items()}


def hide(clean, share=0.6):
    """What can be seen: each pixel with a chance of 1 − share; and a little noise."""
    visible = (torch.rand_like(clean) > share).double()
    return visible * (clean + 0.05 * torch.randn_like(clean)), visible


def restore(p, given, visible, adjoint=None, **options):
    """The solution of the inner problem, and the restored images."""
    sol = implicitopt.solve(
        lambda z, x: torch.tanh(z @ p["mix"] + x @ p["enter"] + p["bias"]),
        lambda z, x: (
            (visible * (z @ p["head"] + p["average"] - given) ** 2).sum(dim=1)
            + p["log_decay"].exp() / 2 * x.square().sum(dim=1)
        ),
        given.new_zeros(len(given), latent),
        given.new_zeros(len(given), width),
        adjoint=adjoint,
        **options,
    )
    return sol, sol.z @ p["head"] + p["average"]


# %%
# ## Which gradient is right?
#
# Finite differences tell. Move all weights a little along a random direction, solve anew, and see
# by how much the outer loss changes. Everything is solved tightly for this comparison.

p = parameters()
clean = train[:16]
given, visible = hide(clean)
direction = {name: torch.randn_like(value) / value.numel() ** 0.5 for name, value in p.items()}
tight = {"tol": 1e-10, "max_steps": 2000}


def outer(p, adjoint=None):
    """The outer loss."""
    _, restored = restore(p, given, visible, adjoint, **tight)
    return (restored - clean).square().sum(dim=1).mean()


h = 1e-5
with torch.no_grad():
    ahead = outer({name: value + h * direction[name] for name, value in p.items()})
    behind = outer({name: value - h * direction[name] for name, value in p.items()})
slopes = {"finite differences": ((ahead - behind) / (2 * h)).item()}
decay_slopes = {}
for adjoint in (implicitopt.Implicit(), implicitopt.FrozenInput()):
    name = type(adjoint).__name__
    gradient = torch.autograd.grad(
        outer(p, adjoint), list(p.values()), allow_unused=True, materialize_grads=True
    )
    slopes[name] = sum(
        (g * d).sum().item() for g, d in zip(gradient, direction.values(), strict=True)
    )
    decay_slopes[name] = gradient[-1].item()
for name, slope in slopes.items():
    print(f"{name:<20}{slope:+.8f}")
print("derivative in log λ:", decay_slopes)
assert abs(slopes["Implicit"] - slopes["finite differences"]) < 1e-6
assert abs(slopes["FrozenInput"] - slopes["finite differences"]) > 1e-3

# %%
# `Implicit` agrees with the finite difference, and `FrozenInput` does not. Its derivative in λ is
# nothing at all: λ acts on the code alone, so with a frozen code it cannot be learned.

# %%
# ## Training
#
# Training needs no eight digits. A looser solve, and a linear system solved to 1 %, are enough.
# λ is trained along with the weights where there is a gradient for it.


def fit(adjoint, steps=60):
    """Trained parameters, and the outer loss of each step."""
    torch.manual_seed(1)
    p = parameters()
    optimizer = torch.optim.Adam(p.values(), lr=2e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses = []
    for _ in range(steps):
        clean = train[torch.randperm(len(train))[:32]]
        sol, restored = restore(p, *hide(clean), adjoint, tol=1e-4, max_steps=40)
        loss = (restored - clean).square().mean()
        penalty = implicitopt.jacobian_penalty(
            lambda z, x: torch.tanh(z @ p["mix"] + x @ p["enter"] + p["bias"]),
            sol.z.detach(),
            sol.x.detach(),
        )
        optimizer.zero_grad()
        (loss + 0.01 * penalty.mean() / width).backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return {name: value.detach() for name, value in p.items()}, losses


adjoints = {
    "Implicit": implicitopt.Implicit(tol=1e-2, max_steps=100),
    "FrozenInput": implicitopt.FrozenInput(tol=1e-2, max_steps=100),
}
trained = {name: fit(adjoint) for name, adjoint in adjoints.items()}

# %%
# ## Held-out images
#
# The same hidden pixels for both. The baseline fills them in with the average training image.


def psnr(shown):
    """Decibels over all pixels."""
    return -10 * (shown - held_out).square().mean().log10().item()


torch.manual_seed(2)
given, visible = hide(held_out)
shown = {"average": given * visible + (1 - visible) * train.mean(dim=0)}
for name, (p, _) in trained.items():
    with torch.no_grad():
        sol, shown[name] = restore(p, given, visible, max_steps=200)
    print(f"{name:<14}{psnr(shown[name]):.2f} dB   λ = {p['log_decay'].exp():.3f}   {sol}")
print(f"{'average':<14}{psnr(shown['average']):.2f} dB")

plt.figure(figsize=(6, 3), layout="constrained")
for name, (_, losses) in trained.items():
    plt.semilogy(torch.tensor(losses).unfold(0, 10, 1).mean(dim=1).numpy(), label=name)
plt.xlabel("training step")
plt.ylabel("outer loss, mean of 10 steps")
plt.legend()
plt.show()

# %%
# In these few steps the biased gradient trains at least as good a restorer: the weights make up for
# what it does not see. What it cannot do is to learn λ, which stayed where it began, at 1. Which
# gradient a task needs is a matter of measuring, as here.

count = 10
seen = torch.where(visible > 0, given, torch.nan)
lines = {"clean": held_out, "given": seen, **{name: shown[name] for name in trained}}
_, axes = plt.subplots(len(lines), count, figsize=(8, 3.4), layout="constrained")
colors = plt.get_cmap("gray_r").with_extremes(bad="lightsteelblue")
for line, (name, rows) in zip(axes, lines.items(), strict=True):
    for axis, row in zip(line, rows, strict=False):
        axis.imshow(row.reshape(8, 8).numpy(), cmap=colors, vmin=0, vmax=1)
        axis.set(xticks=[], yticks=[])
    line[0].set_ylabel(name, rotation=0, ha="right", va="center")
plt.show()

# %%
# ## When it is hard
#
# The linear system is as ill-conditioned as the inner problem: where the code is hardly
# determined, neither is its derivative. `sol.adjoint` says after each backward pass how the system
# went, and one that failed warns. A larger λ helps, and so does a tighter inner solve. For the
# untrained weights λ makes little difference to the steps:

for decay in (1.0, 0.01):
    p = dict(parameters(), log_decay=torch.tensor(decay).double().log())
    sol, restored = restore(p, given, visible, implicitopt.Implicit(tol=1e-6), **tight)
    restored.sum().backward()
    steps = sol.adjoint.steps.double().median().item()
    print(f"λ = {decay:<5} steps of the linear solve, median: {steps:.0f}")

# %%
# ## What to try next
#
# - Other damage: noise, blur, a downsampled image. Only `hide` and the inner loss change.
# - Start from a generator trained without supervision, as in the
#   [first tutorial](1_invert_a_generator.md), and train on.
# - A weight for each pixel's residual instead of one λ, learned by the same gradient.
# - The same on faces, with a convolutional generator: `examples/inverse_problems.py`.
