"""
# Invert a generator

Train a small equilibrium generator of handwritten digits. Then find the code of an image it has
never seen, and use that code to fill in half an image and to walk from one digit to another.

The generator has no stack of layers. It has one layer, `f(z, x)`, which is given the latent code
`x` of an image. The state `z` at which the layer does not change any more, `z = f(z, x)`, is what
the image is read from. To *invert* it is to find the code whose image is nearest to a target:

```text
minimize over x   ‖image(z) − target‖² + λ/2 ‖x‖²     subject to   z = f(z, x)
```

There is no encoder. One call of `implicitopt.solve` does this, for a whole batch of images at once.
"""

# %%
# ## The data
#
# MNIST, if its files are in the folder that the environment variable `IMPLICITOPT_DATA` names.
# Otherwise the 8×8 digits that come with scikit-learn, so that the page runs anywhere.

import gzip
import os
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn

import implicitopt

torch.manual_seed(0)
file = Path(os.environ.get("IMPLICITOPT_DATA", "."), "mnist", "train-images-idx3-ubyte.gz")
if file.is_file():
    raw = bytearray(gzip.decompress(file.read_bytes()))
    images = torch.frombuffer(raw, dtype=torch.uint8, offset=16).reshape(-1, 28, 28)[:1200] / 255
else:
    images = torch.tensor(load_digits().images / 16, dtype=torch.float32)
train, held_out = images[:-64], images[-64:]
side = images.shape[-1]
print(f"{len(train)} images of {side}×{side} pixels to train on, {len(held_out)} held out")

# %%
# ## The generator
#
# A code of 24 numbers enters one layer of 160 units. Any layer would do, if it takes `z` to a
# tensor of the same shape and is, near the solutions, a contraction in `z`. A small initial weight
# sees to that at the start, and a penalty in the training loop keeps it so.

latent, width = 24, 160
mix, enter = nn.Linear(width, width), nn.Linear(latent, width)
head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, side * side))
nn.init.normal_(mix.weight, std=0.5 / width**0.5)
nn.init.normal_(enter.weight, std=0.4)


def f(z, x):
    """The layer, (B, width) -> (B, width)."""
    return torch.tanh(mix(z) + enter(x))


def image(z):
    """The image in a state, (B, side, side)."""
    return head(z).sigmoid().unflatten(1, (side, side))


def start(x):
    """A state to start from."""
    return x.new_zeros(len(x), width)


def matching(target, visible=1.0):
    """The loss of target images: one value an image, over the visible pixels."""

    def loss(z, x):
        error = visible * (image(z) - target) ** 2
        return error.sum(dim=(1, 2)) + 0.01 * x.square().sum(dim=1)  # λ = 0.02

    return loss


# %%
# ## Training
#
# For each batch, find the codes, then improve the weights *at those codes*. The loss at the
# solution, `sol.value`, is differentiable in every parameter that `f` and the loss read, and that
# takes no backward pass through the solve: at the optimum a small change of the code does not
# change the loss, so only the direct effect of the weights is left (the envelope theorem, see
# [gradients](../gradients.md)).
#
# Fifteen sweeps a batch are enough, since each image keeps its code: the next visit goes on from
# there. For so few the joint iteration is the one to take: its steps cost less than the default's,
# which builds a model of the layer first ([choosing](../choosing.md)). `jacobian_penalty` measures
# `‖∂f/∂z‖²` at a point of the solver's path, `sol.iterate`, and keeps the layer contractive.
# Without such a penalty training tends to make the layer more and more expansive, until the
# equilibrium is no longer found.

parameters = [p for module in (mix, enter, head) for p in module.parameters()]
optimizer = torch.optim.Adam(parameters, lr=1e-2)
steps, losses = 200, []
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
codes = torch.zeros(len(train), latent)
for _ in range(steps):
    rows = torch.randperm(len(train))[:64]
    sol = implicitopt.solve(
        f, matching(train[rows]), codes[rows], start, max_steps=15, solver=implicitopt.Joint(),
        sample_iterate=True,
    )  # fmt: skip
    codes[rows] = sol.x.detach()
    penalty = implicitopt.jacobian_penalty(f, *sol.iterate).mean() / width
    optimizer.zero_grad()
    (sol.value.mean() + 10 * penalty).backward()
    optimizer.step()
    schedule.step()
    losses.append(sol.value.mean().item() / side**2)
