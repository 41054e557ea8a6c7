"""The equilibrium decoder: an image's code by one solve, and its training by that same solve.

    minimize over x   ‖image(z) − target‖² + λ/2 ‖x‖²    subject to   z = f(z, x)

The loss at the solution is also the outer loss, so its envelope gradient trains the decoder (JIIO,
eq. 18–20), and no encoder is needed.

Where images' codes are kept from visit to visit, they may be held at first where they begin: such a
step takes an equilibrium alone, which costs half a solve.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import implicitopt
from mdeq import Decoder

#: Of the equilibrium at a held code, which begins where the last one ended.
HELD_TOL = 3e-3
PENALIZED = 8  # images of a batch whose Jacobian is estimated: it is an average all the same


def matching(
    decoder: Decoder, target: Tensor, decay: float, visible: Tensor | float = 1.0
) -> Callable[[tuple[Tensor, ...], Tensor], Tensor]:
    """ℓ(z, x) of target images ``(B, C, H, W)``: one value an image, over the visible pixels."""

    def loss(z: tuple[Tensor, ...], x: Tensor) -> Tensor:
        error = visible * (decoder.image(z) - target) ** 2
        return error.sum(dim=(1, 2, 3)) + decay / 2 * (x**2).sum(dim=1)

    return loss


def equilibrium(
    decoder: Decoder, codes: Tensor, start: Any = None, *, steps: int = 200, tol: float = 1e-3
) -> Any:
    """The state of codes, solved on its own. Differentiable, with an inexact adjoint."""
    with warnings.catch_warnings():
        # What is not reached shows as an error of the image, which is what is judged.
        warnings.simplefilter("ignore", implicitopt.ConvergenceWarning)
        return implicitopt.fixed_point(
            decoder.f,
            codes,
            decoder.start if start is None else start,
            max_steps=steps,
            tol=tol,
            adjoint_tol=3e-2,
            adjoint_max_steps=20,
        )


def penalty(decoder: Decoder, z: tuple[Tensor, ...], x: Tensor) -> Tensor:
    """‖∂f/∂z‖²_F over the size of a state: the mean squared singular value of the Jacobian."""
    z, x = tuple(branch.detach()[:PENALIZED] for branch in z), x.detach()[:PENALIZED]
    size = sum(branch[0].numel() for branch in z)
    return implicitopt.jacobian_penalty(decoder.f, z, x).mean() / size


@dataclass(frozen=True)
class Search:
    """How codes are looked for.

    Args:
        sweeps: ``max_steps`` of a solve.
        decay: λ, how strongly codes are drawn towards 0.
        solver: of ``implicitopt.solve``; None: the default one.
    """

    sweeps: int
    decay: float
    solver: Any = None


class Trained(nn.Module):
    """The objective of the decoder-only model, for ``training.fit``.

    Args:
        decoder: the model.
        images: ``(N, C, H, W)``, uint8.
        search: the solve of each step.
        penalty: weight of the Jacobian's size, at an iterate drawn from the solve's path.
        codes: ``(N, latent)``, where the images' codes begin, to go on from the last code, state
            and multiplier when an image comes again. A few sweeps are enough then. None: codes
            start from 0 each time, as the paper's do.
        hold: visits of an image at which its code is held, before it is solved for.
    """

    def __init__(
        self,
        decoder: Decoder,
        images: Tensor,
        search: Search,
        penalty: float,
        codes: Tensor | None = None,
        hold: int = 0,
    ) -> None:
        super().__init__()
        self.decoder, self.search, self.weight, self.hold = decoder, search, penalty, hold
        self.register_buffer("images", images, persistent=False)
        codes = torch.zeros(0, decoder.latent) if codes is None else codes.clone()
        kept, width = len(codes), decoder.cell.width
        self.register_buffer("codes", codes)
        self.register_buffer("states", torch.zeros(kept, width))  # of 0: not visited yet
        self.register_buffer("multipliers", torch.zeros(kept, width))
        self.register_buffer("visits", torch.zeros(kept))

    @property
    def keep(self) -> tuple[str, ...]:
        """The ``keep`` of ``training.fit``."""
        return ("codes", "states", "multipliers", "visits") if len(self.codes) else ()

    @torch.no_grad()
    def _start(self, indices: Tensor) -> implicitopt.WarmStart:
        """Where the images' last solves ended; for those that had none, f of zeros."""
        cell, decoder = self.decoder.cell, self.decoder
        x, z = self.codes[indices], self.states[indices]
        new = (z == 0).all(dim=1)
        if bool(new.any()):
            z[new] = cell.flatten(decoder.f(decoder.start(x[new]), x[new]))
        return implicitopt.WarmStart(
            x, cell.unflatten(z), cell.unflatten(self.multipliers[indices])
        )

    def forward(self, indices: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        held = False
        if self.keep:
            held = bool((self.visits[indices] < self.hold).any())
            self.visits[indices] += 1
        value, size, codes = self._at_rest(indices) if held else self._solved(indices)
        logged = {
            "mse": value / self.images[0].numel(),
            "jacobian": size,
            "code": codes.norm(dim=1).mean(),
        }
        return value + self.weight * size, logged

    def _at_rest(self, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The error at the codes as they are, the Jacobian's size there, and the codes."""
        decoder, target, start = self.decoder, self.images[indices] / 255, self._start(indices)
        z = equilibrium(decoder, start.x, start.z, steps=30, tol=HELD_TOL)
        self.states[indices] = decoder.cell.flatten(z).detach()
        value = matching(decoder, target, 0.0)(z, start.x).mean()
        return value, penalty(decoder, z, start.x), start.x

    def _solved(self, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The least loss over codes, the Jacobian's size on the way there, and the codes."""
        target = self.images[indices] / 255
        x0 = target.new_zeros(len(target), self.decoder.latent)
        sol = implicitopt.solve(
            self.decoder.f,
            matching(self.decoder, target, self.search.decay),
            x0,
            self.decoder.start,
            solver=self.search.solver,
            max_steps=self.search.sweeps,
            warm_start=self._start(indices) if self.keep else None,
            sample_iterate=True,
        )
        if self.keep:
            self.codes[indices] = sol.x.detach()
            self.states[indices] = self.decoder.cell.flatten(sol.z).detach()
            self.multipliers[indices] = self.decoder.cell.flatten(sol.mu).detach()
        return sol.value.mean(), penalty(self.decoder, *sol.iterate), sol.x


def find_codes(
    decoder: Decoder,
    images: Tensor,
    search: Search,
    *,
    start: Tensor | None = None,
    visible: Tensor | float = 1.0,
    batch: int = 32,
    bar: Callable[..., Any] = tqdm,
) -> Tensor:
    """The codes ``(N, latent)`` of images in [0, 1], from ``start`` or from 0."""
    start = images.new_zeros(len(images), decoder.latent) if start is None else start
    everywhere = torch.as_tensor(visible).to(images).expand_as(images)
    parts = zip(*(rows.split(batch) for rows in (images, start, everywhere)), strict=True)
    found = []
    with torch.no_grad():
        for target, x0, seen in bar(list(parts), desc="codes"):
            loss = matching(decoder, target, search.decay, seen)
            options = {"solver": search.solver, "max_steps": search.sweeps}
            found.append(implicitopt.solve(decoder.f, loss, x0, decoder.start, **options).x)
    return torch.cat(found)


@torch.no_grad()
def decode(decoder: nn.Module, codes: Tensor, batch: int = 64) -> Tensor:
    """The images of codes, at their true equilibria where the decoder is an equilibrium model."""
    if isinstance(decoder, Decoder):
        parts = [decoder.image(equilibrium(decoder, part)) for part in codes.split(batch)]
    else:
        parts = [decoder(part) for part in codes.split(batch)]
    return torch.cat(parts)
