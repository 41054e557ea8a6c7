"""What every test process needs."""

import torch

# The processes that share the tests would otherwise fight for the cores.
torch.set_num_threads(1)
