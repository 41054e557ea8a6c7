"""A density of codes, fitted after training, to draw new ones from."""

from __future__ import annotations

import torch
from sklearn.mixture import GaussianMixture
from torch import Tensor

COMPONENTS = 20
#: Codes a component should have for each number it must estimate along one axis.
FEWEST = 2


def components(count: int, latent: int) -> int:
    """``COMPONENTS``, or as many as so many codes can bear."""
    return max(1, min(COMPONENTS, count // (FEWEST * latent)))


def draw(codes: Tensor, count: int, seed: int) -> Tensor:
    """New codes ``(count, latent)``, from a Gaussian mixture fitted to ``(N, latent)``.

    Source: Ghosh et al., "From variational to deterministic autoencoders", ICLR 2020.
    """
    scale = codes.std().clamp(min=1e-6)
    mixture = GaussianMixture(
        components(len(codes), codes.shape[1]), reg_covar=1e-3, random_state=seed, max_iter=100
    )
    mixture.fit((codes / scale).double().cpu().numpy())
    drawn, _ = mixture.sample(count)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return torch.as_tensor(drawn).to(codes)[order.to(codes.device)] * scale
