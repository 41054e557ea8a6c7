"""The learners to compare with: an ordinary network, adapted by gradient steps or by distance."""

from __future__ import annotations

from einops import rearrange
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from .learner import Learner, cross_entropy, share_right
from .tasks import Episode, Tasks


def convolutions(channels: int, ways: int | None, size: int = 28, groups: int = 4) -> nn.Sequential:
    """The four convolutions that few-shot learners share, and logits if there are ``ways``.

    Group norm stands for the usual batch norm, which would let a task's queries see one another.
    """
    layers: list[nn.Module] = []
    for k in range(4):
        layers += [
            nn.Conv2d(channels if k else 1, channels, 3, padding=1),
            nn.GroupNorm(groups, channels),
            nn.ReLU(),
            nn.MaxPool2d(2, ceil_mode=True),
        ]
        size = (size + 1) // 2
    layers.append(nn.Flatten())
    if ways is not None:
        layers.append(nn.Linear(channels * size**2, ways))
    return nn.Sequential(*layers)


Weights = dict[str, Tensor]


class Gradient(Learner):
    """A network whose weights take some gradient steps on the support of each task.

    Args:
        tasks: to train on.
        network: images to logits.
        steps: gradient steps on a task.
        rate: their length.
    """

    def __init__(self, tasks: Tasks, network: nn.Module, steps: int, rate: float) -> None:
        super().__init__(tasks)
        self.network, self.steps, self.rate = network, steps, rate

    def task_loss(self, weights: Weights, images: Tensor, labels: Tensor) -> Tensor:
        """The mean cross entropy on some images of one task, ``()``."""
        logits = functional_call(self.network, weights, (images,))
        return cross_entropy(logits[None], labels[None])[0]

    def adapted(self, weights: Weights, images: Tensor, labels: Tensor) -> Weights:
        """The weights after the steps on one task; differentiable in those before."""
        for _ in range(self.steps):
            slope = grad(self.task_loss)(weights, images, labels)
            weights = {name: w - self.rate * slope[name] for name, w in weights.items()}
        return weights

    def each_adapted(self, weights: Weights, images: Tensor, labels: Tensor) -> Weights:
        """``adapted`` for every task: the weights get a leading dimension, of tasks."""
        return vmap(self.adapted, in_dims=(None, 0, 0))(weights, images, labels)

    def each_answer(self, own: Weights, images: Tensor) -> Tensor:
        """The logits of every task's images under its own weights."""
        return vmap(lambda w, i: functional_call(self.network, w, (i,)))(own, images)

    def constant(self) -> Weights:
        """The weights, to which no gradient goes."""
        return {name: w.detach() for name, w in self.network.named_parameters()}

    def reported(
        self, logits: Tensor, episode: Episode, slope: Weights
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The queries' loss, with ``slope`` for its gradient: that of ⟨weights, slope⟩."""
        surrogate = sum((w * slope[name]).sum() for name, w in self.network.named_parameters())
        loss = cross_entropy(logits, episode.query_labels).mean()
        accuracy = share_right(logits, episode.query_labels).mean()
        return loss + surrogate - surrogate.detach(), {"accuracy": accuracy}

    def logits(self, episode: Episode) -> Tensor:
        weights = dict(self.network.named_parameters())
        own = self.each_adapted(weights, episode.support, episode.support_labels)
        return self.each_answer(own, episode.query)


class Maml(Gradient):
    """Trained through its gradient steps, second derivatives included.

    Source: Finn, Abbeel, Levine, "Model-agnostic meta-learning", ICML 2017.
    """


class Reptile(Gradient):
    """Trained to be near the weights that each task leads to, by first derivatives alone.

    The gradient is θ − θ', θ' being what the steps on all of a task's images lead to. What is
    reported is the queries' loss at θ'.

    Source: Nichol, Achiam, Schulman, "On first-order meta-learning algorithms", 2018.
    """

    def loss(self, episode: Episode) -> tuple[Tensor, dict[str, Tensor]]:
        weights = self.constant()
        own = self.each_adapted(weights, episode.images, episode.labels)
        moved = {name: w - own[name].mean(dim=0) for name, w in weights.items()}
        return self.reported(self.each_answer(own, episode.query), episode, moved)


class Prototypes(Learner):
    """A class is the mean of its support's features; a query goes to the nearest.

    Source: Snell, Swersky, Zemel, "Prototypical networks for few-shot learning", NeurIPS 2017.

    Args:
        tasks: to train on.
        network: images to features.
    """

    def __init__(self, tasks: Tasks, network: nn.Module) -> None:
        super().__init__(tasks)
        self.network = network

    def features(self, images: Tensor) -> Tensor:
        """``(T, S, C, H, W)`` to ``(T, S, features)``."""
        flat = self.network(rearrange(images, "t s c h w -> (t s) c h w"))
        return rearrange(flat, "(t s) d -> t s d", t=len(images))

    def logits(self, episode: Episode) -> Tensor:
        support = rearrange(
            self.features(episode.support), "t (k s) d -> t k s d", s=self.tasks.shots
        )
        apart = self.features(episode.query)[:, :, None] - support.mean(dim=2)[:, None]
        return -apart.square().mean(dim=-1) * SHARPNESS


#: Features are normed, so their mean squared distance lies near 1: too flat for a softmax.
SHARPNESS = 10.0
