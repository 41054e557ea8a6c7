"""Quickstart: train an equilibrium decoder of digits, then recover, denoise and inpaint new ones.

The decoder has no layers to run through. One layer f(z, x) is given the latent code x of an image,
and its fixed point z = f(z, x) is what the image is read from. To find the code of an image is to

    minimize over x   ‖image(z) − target‖² + λ/2 ‖x‖²    subject to   z = f(z, x)

which is one call of `implicitopt.solve`, for a whole batch of images. That call is also all that
training needs: the loss at the solution carries its exact gradient in the decoder's parameters.

Reads no file and downloads nothing: the digits (8×8 pixels) come with scikit-learn.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from functools import partial
from pathlib import Path
from statistics import median

import matplotlib
import torch
from einops import rearrange
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from tqdm import tqdm

import implicitopt

DECAY = 0.02  # λ: how strongly codes are drawn towards 0
NOISE = 0.25  # standard deviation, for pixels in [0, 1]
HOLE = (slice(2, 5), slice(3, 6))  # the pixels that inpainting does not see
# For training: a step of it costs half as much as the default's, and a few are made at a time.
JOINT = implicitopt.Joint()


class Branch(nn.Module):
    """One residual block: what the layer does at one resolution."""

    def __init__(self, channels: int, groups: int = 4) -> None:
        super().__init__()
        wide = 2 * channels
        self.widen = nn.Conv2d(channels, wide, 3, padding=1, bias=False)
        self.narrow = nn.Conv2d(wide, channels, 3, padding=1, bias=False)
        # Group norm, not batch norm: batch norm would couple the problems of a batch.
        self.norm1 = nn.GroupNorm(groups, wide)
        self.norm2 = nn.GroupNorm(groups, channels)
        self.norm3 = nn.GroupNorm(groups, channels)

    def forward(self, z: Tensor, injected: Tensor) -> Tensor:
        h = self.narrow(self.norm1(self.widen(z)).relu())
        return self.norm3((self.norm2(h + injected) + z).relu())


class Decoder(nn.Module):
    """A small multiscale equilibrium model: a fine (8×8) and a coarse (4×4) branch.

    The state z is a pair of tensors, one a branch; the code x is ``(B, latent)``.
    """

    def __init__(self, latent: int, fine: int = 8, coarse: int = 16) -> None:
        super().__init__()
        self.latent, self.shapes = latent, ((fine, 8, 8), (coarse, 4, 4))
        self.inject_fine = nn.Linear(latent, fine * 8 * 8)
        self.inject_coarse = nn.Linear(latent, coarse * 4 * 4)
        self.fine, self.coarse = Branch(fine), Branch(coarse)
        self.down = nn.Sequential(
            nn.Conv2d(fine, coarse, 3, stride=2, padding=1, bias=False), nn.GroupNorm(4, coarse)
        )
        project = nn.Conv2d(coarse, fine, 1, bias=False)
        self.up = nn.Sequential(project, nn.GroupNorm(4, fine), nn.Upsample(scale_factor=2))
        self.fuse_fine, self.fuse_coarse = self.fusion(fine), self.fusion(coarse)
        self.head = nn.Conv2d(fine, 1, 3, padding=1)

    @staticmethod
    def fusion(channels: int) -> nn.Sequential:
        """What follows the sum of the branches."""
        norm = nn.GroupNorm(4, channels)
        nn.init.constant_(norm.weight, 0.35)  # small, so that f starts as a contraction
        return nn.Sequential(nn.ReLU(), nn.Conv2d(channels, channels, 1, bias=False), norm)

    def f(self, z: tuple[Tensor, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        """The layer whose fixed point z = f(z, x) is the decoder's output."""
        to_fine = rearrange(self.inject_fine(x), "b (c h w) -> b c h w", h=8, w=8)
        to_coarse = rearrange(self.inject_coarse(x), "b (c h w) -> b c h w", h=4, w=4)
        fine, coarse = self.fine(z[0], to_fine), self.coarse(z[1], to_coarse)
        return self.fuse_fine(fine + self.up(coarse)), self.fuse_coarse(coarse + self.down(fine))

    def start(self, x: Tensor) -> tuple[Tensor, ...]:
        """A state to start from: zeros."""
        return tuple(x.new_zeros(len(x), *shape) for shape in self.shapes)

    def image(self, z: tuple[Tensor, Tensor]) -> Tensor:
        """The image in a state, ``(B, 8, 8)``, pixels in [0, 1]."""
        return rearrange(self.head(z[0]).sigmoid(), "b 1 h w -> b h w")

    def loss(self, target: Tensor, visible: Tensor | None = None):
        """ℓ(z, x) for target images: one value per image, over the visible pixels alone."""
        seen = torch.ones_like(target[0]) if visible is None else visible

        def loss(z: tuple[Tensor, Tensor], x: Tensor) -> Tensor:
            error = seen * (self.image(z) - target) ** 2
            return error.sum(dim=(1, 2)) + DECAY / 2 * (x**2).sum(dim=1)

        return loss