print(f"loss per pixel: {losses[0]:.3f} at first, {sum(losses[-20:]) / 20:.4f} at last")

plt.figure(figsize=(6, 2.5), layout="constrained")
plt.semilogy(losses)
plt.xlabel("training step")
plt.ylabel("loss per pixel")
plt.show()

# %%
# ## The codes of new images
#
# `x0` is where the search starts, here from zeros, and `max_steps` bounds the sweeps. The weights
# are fixed now, and `no_grad` leaves out what `sol.value` needs for its gradient.
#
# To judge the codes, forget the state that the solver found and compute the equilibrium of each
# code anew, with `fixed_point`. What is measured is then what the generator really draws.


def codes_of(target, visible=1.0, sweeps=100):
    """The codes whose images are nearest to the target, as a Solution."""
    x0 = torch.zeros(len(target), latent)
    with torch.no_grad():
        return implicitopt.solve(f, matching(target, visible), x0, start, max_steps=sweeps)


def draw(x):
    """The images of codes."""
    with torch.no_grad():
        return image(implicitopt.fixed_point(f, x, start))


def psnr(shown, wanted, where=1.0):
    """Decibels, over the pixels where `where` is 1."""
    weight = where * torch.ones_like(wanted)
    return -10 * ((weight * (shown - wanted) ** 2).sum() / weight.sum()).log10().item()


average = train.mean(dim=0).expand_as(held_out)
print(f"the average training image: {psnr(average, held_out):.1f} dB")
for sweeps in (10, 25, 50, 100):
    sol = codes_of(held_out, sweeps=sweeps)
    print(f"{sweeps:>3} sweeps: {psnr(draw(sol.x), held_out):.1f} dB   {sol}")

# %%
# `repr(sol)` says how a solve went, and `sol.status` says it for each image. Most end with
# `MAX_STEPS`, not `CONVERGED`: the tolerance is one on the optimality conditions, and in the flat
# directions of a code these are met long after the image has all but stopped changing, as the
# decibels show. Stop when what you need no longer improves.

reconstructed = draw(sol.x)


def show(rows, count=10):
    """Rows of images."""
    size = (count * 0.75, len(rows) * 0.8)
    _, axes = plt.subplots(len(rows), count, figsize=size, layout="constrained")
    for line, (name, pictures) in zip(axes, rows.items(), strict=True):
        for axis, picture in zip(line, pictures, strict=False):
            axis.imshow(picture.numpy(), cmap="gray_r", vmin=0, vmax=1)
            axis.set(xticks=[], yticks=[])
        line[0].set_ylabel(name, rotation=0, ha="right", va="center")
    plt.show()


show({"target": held_out, "reconstruction": reconstructed})

# %%
# ## Inpainting
#
# Hide the lower half. The generator stays as it is; only the loss changes, and counts the pixels
# that can be seen. The code that explains the upper half also says what the lower half should be.
# Several digits may share an upper half, so the answer is plausible, and not always the truth.

visible = torch.ones(side, side)
visible[side // 2 :] = 0
inpainted = draw(codes_of(held_out, visible).x)
hidden = 1 - visible
print(f"hidden half, average image: {psnr(average, held_out, hidden):.1f} dB")
print(f"hidden half, inpainted:     {psnr(inpainted, held_out, hidden):.1f} dB")
show({"given": held_out * visible + 0.3 * hidden, "inpainted": inpainted, "target": held_out})

# %%
# ## Between two codes
#
# A straight line between two codes is a path of images, each one an equilibrium of its own.

share = torch.linspace(0, 1, 10)[:, None]
show({f"{i} → {i + 1}": draw((1 - share) * sol.x[i] + share * sol.x[i + 1]) for i in (0, 2, 4)})

# %%
# ## What to try next
#
# - A shorter code (`latent = 4`) draws blurrier digits, but fills in the hidden half more safely.
# - Noise instead of a hole: `codes_of(held_out + 0.3 * torch.randn_like(held_out))`.
# - Start where the last solve ended, with `warm_start=sol`, after a small change of the target.
# - A convolutional, multiscale generator of digits is `examples/quickstart.py`; of faces,
#   `examples/generative.py`.
# - Train the generator *for* inpainting: see [supervised inverse problems](7_inverse_problems.md).
