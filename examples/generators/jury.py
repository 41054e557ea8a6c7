"""What images are worth: their error and their Fréchet distance to held-out ones."""

from __future__ import annotations

import math

from torch import Tensor

import fid
import frechet


class Jury:
    """Error and Fréchet distance to the held-out images."""

    def __init__(self, held_out: Tensor, quiet: bool) -> None:
        self.images, self.quiet = held_out / 255, quiet
        self.network = frechet.network()
        if self.network is not None:
            self.network = self.network.to(held_out.device)
            self.features = frechet.features(self.network, self.images, quiet=quiet)
        self.inception = fid.network()
        if self.inception is not None:
            self.inception = self.inception.to(held_out.device)
            self.fid_features = fid.features(self.inception, self.images)

    def error(self, shown: Tensor) -> dict[str, float]:
        """Squared error a pixel, and the PSNR of pixels in [0, 1] in dB, over all images."""
        mse = (shown - self.images).square().mean().item()
        return {"mse": mse, "psnr": -10 * math.log10(mse) if mse else math.inf}

    def distance(self, shown: Tensor) -> float | None:
        """The Fréchet distance; None if there is no network for it."""
        if self.network is None:
            return None
        found = frechet.features(self.network, shown, quiet=self.quiet)
        return frechet.distance(found, self.features)

    def fid(self, shown: Tensor) -> float | None:
        """The same on the FID's features."""
        if self.inception is None:
            return None
        return frechet.distance(fid.features(self.inception, shown), self.fid_features)

    def distances(self, shown: Tensor, of: str) -> dict[str, float | None]:
        """Both, under the names of results."""
        return {f"frechet_{of}": self.distance(shown), f"fid_{of}": self.fid(shown)}
