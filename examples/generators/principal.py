"""Principal components: the linear generator, and where kept codes begin."""

from __future__ import annotations

import torch
from sklearn.decomposition import PCA
from torch import Tensor, nn

FITTED = 2_000  # images the components are found from, at most


class LinearDecoder(nn.Module):
    """Codes to images: the mean image plus a sum of components, cut to [0, 1].

    Args:
        latent: the length of a code.
        image: (channels, side) of the images.
    """

    def __init__(self, latent: int, image: tuple[int, int]) -> None:
        super().__init__()
        colors, side = image
        self.latent = latent
        self.mean = nn.Parameter(torch.zeros(colors, side, side))
        self.components = nn.Parameter(torch.zeros(latent, colors, side, side))

    def forward(self, codes: Tensor) -> Tensor:
        return (self.mean + torch.tensordot(codes, self.components, dims=1)).clamp(0, 1)


class Principal(nn.Module):
    """The principal components of images, codes of variance 1: an autoencoder that is linear.

    Where decoder and encoder are linear, no other has a smaller squared error on what it was made
    from.

    Args:
        images: ``(N, C, H, W)``, uint8, with N of at least ``latent``.
        latent: the length of a code.
        seed: of the randomized decomposition.
    """

    def __init__(self, images: Tensor, latent: int, seed: int) -> None:
        super().__init__()
        if len(images) < latent:
            raise ValueError(
                f"latent={latent} components need at least as many images; got {len(images)}. Take "
                "more images, or a smaller latent."
            )
        rows = (images[:FITTED].flatten(1) / 255).cpu().numpy()
        found = PCA(latent, whiten=True, svd_solver="randomized", random_state=seed).fit(rows)
        scale = torch.from_numpy(found.explained_variance_).float().sqrt().clamp(min=1e-6)
        axes = torch.from_numpy(found.components_).float()
        self.decoder = LinearDecoder(latent, (images.shape[1], images.shape[2]))
        with torch.no_grad():
            self.decoder.mean.copy_(torch.from_numpy(found.mean_).view_as(self.decoder.mean))
            self.decoder.components.copy_((axes * scale[:, None]).view_as(self.decoder.components))
        self.register_buffer("images", images, persistent=False)
        self.register_buffer("inverse", axes / scale[:, None], persistent=False)
        self.requires_grad_(False)

    def encode(self, images: Tensor) -> Tensor:
        """The codes of images in [0, 1]."""
        return (images - self.decoder.mean).flatten(1) @ self.inverse.T

    def codes(self) -> Tensor:
        """The codes of the images it was made from."""
        return torch.cat([self.encode(part / 255) for part in self.images.split(500)])
