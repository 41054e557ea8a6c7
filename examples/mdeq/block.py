"""The residual block: what the cell does within one resolution."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

#: The size of what an untrained block adds to an injection of unit size. Small, so that the
#: injection sets the state and the untrained cell is a contraction.
NARROW = 0.1


class FiLM(nn.Module):
    """Scale and shift each channel as a vector v says: h ↦ (1 + Av) h + Bv.

    At v = 0 nothing changes, yet the gradient in v is not 0. Perez et al., AAAI 2018.
    """

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 2 * channels, bias=False)

    def forward(self, h: Tensor, v: Tensor) -> Tensor:
        scale, shift = rearrange(self.linear(v), "b (two c) -> two b c 1 1", two=2)
        return torch.addcmul(h + shift, h, scale)


class Block(nn.Module):
    """``(B, C, H, W) -> (B, C, H, W)``: widen, narrow, add the injection and then the state.

    The norms are group norms, and weight norm is on the convolutions: batch norm would couple the
    problems of a batch.
    """

    def __init__(
        self, channels: int, expansion: int = 5, groups: int = 4, film: int | None = None
    ) -> None:
        super().__init__()
        wide = expansion * channels
        self.widen = weight_norm(nn.Conv2d(channels, wide, 3, padding=1, bias=False))
        narrow = nn.Conv2d(wide, channels, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(narrow.weight)
        with torch.no_grad():
            narrow.weight.mul_(NARROW)
        self.narrow = weight_norm(narrow)
        self.film = None if film is None else FiLM(film, wide)
        self.norm_wide = nn.GroupNorm(groups, wide)
        self.norm_narrow = nn.GroupNorm(groups, channels)
        self.norm_out = nn.GroupNorm(groups, channels)

    def forward(self, z: Tensor, injection: Tensor, v: Tensor | None = None) -> Tensor:
        h = self.norm_wide(self.widen(z))
        if self.film is not None:
            h = self.film(h, v)
        h = self.norm_narrow(self.narrow(h.relu()) + injection)
        return self.norm_out((h + z).relu())
