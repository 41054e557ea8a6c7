"""
# Meta-learning: few-shot characters

Learn a new alphabet's letters from one drawing each. A task is learned by one solve, for a vector
that says what the task is. The weights learn, over many tasks, to make that solve useful.

A *task* shows five characters in one drawing each, the support, and asks which of the five some
other drawings are, the queries. The weights are shared by all tasks. What is a task's own is `x`:

```text
x* = argmin over x   cross-entropy(support; z, x) + λ/2 ‖x‖²     subject to   z = f(z, x; support)
```

where `z` are the states of the task's drawings. Then the queries' equilibrium under `x*` gives
their answers, and the outer loss is the cross-entropy of these.
"""

# %%
# ## Characters
#
# Omniglot, if it is in the folder that `IMPLICITOPT_DATA` names: 60 characters drawn by 20 people
# each to train on, and 60 characters of other alphabets to test on. Otherwise printed letters,
# drawn from the fonts that come with matplotlib: Latin to train on, Greek to test on.

import io
import os
import zipfile
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torch.nn.functional import cross_entropy, normalize

import implicitopt

torch.manual_seed(0)
folder = Path(os.environ.get("IMPLICITOPT_DATA", "."), "omniglot")


def omniglot(part, count=60, size=20):
    """Every 10th character of a part: (count, 20, size²), ink is 1."""
    with zipfile.ZipFile(folder / f"images_{part}.zip") as archive:
        names = sorted(name for name in archive.namelist() if name.endswith(".png"))
        names = np.array(names).reshape(-1, 20)[::10][:count]
        drawings = [Image.open(io.BytesIO(archive.read(name))) for name in names.flat]
        small = [np.array(d.convert("L").resize((size, size), Image.BOX)) for d in drawings]
    return 1 - torch.tensor(np.stack(small)).reshape(-1, 20, size**2) / 255


def printed(letters, size=20):
    """Letters in 20 styles: 8 fonts, shifted and scaled. (letters, 20, size²), ink is 1."""
    fonts = Path(matplotlib.get_data_path(), "fonts", "ttf")
    styles = ["", "-Bold", "-Oblique", "-BoldOblique"]
    files = [f"DejaVuSans{s}.ttf" for s in styles] + [f"DejaVuSansMono{s}.ttf" for s in styles]
    random = np.random.default_rng(0)
    drawn = []
    for letter in letters:
        for k in range(20):
            paper = Image.new("L", (size, size))
            font = ImageFont.truetype(str(fonts / files[k % 8]), int(random.integers(14, 18)))
            place = (size / 2 + random.integers(-1, 2), size / 2 + random.integers(-1, 2))
            ImageDraw.Draw(paper).text(place, letter, 255, font, anchor="mm")
            drawn.append(np.array(paper))
    return torch.tensor(np.stack(drawn)).reshape(-1, 20, size**2) / 255


if folder.is_dir():
    train, test = omniglot("background"), omniglot("evaluation")
else:
    train = printed("ABCDEFGHIJKLMNOPQRSTUVWXYZabdefghijklmnqrt")
    test = printed("ΓΔΘΛΞΠΣΦΨΩαβγδεζηθλμξπρστφχψω")
print(f"{len(train)} characters to train on, {len(test)} to test on, 20 drawings of each")

# %%
# ## Tasks
#
# A batch of tasks: for each, five characters, one drawing to learn from and three to be asked
# about.

ways, queries = 5, 3


def tasks(characters, count):
    """Support (T, 5, pixels) and queries (T, 15, pixels), with their labels."""
    chosen = torch.rand(count, len(characters)).argsort(dim=1)[:, :ways]
    drawers = torch.rand(count, ways, 20).argsort(dim=2)[:, :, : 1 + queries]
    drawings = characters[chosen[:, :, None], drawers]  # (T, 5, 4, pixels)
    labels = torch.arange(ways).expand(count, ways)
    query_labels = labels.repeat_interleave(queries, dim=1)
    return drawings[:, :, 0], labels, drawings[:, :, 1:].flatten(1, 2), query_labels


support, _, asked, _ = tasks(test, 1)
_, axes = plt.subplots(1 + queries, ways, figsize=(4, 3.4), layout="constrained")
for k, axis in enumerate(axes.T.flat):
    way, row = divmod(k, 1 + queries)
    drawing = support[0, way] if row == 0 else asked[0, way * queries + row - 1]
    axis.imshow(drawing.reshape(20, 20).numpy(), cmap="gray_r")
    axis.set(xticks=[], yticks=[])
axes[0, 0].set_ylabel("learn", rotation=0, ha="right", va="center")
axes[1, 0].set_ylabel("ask", rotation=0, ha="right", va="center")
plt.show()

# %%
# ## The model
#
# A task is one problem: its state `z` holds all of its drawings, `(T, drawings, units)`, and `x`
# is a dict of two tensors, as any pytree will do. `"shift"` enters the equilibrium and tunes the
# features; `"classes"` holds a direction for each class, which the logits are read with. Both are
# 0 at first.

