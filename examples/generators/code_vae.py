"""A small VAE of codes, fitted after training: the other density to draw new codes from."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from generators.autoencoders import divergence

STEPS, BATCH, RATE = 3000, 256, 1e-3
#: Every so many steps the codes that were held out are looked at.
EVERY = 100


def perceptron(inputs: int, width: int, outputs: int) -> nn.Sequential:
    """Two hidden layers."""
    hidden = (nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
    return nn.Sequential(*hidden, nn.Linear(width, outputs))


class CodeVae(nn.Module):
    """p(code | u) = N(decoder(u), diag(σ²)), u standard normal and as long as a code; σ is learned.

    It bridges clusters that a mixture keeps apart.

    Source: Kingma, Welling, "Auto-encoding variational Bayes", ICLR 2014; Rybkin, Daniilidis,
    Levine, "Simple and effective VAE training with calibrated decoders", ICML 2021 (σ).
    """

    def __init__(self, latent: int, width: int = 128) -> None:
        super().__init__()
        self.encoder = perceptron(latent, width, 2 * latent)
        self.decoder = perceptron(latent, width, latent)
        self.log_sigma = nn.Parameter(torch.zeros(latent))

    def forward(self, codes: Tensor) -> Tensor:
        """The negative evidence bound of each code, ``(B,)``, up to a constant."""
        mean, logvar = self.encoder(codes).chunk(2, dim=1)
        u = mean + torch.randn_like(mean) * (logvar / 2).exp()
        error = (self.decoder(u) - codes) * (-self.log_sigma).exp()
        return (error.square() / 2 + self.log_sigma).sum(dim=1) + divergence(mean, logvar)

    def sample(self, count: int) -> Tensor:
        """``(count, latent)``, the noise of σ included."""
        mean = self.decoder(torch.randn(count, len(self.log_sigma)))
        return mean + torch.randn_like(mean) * self.log_sigma.exp()


def fit(codes: Tensor, bar: Callable[..., Any] = tqdm) -> CodeVae:
    """The VAE of standardized codes that is best on a tenth of them, which it does not see."""
    vae = CodeVae(codes.shape[1])
    held, rest = codes[torch.randperm(len(codes))].tensor_split([max(1, len(codes) // 10)])
    optimizer = torch.optim.Adam(vae.parameters(), lr=RATE)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    best, least = vae, torch.inf
    for step in bar(range(1, STEPS + 1), desc="VAE of codes"):
        loss = vae(rest[torch.randint(len(rest), (BATCH,))]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        cosine.step()
        if step % EVERY == 0:
            with torch.no_grad():
                found = torch.stack([vae(held).mean() for _ in range(8)]).mean().item()
            if found < least:
                best, least = copy.deepcopy(vae), found
    return best


def draw_by_vae(codes: Tensor, count: int, seed: int, bar: Callable[..., Any] = tqdm) -> Tensor:
    """New codes ``(count, latent)``, from a VAE fitted to ``(N, latent)``; on the CPU, in seconds.

    Raises:
        ValueError: the codes are not finite, or fewer than 2.
    """
    if codes.dim() != 2 or len(codes) < 2:
        raise ValueError(f"codes must be (N, latent) with N > 1; got {tuple(codes.shape)}.")
    if not codes.isfinite().all():
        bad = (~codes.isfinite()).any(dim=1).sum().item()
        raise ValueError(
            f"codes must be finite; {bad} of {len(codes)} are not. Leave those out, or look at the "
            "solves they come from."
        )
    plain = codes.detach().float().cpu()
    center, scale = plain.mean(dim=0), plain.std(dim=0).clamp(min=1e-6)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        vae = fit((plain - center) / scale, bar)
        with torch.no_grad():
            return (vae.sample(count) * scale + center).to(codes)