def digits(seed: int) -> tuple[Tensor, Tensor]:
    """Images to train on and held-out ones, ``(N, 8, 8)`` in [0, 1]."""
    images = load_digits().images / 16
    parts = train_test_split(images, test_size=0.2, random_state=seed)
    return tuple(torch.tensor(part, dtype=torch.float32) for part in parts)


def train(
    model: Decoder,
    images: Tensor,
    steps: int,
    batch: int,
    rate: float,
    bar,
    sweeps=10,
    solver=JOINT,
) -> list[float]:
    """Fit the decoder; every image keeps its code from one visit to the next."""
    codes = torch.zeros(len(images), model.latent)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=max(steps, 2), pct_start=0.1
    )
    losses = []
    for _ in bar(range(steps), desc="train"):
        chosen = torch.randperm(len(images))[:batch]
        # Few sweeps: the codes need not be optimal, since the next visit goes on from here.
        # The weights' gradient is taken at the state that is returned: it must be near equilibrium.
        sol = implicitopt.solve(
            model.f, model.loss(images[chosen]), codes[chosen], model.start, max_steps=sweeps,
            solver=solver, select=implicitopt.Best(small=0.03), sample_iterate=True,
        )  # fmt: skip
        codes[chosen] = sol.x.detach()
        # Keep f contractive, at a point of the path as the paper does; 16 images are enough.
        z, x = sol.iterate
        z, x = tuple(branch[:16] for branch in z), x[:16]
        penalty = implicitopt.jacobian_penalty(model.f, z, x) / sum(b[0].numel() for b in z)
        optimizer.zero_grad()
        (sol.value.mean() + 1.5 * penalty.mean()).backward()
        optimizer.step()
        schedule.step()
        losses.append(sol.value.mean().item())
    return losses


def equilibrium(model: Decoder, codes: Tensor) -> tuple[Tensor, Tensor]:
    """The state of given codes, z = f(z, x), solved on its own: the judge of every result here."""
    return implicitopt.fixed_point(model.f, codes, model.start, max_steps=200, tol=1e-3)


def recover(model: Decoder, target: Tensor, visible: Tensor | None = None) -> Tensor:
    """The decoder's image that is nearest to the visible pixels of each target."""
    loss, codes = model.loss(target, visible), torch.zeros(len(target), model.latent)
    sol = implicitopt.solve(model.f, loss, codes, model.start, max_steps=60)
    return model.image(equilibrium(model, sol.x))


def recover_all(model: Decoder, images: Tensor) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """The corrupted images, the recovered ones and the pixels to judge by, for each task."""
    everywhere = torch.ones(8, 8)
    visible = everywhere.clone()
    visible[HOLE] = 0
    noisy = images + NOISE * torch.randn_like(images)
    hidden = images * visible
    return {
        "reconstruct": (images, recover(model, images), everywhere),
        "denoise": (noisy, recover(model, noisy), everywhere),
        "inpaint": (hidden, recover(model, hidden, visible), 1 - visible),
    }


def score(images: Tensor, shown: Tensor, where: Tensor) -> dict[str, float]:
    """Mean squared error per pixel and PSNR in dB, over the pixels where ``where`` is 1."""
    mse = (where * (images - shown) ** 2).sum().item() / (where.sum().item() * len(images))
    return {"mse": mse, "psnr": -10 * torch.tensor(mse).log10().item() if mse else float("inf")}


def compare(model: Decoder, images: Tensor, steps: int, bar) -> dict[str, dict]:
    """Nested Adam against the default solver: what each needs to reach one and the same loss."""
    loss, codes = model.loss(images), torch.zeros(len(images), model.latent)

    def run(repeats: int = 1, **options) -> dict:
        seconds = []
        for _ in range(repeats):
            begin = time.perf_counter()
            sol = implicitopt.solve(model.f, loss, codes, model.start, **options)
            seconds.append(time.perf_counter() - begin)
        exact = loss(equilibrium(model, sol.x), sol.x).mean().item()
        return {"loss": exact, "seconds": median(seconds), "f": sol.sweeps.f, "vjp": sol.sweeps.vjp}

    run(max_steps=2)  # the first call of anything is slow
    adam = []
    for rate in bar((0.05, 0.1, 0.2), desc="nested Adam"):
        solver = implicitopt.Nested(partial(torch.optim.Adam, lr=rate), inner_steps=20)
        adam.append({"rate": rate, **run(solver=solver, max_steps=steps)})
    best = min(adam, key=lambda row: row["loss"])
    for sweeps in range(5, 201, 5):  # the fewest sweeps that reach the loss, each try from scratch
        joint = run(max_steps=sweeps)
        if joint["loss"] <= best["loss"]:
            break
    joint = run(repeats=3, max_steps=sweeps)  # timed alone; a short time is a noisy one
    return {"nested": best, "default": joint, "reached": joint["loss"] <= best["loss"]}


