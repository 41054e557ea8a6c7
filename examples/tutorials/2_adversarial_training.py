"""
# Adversarial training of an equilibrium classifier

Train a classifier on the images that fool it most. The attack is one solve, and the loss at the
attack already carries the gradient that training needs.

The worst change δ of an image, of a length of at most ε, is an optimization problem over the input:

```text
maximize over δ   cross-entropy(z, label)     subject to   z = f(z, image + δ)   and   ‖δ‖₂ ≤ ε
```

Projected gradient descent (PGD), the usual attack, solves for the equilibrium and its adjoint anew
for each of its steps. Here state, adjoint and δ move together.
"""

# %%
# ## Data and model
#
# MNIST, averaged to 14×14 pixels, if its files are in the folder that `IMPLICITOPT_DATA` names;
# otherwise scikit-learn's 8×8 digits. The model is one layer of 100 units and a linear head. Its
# weight on `z` is scaled to norm 0.8 before each solve, so there always is one equilibrium, and it
# is found fast. That is simpler than the penalty of the other tutorials, and less expressive.

import gzip
import os
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import avg_pool2d, cross_entropy

import implicitopt

torch.manual_seed(0)
folder = Path(os.environ.get("IMPLICITOPT_DATA", "."), "mnist")
if folder.is_dir():

    def read(name, offset):
        """The bytes of an idx file after its header."""
        raw = bytearray(gzip.decompress((folder / name).read_bytes()))
        return torch.frombuffer(raw, dtype=torch.uint8, offset=offset)

    pixels = read("train-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28)[:3000] / 255
    images = avg_pool2d(pixels[:, None], 2).flatten(1)
    labels = read("train-labels-idx1-ubyte.gz", 8)[:3000].long()
else:
    data = load_digits()
    images = torch.tensor(data.data / 16, dtype=torch.float32)
    labels = torch.tensor(data.target)
pixels, width = images.shape[1], 100
side = round(pixels**0.5)
train, test = slice(0, -200), slice(-200, None)
print(f"{len(images[train])} images of {side}×{side} pixels to train on, 200 to test on")


class Model(nn.Module):
    """Logits from the state z = f(z, image)."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Parameter(torch.randn(width, width))
        self.enter, self.head = nn.Linear(pixels, width), nn.Linear(width, 10)

    def layer(self):
        """f, a contraction: the weight on z is scaled to norm 0.8."""
        weight = 0.8 * self.mix / torch.linalg.matrix_norm(self.mix, 2)
        return lambda z, image: torch.tanh(z @ weight + self.enter(image))

    def start(self, image):
        return image.new_zeros(len(image), width)

    def forward(self, image):
        return self.head(implicitopt.fixed_point(self.layer(), image, self.start))


# %%
# ## The attack
#
# `project` keeps δ in the ball, problem by problem, and `maximize` turns the problem around. The
# loss returns one value an image, so each image is a problem of its own.

radius = 0.6


def attack(model, image, label, radius=radius, sweeps=10):
    """The solution: δ is its `x`, the attacked cross-entropy its `value`."""
    f = model.layer()
    return implicitopt.solve(
        lambda z, delta: f(z, image + delta),
        lambda z, delta: cross_entropy(model.head(z), label, reduction="none"),
        torch.zeros_like(image),
        model.start,
        project=implicitopt.L2Ball(radius),
        maximize=True,
        max_steps=sweeps,
    )


# %%
# ## Training, plain and robust
#
# Plain training takes the loss at the image itself. Robust training takes it at the attacked image,
# `sol.value`. Its gradient in the weights needs no pass through the attack: at the maximum a small
# change of δ does not change the loss to first order, or leads out of the ball (Danskin's theorem;
# for equilibria it is the envelope theorem of the [theory](../theory.md)).
#
# Both get the same number of steps. The radius grows in the first half of the robust training: a
# model that knows nothing yet learns little from images that are already spoiled.


def fit(robust, steps=200):
    """A trained model."""
    torch.manual_seed(1)
    model = Model()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        rows = torch.randperm(len(images[train]))[:128]
        image, label = images[rows], labels[rows]
        if robust:
            grown = radius * min(1, (step + 1) / (steps / 2))
            loss = attack(model, image, label, grown).value.mean()
        else:
            loss = cross_entropy(model(image), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.requires_grad_(False)


models = {"plain": fit(robust=False), "robust": fit(robust=True)}

# %%
# ## An independent referee
#
# A model trained against one attack may be weak against another. So the judge is PGD, written here
# in plain PyTorch: steps along the normalized gradient of the true equilibrium's loss, each after a
# whole solve. The image must survive both attacks.


def pgd(model, image, label, radius, steps=10):
    """δ by projected gradient ascent."""
    project = implicitopt.L2Ball(radius)
    delta = torch.zeros_like(image)
    f = model.layer()
    for _ in range(steps):
        delta.requires_grad_()
        z = implicitopt.fixed_point(f, image + delta, model.start, tol=1e-3)
        loss = cross_entropy(model.head(z), label, reduction="sum")
        (slope,) = torch.autograd.grad(loss, delta)
        length = slope.norm(dim=1, keepdim=True).clamp(min=1e-12)
        delta = project(delta.detach() + 0.2 * radius * slope / length)
    return delta


def right(model, image, label):
    """Which images are classified rightly."""
    with torch.no_grad():
        return model(image).argmax(dim=1) == label


image, label = images[test], labels[test]
table = {}
for name, model in models.items():
    clean = right(model, image, label)
    with torch.no_grad():
        joint = right(model, image + attack(model, image, label, sweeps=30).x, label)
    referee = right(model, image + pgd(model, image, label, radius), label)
    table[name] = [part.double().mean().item() for part in (clean, joint, referee, joint & referee)]

print(f"accuracy, ε = {radius}   clean    joint      PGD     both")
for name, row in table.items():
    print(f"{name:<14}" + "".join(f"{100 * share:>9.1f}" for share in row))

# %%
# The robust model may lose a little on clean images, and keeps more of them when attacked. The same
# over a range of radii, by the referee:

radii = [0.0, 0.3, 0.6, 0.9, 1.2]
curves = {
    name: [
        right(model, image + pgd(model, image, label, r), label).double().mean().item()
        for r in radii
    ]
    for name, model in models.items()
}
plt.figure(figsize=(5, 3), layout="constrained")
for name, curve in curves.items():
    plt.plot(radii, curve, "o-", label=f"{name} training")
plt.xlabel("radius ε of the attack")
plt.ylabel("accuracy under PGD")
plt.legend()
plt.show()

# %%
# ## What an attack looks like
#
# For each model the change and the attacked image, with what the model then says. What fools a
# plainly trained model looks like noise; what fools a robust one has to change the drawing.

count = 8
_, axes = plt.subplots(5, count, figsize=(8, 5.2), layout="constrained")
lines = {"image": (image, None)}
for name, model in models.items():
    delta = pgd(model, image, label, radius)
    lines[f"{name}: δ"] = (delta, None)
    with torch.no_grad():
        lines[f"{name}: attacked"] = (image + delta, model(image + delta).argmax(dim=1))
for line, (name, (rows, said)) in zip(axes, lines.items(), strict=True):
    lowest = -0.5 if "δ" in name else 0
    for i, axis in enumerate(line):
        picture = rows[i].reshape(side, side).numpy()
        axis.imshow(picture, cmap="gray_r", vmin=lowest, vmax=0.5 if "δ" in name else 1)
        axis.set(xticks=[], yticks=[])
        if said is not None:
            wrong = said[i] != label[i]
            axis.set_xlabel(f"{said[i].item()}", color="crimson" if wrong else "black")
    line[0].set_ylabel(name, rotation=0, ha="right", va="center")
plt.show()

# %%
# ## What to try next
#
# - Another ball: `implicitopt.LinfBall(0.1)`, in `attack` and in `pgd`.
# - The attacked image may leave [0, 1]. Clamp it inside of `f`:
#   `f(z, (image + delta).clamp(0, 1))`.
# - A sure classifier's cross-entropy has hardly a gradient left. `examples/attacks/attack.py`
#   maximizes its logarithm, which has the same maximum.
# - Convolutional models, MNIST and CIFAR-10 at full size, and an attack by others as a referee:
#   `examples/adversarial.py`.
