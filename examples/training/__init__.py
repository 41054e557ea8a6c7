"""The training loop that every script shares, on Hugging Face Accelerate.

The same script runs on a CPU, on a GPU (``python examples/NAME.py``) or in several processes
(``torchrun --nproc-per-node 2 examples/NAME.py``, or ``accelerate launch``); with
``ACCELERATE_USE_CPU=true`` in the environment it leaves GPUs alone. A run that is killed and
resumed ends with the weights of one that was not.
"""

from .clock import steps_within
from .fit import Result, fit
from .plan import Training

__all__ = ["Result", "Training", "fit", "steps_within"]
