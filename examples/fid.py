"""The FID's own features, where torch-fidelity and its weights are already on this disk.

Nothing is downloaded. torch-fidelity itself puts the weights there when it first needs them.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"


def network() -> nn.Module | None:
    """The Inception network; None if the package or its weights are missing."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ImportError:
        return None
    options = {"feature_extractor_weights_path": str(path)}
    name = "inception-v3-compat"
    return FeatureExtractorInceptionV3(name, ["2048"], **options) if path.is_file() else None


@torch.no_grad()
def features(network: nn.Module, images: Tensor, batch: int = 32) -> Tensor:
    """``(N, 2048)`` of images ``(N, 1 or 3, H, W)`` in [0, 1], as bytes."""
    colors = (255 * images.clamp(0, 1)).round().to(torch.uint8).expand(-1, 3, -1, -1)
    return torch.cat([network(part)[0] for part in colors.split(batch)])
