"""Few-shot tasks, and the learners that are trained on them."""

from .classifier import TaskClassifier
from .conditioning import Agreement, Conditioning, agreement, conditioning
from .equilibrium import Equilibrium, Inner
from .imaml import Imaml
from .learner import Learner, accuracies, interval
from .network import Maml, Prototypes, Reptile, convolutions
from .tasks import Episode, Tasks

__all__ = [
    "Agreement",
    "Conditioning",
    "Episode",
    "Equilibrium",
    "Imaml",
    "Inner",
    "Learner",
    "Maml",
    "Prototypes",
    "Reptile",
    "TaskClassifier",
    "Tasks",
    "accuracies",
    "agreement",
    "conditioning",
    "convolutions",
    "interval",
]