def draw(path: Path, images: Tensor, tasks: dict, count: int = 10) -> None:
    """One picture: for each task the target, what the solver saw, and what it recovered."""
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(13, 2.2), layout="constrained")
    titles = ("Reconstruct", f"Denoise (σ = {NOISE})", "Inpaint (3×3 hole)")
    colors = matplotlib.colormaps["gray_r"].with_extremes(bad="lightsteelblue")
    for axis, title, (name, (seen, found, _)) in zip(axes, titles, tasks.items(), strict=True):
        rows = torch.stack([images[:count], seen[:count], found[:count]])
        if name == "inpaint":
            rows[(1, slice(None), *HOLE)] = float("nan")
        framed = torch.nn.functional.pad(rows, (1, 1, 1, 1), value=float("nan"))
        axis.imshow(rearrange(framed, "r n h w -> (r h) (n w)"), cmap=colors, vmin=0, vmax=1)
        axis.set_title(title)
        axis.set_xticks([])
        axis.set_yticks([5, 15, 25], ["target", "given", "recovered"])
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
    figure.savefig(path, dpi=110, bbox_inches="tight", pad_inches=0.05)
    plt.close(figure)


def table(results: dict) -> str:
    """The results, for people."""
    lines = [f"{'held-out images':<22}{'given':>12}{'recovered':>12}   error per pixel (PSNR)"]
    for name, row in results["tasks"].items():
        given, found = row["given"], row["recovered"]
        psnr = f"{given['psnr']:.1f} → {found['psnr']:.1f} dB"
        lines.append(f"  {name:<20}{given['mse']:>12.4f}{found['mse']:>12.4f}   {psnr}")
    lines.append(f"\n{'to reach one loss':<24}{'loss':>9}{'f':>7}{'vjp':>7}{'seconds':>10}")
    adam = f"nested Adam, {results['settings']['nested_steps']} steps"
    for name, label in {"nested": adam, "default": "implicitopt default"}.items():
        row = results["solvers"][name]
        work = f"{row['f']:>7}{row['vjp']:>7}{row['seconds']:>10.2f}"
        lines.append(f"  {label:<22}{row['loss']:>9.3f}{work}")
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Try --steps 60 for a quick look, or --latent 8 for shorter codes.",
    )
    add = parser.add_argument
    add("--steps", type=int, default=170, help="training steps (default %(default)s)")
    add("--batch", type=int, default=64, help="images, so problems, per step (default %(default)s)")
    add("--lr", type=float, default=1e-2, help="Adam's peak learning rate (default %(default)s)")
    add("--latent", type=int, default=20, help="length of a code (default %(default)s)")
    add("--images", type=int, default=64, help="held-out images to recover (default %(default)s)")
    add("--nested-steps", type=int, default=40, help="steps of nested Adam (default %(default)s)")
    add("--seed", type=int, default=0, help="of the split, the weights and the noise")
    add("--out", type=Path, default=Path("out/quickstart"), help="folder (default %(default)s)")
    add("--quiet", action="store_true", help="no progress bars")
    args = parser.parse_args()
    for name in ("steps", "batch", "lr", "latent", "images", "nested_steps"):
        if getattr(args, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} must be positive; got {getattr(args, name)}")
    return args


def main() -> None:
    """Train, recover, compare, draw."""
    args = arguments()
    bar = partial(tqdm, disable=args.quiet, leave=False)
    torch.set_num_threads(1)  # tensors this small gain nothing from a second thread
    torch.manual_seed(args.seed)
    begin = time.perf_counter()
    training, held_out = digits(args.seed)
    model = Decoder(args.latent)
    losses = train(model, training, args.steps, args.batch, args.lr, bar)
    trained = time.perf_counter() - begin
    model, held_out = model.requires_grad_(False), held_out[: args.images]
    tasks = recover_all(model, held_out)
    results = {
        "settings": vars(args) | {"out": str(args.out)},
        "training_loss": losses,
        "tasks": {
            name: {"given": score(held_out, seen, at), "recovered": score(held_out, found, at)}
            for name, (seen, found, at) in tasks.items()
        },
        "solvers": compare(model, held_out[:16], args.nested_steps, bar),
        "seconds": {"train": trained, "total": time.perf_counter() - begin},
    }
    args.out.mkdir(parents=True, exist_ok=True)
    draw(args.out / "quickstart.png", held_out, tasks)
    (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(table(results))
    print(f"\n{results['seconds']['total']:.0f} s; picture and numbers are in {args.out}/")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nInterrupted: nothing was written.")
