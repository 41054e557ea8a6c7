"""
# Your own model

Take a module that knows nothing of implicitopt and optimize its input through its equilibrium:
what `f` has to be, how batches work, what to do about batch norm and dropout, half precision, and
training in several processes.

The module here is a residual block as one finds it in many code bases, with batch norm and dropout.
"""

# %%
# ## A module that is already there

import os
import tempfile

import matplotlib.pyplot as plt
import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import implicitopt

torch.manual_seed(0)
images = torch.tensor(load_digits().images[:256] / 16, dtype=torch.float32)[:, None]
images = images + 0.1 * torch.randn_like(images)  # (256, 1, 8, 8)


class Block(nn.Module):
    """A residual block of 8 channels that also reads a code."""

    def __init__(self, latent=12, channels=8):
        super().__init__()
        self.enter = nn.Linear(latent, channels * 64)
        self.conv1 = nn.Conv2d(channels, 2 * channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(2 * channels)
        self.conv2 = nn.Conv2d(2 * channels, channels, 3, padding=1)
        self.drop = nn.Dropout(0.1)
        self.head = nn.Conv2d(channels, 1, 3, padding=1)

    def forward(self, z, code):
        inner = self.drop(self.norm(self.conv1(z)).relu())
        return torch.tanh(self.enter(code).unflatten(1, (8, 8, 8)) + 0.3 * self.conv2(inner))


block = Block()

# %%
# ## `f`, the loss and the start
#
# - `f(z, x)` returns a new state of the same shape. A module with that signature *is* an `f`; for
#   another signature, or with more inputs, write a `lambda` around it. Gradients reach whatever it
#   closes over: parameters, buffers, tensors.
# - `loss(z, x)` returns one number a problem, `(B,)`. That is how the batch is known: dimension 0
#   of `x` and `z` are then B independent problems. A loss of shape `()` would make the whole batch
#   *one* problem, with one step size and one status.
# - `z0` is a start, or a function that makes one.


def problem(block, target):
    """f, loss, x0 and z0 of target images."""

    def loss(z, code):
        error = (block.head(z) - target).square().sum(dim=(1, 2, 3))
        return error + 0.1 * code.square().sum(dim=1)

    return block, loss, target.new_zeros(len(target), 12), lambda x: x.new_zeros(len(x), 8, 8, 8)


# %%
# ## Ask `check` first
#
# `check` looks at the problem before any solver is to blame.

report = implicitopt.check(*problem(block, images[:16]))
assert not report.ok

# %%
# Dropout makes `f` another function at each call, and such an `f` has no fixed point. With dropout
# off, `check` gets further:

block.drop.eval()
report = implicitopt.check(*problem(block, images[:16]))
assert not report.ok

# %%
# Batch norm in training mode takes means over the batch, so that one problem's state depends on its
# neighbours. `eval()` mode settles both. Batch norm then uses its running statistics, which are
# buffers: constants of `f`.

block.eval()
report = implicitopt.check(*problem(block, images[:16]), quiet=True)
print("ok:", report.ok, "  contraction at most", f"{report.contraction.max():.2f}")
assert report.ok

# %%
# The running statistics must come from somewhere: here from one pass in training mode at the states
# that occur. A module of your own is better off with group norm, which has neither problem.

with torch.no_grad():
    sol = implicitopt.solve(*problem(block, images))
    block.norm.train()
    block.norm(block.conv1(sol.z))
    block.norm.eval()

# %%
# ## A batch is many problems
#
# The result of one image does not depend on which others are in the batch, and each has a status of
# its own.

with torch.no_grad():
    together = implicitopt.solve(*problem(block, images[:8]))
    alone = implicitopt.solve(*problem(block, images[3:4]))
apart = (together.x[3] - alone.x[0]).abs().max().item()
print(together)
print(f"steps of each: {together.steps.tolist()};  image 3 alone or with others: {apart:.0e} apart")
assert apart < 1e-2

# %%
# The codes differ by rounding, which a hundred steps enlarge: convolutions of another batch size
# add up in another order.

# %%
# ## Training it
#
# `sol.value` carries the gradient to every parameter, through `f` and through the loss.

optimizer = torch.optim.Adam(block.parameters(), lr=3e-3)
losses = []
for _ in range(40):
    rows = torch.randperm(len(images))[:32]
    sol = implicitopt.solve(*problem(block, images[rows]), max_steps=20)
    optimizer.zero_grad()
    sol.value.mean().backward()
    optimizer.step()
    losses.append(sol.value.mean().item())
print(f"loss {losses[0]:.2f} → {losses[-1]:.2f}")
assert all(p.grad is not None for p in block.parameters())

# %%
# ## Half precision
#
# Two ways. *Mixed*: `x0` and `z0` stay float32, and `torch.autocast` inside of `f` runs its matrix
# products in bfloat16. What `f` returns is cast back, and the solver's own arithmetic stays in
# float32. *Pure*: everything is bfloat16, `x0` too. The state then resolves three digits, and the
# default tolerance is 1e-2.


def mixed(z, code):
    """The block with its convolutions in bfloat16."""
    with torch.autocast("cpu", torch.bfloat16):
        return block(z, code).float()


_, loss, x0, start = problem(block, images[:32])
with torch.no_grad():
    full = implicitopt.solve(block, loss, x0, start)
    half = implicitopt.solve(mixed, loss, x0, start, tol=1e-2)
    f, loss, x0, start = problem(block.bfloat16(), images[:32].bfloat16())
    pure = implicitopt.solve(f, loss, x0, start)
    block.float()
precisions = {"float32": full, "mixed": half, "bfloat16": pure}
for name, sol in precisions.items():
    print(f"{name:<10}loss {sol.value.float().mean():.3f}   {sol.x.dtype}   {sol.sweeps.f} sweeps")

plt.figure(figsize=(4, 3), layout="constrained")
for name in ("mixed", "bfloat16"):
    shown = precisions[name].value.float()
    plt.plot(full.value, shown, ".", label=name)
plt.axline((full.value.min().item(),) * 2, slope=1, color="gray", lw=0.5)
plt.xlabel("loss of each image, float32")
plt.ylabel("in half precision")
plt.legend()
plt.show()

# %%
# Use it where it pays, on a GPU, for large models, and judge by the loss in float32.

# %%
# ## Several processes
#
# `DistributedDataParallel` averages gradients while `backward` runs, and wants the forward pass to
# go through *its* `forward`. So put the solve inside a module, and wrap that. Each process solves
# its own problems, in as many sweeps as they need; they meet in `backward` alone.
#
# Here a group of one process, so that the page runs anywhere. With `torchrun --nproc-per-node 4`
# the same code runs in four, if each takes its own share of the images.


class Fit(nn.Module):
    """The objective: the mean loss at the solutions."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, target):
        return implicitopt.solve(*problem(self.block, target), max_steps=20).value.mean()


if "RANK" in os.environ:  # torchrun says who is who
    dist.init_process_group("gloo")
else:
    store = dist.FileStore(tempfile.mkstemp()[1], 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
share = images[dist.get_rank() :: dist.get_world_size()][:32]
plain, parallel = Fit(block), DistributedDataParallel(Fit(block))
slopes = []
for model in (plain, parallel):
    block.zero_grad()
    model(share).backward()
    slopes.append(torch.cat([p.grad.flatten() for p in block.parameters()]))
dist.destroy_process_group()
ddp_apart = (slopes[0] - slopes[1]).abs().max().item()
print(f"gradients with and without DistributedDataParallel: {ddp_apart:.0e} apart")

# %%
# ## What to try next
#
# - Replace batch norm by `nn.GroupNorm(4, 16)` and stay in training mode.
# - Keep the block contractive in a longer training: `implicitopt.jacobian_penalty`, as in the
#   [first tutorial](1_invert_a_generator.md).
# - On a GPU, nothing changes but the device of the module, the images and `x0`.
# - `examples/training/` has a training loop for one or many processes, with checkpoints.
