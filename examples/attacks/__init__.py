"""Attacks on an equilibrium classifier: how they are made, judged, timed and trained against."""

from attacks.attack import Attack, log_cross_entropy
from attacks.judge import Settled, Verdict, judge
from attacks.objective import Robust, mirrored
from attacks.referee import has_referee, referee
from attacks.trial import evaluate, race

__all__ = [
    "Attack",
    "Robust",
    "Settled",
    "Verdict",
    "evaluate",
    "has_referee",
    "judge",
    "log_cross_entropy",
    "mirrored",
    "race",
    "referee",
]
