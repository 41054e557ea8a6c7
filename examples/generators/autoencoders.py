"""The baselines: an encoder in front of a decoder, trained as VAE, as autoencoder or as RAE."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from generators.equilibrium import equilibrium, penalty
from mdeq import Decoder

KINDS = ("vae", "ae", "rae")


def divergence(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mean, exp(logvar)) ‖ N(0, I)), ``(B,)``."""
    return 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum(dim=1)


class Autoencoder(nn.Module):
    """The objective of an autoencoder, for ``training.fit``.

    With e the squared error of an image, summed over its pixels,

        vae   e + λ KL(q(x | image) ‖ N(0, I)), x drawn from q
        ae    e
        rae   e + λ/2 ‖x‖² + weight decay of the decoder

    λ is the decoder-only model's: pixels that are normal with variance λ/2, codes with variance 1.
    So the VAE bounds, and the decoder-only model approximates at its most likely code, one and the
    same likelihood.

    Sources: Kingma, Welling, ICLR 2014; Ghosh et al., "From variational to deterministic
    autoencoders", ICLR 2020 (its RAE-L2).

    Args:
        kind: one of ``KINDS``.
        encoder: images to codes; for a VAE to twice as many numbers, means and log variances.
        decoder: codes to images, or an equilibrium ``Decoder``.
        images: ``(N, C, H, W)``, uint8.
        decay: λ.
        penalty: weight of the Jacobian's size, where the decoder is an equilibrium model.
        steps: of its forward iteration.
    """

    WEIGHT_DECAY = 1e-4

    def __init__(
        self,
        kind: str,
        encoder: nn.Module,
        decoder: nn.Module,
        images: Tensor,
        decay: float,
        penalty: float,
        steps: int = 30,
    ) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {KINDS}; got {kind!r}.")
        self.kind, self.encoder, self.decoder = kind, encoder, decoder
        self.decay, self.weight, self.steps = decay, penalty, steps
        self.register_buffer("images", images, persistent=False)

    def encode(self, images: Tensor) -> Tensor:
        """The codes of images in [0, 1]: for a VAE, the means."""
        return self.encoder(images)[:, : self.decoder.latent]

    def forward(self, indices: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        target = self.images[indices] / 255
        x, price = self._draw(target)
        shown, size = self._show(x)
        error = (shown - target).square().sum(dim=(1, 2, 3)).mean()
        loss = error + price + self.weight * size
        return loss, {"mse": error / target[0].numel(), "jacobian": size}

    def _draw(self, target: Tensor) -> tuple[Tensor, Tensor]:
        """Codes, and what they cost beside the error."""
        found = self.encoder(target)
        if self.kind == "vae":
            mean, logvar = found.chunk(2, dim=1)
            x = mean + torch.randn_like(mean) * (logvar / 2).exp()
            return x, self.decay * divergence(mean, logvar).mean()
        if self.kind == "ae":
            return found, found.new_zeros(())
        weights = sum(p.square().sum() for p in self.decoder.parameters())
        return found, self.decay / 2 * found.square().sum(dim=1).mean() + (
            self.WEIGHT_DECAY * weights
        )

    def _show(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The images of codes, and the size of the Jacobian."""
        if not isinstance(self.decoder, Decoder):
            return self.decoder(x), x.new_zeros(())
        z = equilibrium(self.decoder, x, steps=self.steps, tol=1e-2)
        return self.decoder.image(z), penalty(self.decoder, z, x)