units, sharpness = 96, 10.0
embed = nn.Sequential(
    nn.Unflatten(1, (1, 20, 20)),
    nn.Conv2d(1, 16, 5, stride=2, padding=2),
    nn.ReLU(),
    nn.Conv2d(16, 32, 3, stride=2, padding=1),
    nn.ReLU(),
    nn.Flatten(),
    nn.Linear(32 * 5 * 5, units),
)
mix, tune = nn.Parameter(torch.randn(units, units)), nn.Linear(16, units, bias=False)
parameters = [*embed.parameters(), mix, *tune.parameters()]


def layer(images):
    """f(z, x) of some drawings, which are embedded here once. ‖weight‖ = 0.8: a contraction."""
    weight = 0.8 * mix / torch.linalg.matrix_norm(mix, 2)
    entered = embed(images.flatten(0, 1)).unflatten(0, images.shape[:2])
    return lambda z, x: torch.tanh(z @ weight + entered + tune(x["shift"])[:, None])


def logits(z, x):
    """(T, drawings, ways)."""
    return sharpness * normalize(z, dim=2) @ x["classes"].mT


def mean_cross_entropy(answers, labels):
    """One value a task."""
    return cross_entropy(answers.mT, labels, reduction="none").mean(dim=1)


def start(images):
    """A state to start from."""
    return images.new_zeros(*images.shape[:2], units)


# %%
# ## Learning a task
#
# One solve for all tasks of a batch. Each task has its own step sizes and its own convergence.


def learn(images, labels, sweeps=15, **options):
    """The vectors x* of tasks, in a Solution."""

    def loss(z, x):
        decay = 0.05 * (x["shift"].square().sum(dim=1) + x["classes"].square().sum(dim=(1, 2)))
        return mean_cross_entropy(logits(z, x), labels) + decay

    count = len(images)
    x0 = {"shift": torch.zeros(count, 16), "classes": torch.zeros(count, ways, units)}
    return implicitopt.solve(
        layer(images), loss, x0, start(images), max_steps=sweeps, tol=1e-3, **options
    )


def answer(images, x):
    """The logits of drawings under what was learned."""
    return logits(implicitopt.fixed_point(layer(images), x, start(images), tol=1e-3), x)


def accuracy(count=100):
    """The share of right answers on tasks of characters never seen."""
    torch.manual_seed(7)
    support, labels, asked, wanted = tasks(test, count)
    with torch.no_grad():
        found = answer(asked, learn(support, labels, sweeps=40).x).argmax(dim=2)
    return (found == wanted).double().mean().item()


before = accuracy()
print(f"untrained: {100 * before:.1f} % right; by chance it would be 20 %")

# %%
# ## Learning to learn
#
# The outer loss is the queries', and not the inner loss of the support. Its gradient reaches the
# weights through the queries' equilibrium, by the implicit function theorem: `fixed_point` does
# that. What was learned, `x*`, is held constant, as in the paper. So the weights learn features
# under which what was found fits the queries; they do not see how they change what is found.

optimizer = torch.optim.Adam(parameters, lr=2e-3)
losses = []
torch.manual_seed(1)
for _ in range(80):
    support, labels, asked, wanted = tasks(train, 16)
    with torch.no_grad():
        x = learn(support, labels).x
    outer = mean_cross_entropy(answer(asked, x), wanted).mean()
    optimizer.zero_grad()
    outer.backward()
    optimizer.step()
    losses.append(outer.item())
after = accuracy()
print(f"trained:   {100 * after:.1f} % right, on characters of other alphabets")

plt.figure(figsize=(6, 2.5), layout="constrained")
plt.plot(losses)
plt.xlabel("training step")
plt.ylabel("cross-entropy of queries")
plt.show()

# %%
# ## How a task is learned
#
# `history=True` records the loss of every sweep, one column a task. Where a curve wanders, what the
# solve returns is its best iterate, and not the last.

support, labels, _, _ = tasks(test, 16)
with torch.no_grad():
    sol = learn(support, labels, sweeps=40, history=True)
print(sol)
plt.figure(figsize=(6, 2.5), layout="constrained")
plt.plot(sol.history.value.numpy(), color="C0", alpha=0.4)
plt.xlabel("sweep")
plt.ylabel("loss of the support")
plt.show()

# %%
# ## What to try next
#
# - `learn(..., adjoint=implicitopt.Implicit())` outside of `no_grad` differentiates `x*` too. Its
#   linear systems are large here; `sol.adjoint` says how they went, and a larger decay eases them.
# - More drawings to learn from: five-shot tasks need a change in `tasks` alone.
# - The whole of Omniglot, the paper's model, and MAML, iMAML and Reptile side by side:
#   `examples/meta_omniglot.py`.
