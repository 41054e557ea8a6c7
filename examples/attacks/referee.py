"""An attack that nobody here wrote: Auto-PGD, of the Adversarial Robustness Toolbox.

Install it with ``pip install adversarial-robustness-toolbox``. It is given the classifier's logits
at the equilibrium with their implicit gradient, so it attacks the classifier itself.
"""

from __future__ import annotations

import importlib.util

import numpy as np
import torch
from torch import Tensor, nn

from attacks.judge import Settled
from mdeq import Classifier


def has_referee() -> bool:
    """Whether the Toolbox is installed."""
    return importlib.util.find_spec("art") is not None


def referee(
    model: Classifier,
    images: Tensor,
    labels: Tensor,
    radius: float,
    *,
    iterations: int = 20,
    clip: bool = False,
    seed: int = 0,
) -> Tensor:
    """The images that Auto-PGD makes of these, within an L2 ball.

    Source: Croce, Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse
    parameter-free attacks", ICML 2020.
    """
    from art.attacks.evasion import AutoProjectedGradientDescent
    from art.estimators.classification import PyTorchClassifier

    classifier = PyTorchClassifier(
        Settled(model, max_steps=40, tol=1e-3),
        loss=nn.CrossEntropyLoss(reduction="sum"),
        input_shape=tuple(images.shape[1:]),
        nb_classes=model.head.linear.out_features,
        clip_values=(0.0, 1.0) if clip else None,
        device_type="gpu" if images.is_cuda else "cpu",
    )
    attack = AutoProjectedGradientDescent(
        classifier,
        norm=2,
        eps=radius,
        eps_step=2 * radius,
        max_iter=iterations,
        nb_random_init=1,
        batch_size=len(images),
        verbose=False,
    )
    np.random.seed(seed)  # noqa: NPY002  the Toolbox draws from numpy's own generator
    found = attack.generate(images.cpu().numpy(), labels.cpu().numpy())
    return torch.from_numpy(found).to(images)
