"""The iteration as JIIO's authors ran it: type I Anderson acceleration without a safeguard.

The library's ``Anderson("I")`` leaves out outdated and dependent differences and falls back to a
plain step; this one does none of that. It shows how short an accelerator of one's own may be.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from implicitopt import Joint, StepSizes

__all__ = ["PlainAndersonI", "paper"]


@dataclass(frozen=True)
class PlainAndersonI:
    """v⁺ = v + r − (S + Y) c with (Sᵀ Y) c = Sᵀ r, over the last ``memory`` differences."""

    memory: int = 20

    def init(self, v: Tensor) -> list[tuple[Tensor, Tensor]]:
        return []

    def step(
        self, state: list[tuple[Tensor, Tensor]], v: Tensor, Fv: Tensor
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        r = Fv - v
        state = [*state, (v, r)][-self.memory - 1 :]
        if len(state) == 1:
            return Fv, state
        vs, rs = (torch.stack(block, dim=1) for block in zip(*state, strict=True))
        S, Y = vs.diff(dim=1), rs.diff(dim=1)
        # Not linalg.solve, which raises for the batch when one problem's system is singular.
        c, _ = torch.linalg.solve_ex(S @ Y.mT, S @ r[..., None])
        return Fv - ((S + Y).mT @ c)[..., 0], state


def paper(*, damped: bool) -> Joint:
    """α_x = 0.2; ``damped``: with the paper's α_z = 0.8 and α_μ = 0.6, else 1."""
    steps = StepSizes(z=0.8, mu=0.6, x=0.2) if damped else StepSizes(x=0.2)
    return Joint(PlainAndersonI(memory=20), steps)
