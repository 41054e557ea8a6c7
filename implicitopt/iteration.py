"""The loop all solvers share: sweep, record, stop, step."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from implicitopt.kkt import KKT, Point, Residuals, Sweep, at_hand, choose, some
from implicitopt.rows import put, take
from implicitopt.select import Candidate, Kept, Rule
from implicitopt.solution import History, Status
from implicitopt.trail import Trail

__all__ = ["Outcome", "Progress", "Solver", "iterate"]

#: Steps between looks at whether every problem has finished, where a look waits for the device.
CHECK_EVERY = 5
#: A problem is stalled when, for this many steps, neither residual nor loss improved notably.
PATIENCE = 100
#: Steps between looks at that: at the lowest residual so far, and the score of what is kept.
LOOK_EVERY = 10
#: Finished problems leave the batch when no more than this share of it is left.
LEAVE = 0.5
#: Returns to the best iterate, with a smaller step, before a non-finite problem is given up.
RETRIES = 4


class Solver(Protocol):
    """One way to move a batch of problems towards a root of the KKT system."""

    @property
    def initial_sweeps(self) -> int:
        """Sweeps that do not count as steps: 0 where a step is a sweep."""
        ...

    def init(self, kkt: KKT, start: Point) -> tuple[Point, Any]:
        """The point of the first sweep and the state before the first step."""
        ...

    def step(self, kkt: KKT, point: Point, sweep: Sweep, state: Any) -> tuple[Point, Any]:
        """The next point, from the sweep made at this one. No problem may affect another."""
        ...

    def restart(self, state: Any, mask: Tensor) -> Any:
        """Forget the history of the problems in ``mask`` and take smaller steps from now on."""
        ...


class Progress(NamedTuple):
    """What a callback sees after each sweep; reading its tensors waits for the device."""

    step: int
    value: Tensor  #: loss, ``(B,)``
    residuals: Residuals
    active: Tensor  #: problems still moving, ``(B,)``


class Outcome(NamedTuple):
    """What the loop found, on matrices."""

    point: Point
    value: Tensor
    residuals: Residuals
    status: Tensor
    steps: Tensor
    history: History | None
    drawn: tuple[Tensor, Tensor] | None
    trail: Trail | None


def iterate(
    kkt: KKT,
    solver: Solver,
    start: Point,
    *,
    max_steps: int,
    tol: float,
    rule: Rule,
    callback: Callable[[Progress], object] | None = None,
    history: bool = False,
    sample_iterate: bool = False,
    narrow: Callable[[Tensor], KKT] | None = None,
    keep: int = 0,
) -> Outcome:
    """Run ``solver`` from ``start`` until every problem is finished or ``max_steps`` are made.

    ``narrow`` gives the system of some of the problems, by their indices: then finished ones leave.
    ``keep``: so many of the last differences between sweeps make the outcome's trail.
    """
    point, state = solver.init(kkt, start)
    record = _Record(kkt, point, tol=tol, rule=rule, history=history, sample=sample_iterate)
    record.trail = Trail.at(point, keep, apart=kkt.apart) if keep else None
    initial = solver.initial_sweeps
    steps = range(initial + max_steps)
    _run(kkt, solver, point, state, record, steps, callback, narrow)
    return record.outcome(initial)


def _run(
    kkt: KKT,
    solver: Solver,
    point: Point,
    state: Any,
    record: _Record,
    steps: range,
    callback: Callable[[Progress], object] | None,
    narrow: Callable[[Tensor], KKT] | None,
) -> None:
    """Make ``steps``, or fewer where all problems finish or the callback says to stop."""
    for step in steps:
        sweep = kkt.sweep(point)
        lost = record.observe(step, point, sweep)
        if callback is not None:
            shown = Progress(step, sweep.value * kkt.sign, sweep.residuals, record.active)
            if _stops(callback(shown)):
                return
        remaining = len(point.x)
        if at_hand(record.active) or (step + 1) % CHECK_EVERY == 0:
            remaining = int(record.active.sum())
        if remaining == 0 or step == steps[-1]:
            return
        moved, state = solver.step(kkt, point, sweep, state)
        point = choose(record.active, moved, point).contiguous()
        if some(lost):
            state = solver.restart(state, lost)
            point = choose(lost, record.point, point)
        if narrow is not None and remaining <= LEAVE * len(point.x):
            rows = record.active.nonzero()[:, 0]
            rest, fewer = record.take(rows), narrow(rows)
            _check_narrowed(fewer, take(point, rows), kkt, point, rows)
            _run(
                fewer,
                solver,
                take(point, rows),
                solver.take(state, rows),  # type: ignore[attr-defined]
                rest,
                steps[step + 1 - steps[0] :],
                callback and _widened(callback, shown, rows),
                _narrower(narrow, rows),
            )
            record.put(rows, rest)
            return


def _stops(said: object) -> bool:
    """Whether a callback's result is True; an array, as of a comparison, says it too quietly."""
    if hasattr(said, "dtype"):
        raise TypeError(
            "callback must return True, to stop the solve, or anything else but a tensor or an "
            f"array, to go on; got {said!r}. Return bool(...) of it, or nothing."
        )
    return said is True


def _narrower(narrow: Callable[[Tensor], KKT], rows: Tensor) -> Callable[[Tensor], KKT]:
    """``narrow`` by indices among the problems ``rows``."""
    return lambda among: narrow(rows[among])


def _widened(
    callback: Callable[[Progress], object], last: Progress, rows: Tensor
) -> Callable[[Progress], object]:
    """A callback that sees all problems, those that have left as they were."""

    def widened(new: Progress) -> object:
        everything = put(last._replace(active=torch.zeros_like(last.active)), rows, new)
        return callback(everything._replace(step=new.step))

    return widened


def _check_narrowed(fewer: KKT, part: Point, kkt: KKT, point: Point, rows: Tensor) -> None:
    """The functions that ``subset`` returned must be those of the problems asked for."""
    pairs = (
        ("f", fewer.state_map, kkt.state_map),
        ("loss", fewer.objective, kkt.objective),
    )
    for name, few, whole in pairs:
        expected = whole(point.z, point.x)[rows]
        try:
            found = few(part.z, part.x)
        except Exception as error:
            raise ValueError(
                f"subset must return f and loss for the {len(rows)} problems asked for, but its "
                f"{name} raised {type(error).__name__}: {error}. Index per-problem data with the "
                "indices that subset is given."
            ) from error
        tolerance = torch.finfo(expected.dtype).eps ** 0.5
        scale = 1 + torch.nan_to_num(expected.abs()).amax()
        close = found.shape == expected.shape and bool(
            (torch.nan_to_num(found - expected).abs() <= tolerance * scale).all()
        )
        if not close:
            raise ValueError(
                f"subset must return f and loss for the problems asked for; its {name} gave other "
                f"numbers than {name} does for problems {rows.tolist()}. Index per-problem data "
                "with the indices that subset is given."
            )


class Found(NamedTuple):
    """Numbers of an iterate, all ``(B,)``, in the order in which they are kept side by side."""

    z: Tensor  #: relative state residual
    mu: Tensor
    x: Tensor
    residual: Tensor  #: the relative KKT residual
    value: Tensor
    score: Tensor

    @classmethod
    def of(cls, new: Candidate) -> Found:
        return cls(*new.residuals, new.residual, new.value, new.score)

    def kept(self, lowest: Tensor) -> Kept:
        """As the rules see it, with the lowest residual so far."""
        return Kept(self.value, self.residual, self.z, self.score, lowest)


class _Record:
    """What is kept of a run, per problem."""

    def __init__(
        self, kkt: KKT, start: Point, *, tol: float, rule: Rule, history: bool, sample: bool
    ) -> None:
        rows, like = start.x.shape[0], start.x
        wide = torch.float32 if like.dtype in (torch.float16, torch.bfloat16) else like.dtype

        def full(value: float, dtype: torch.dtype = wide) -> Tensor:
            return torch.full((rows,), value, dtype=dtype, device=like.device)

        inf = float("inf")
        self.kkt, self.tol, self.rule = kkt, tol, rule
        self.point = start
        self.start_size = kkt.sizes(start).state
        self.found = torch.stack([full(inf)] * len(Found._fields), dim=1)
        self.lowest = full(inf)
        self.active = full(1, torch.bool)
        self.status = full(Status.MAX_STEPS, torch.int64)
        self.steps = full(0, torch.int64)
        self.failures = full(0, torch.int64)
        self.mark, self.mark_score = full(inf), full(inf)  # what STALLED compares with
        self.since = full(0, torch.int64)
        self.history: list[tuple[Tensor, Residuals]] | None = [] if history else None
        self.drawn = (start.z, start.x) if sample else None
        self.trail: Trail | None = None

    #: What there is of each problem, and changes.
    PER_PROBLEM = (
        "point", "start_size", "found", "lowest", "active", "status", "steps", "failures", "mark",
        "mark_score", "since", "drawn", "trail",
    )  # fmt: skip

    @property
    def best(self) -> Found:
        """The numbers of ``point``, the iterate kept."""
        return Found(*self.found.unbind(1))

    def take(self, rows: Tensor) -> _Record:
        """The record of the problems ``rows`` alone, from here on."""
        part = copy.copy(self)
        for name in self.PER_PROBLEM:
            setattr(part, name, take(getattr(self, name), rows))
        if self.history is not None:
            part.history = []
        return part

    def put(self, rows: Tensor, part: _Record) -> None:
        """Take back what has become of the problems ``rows``."""
        for name in self.PER_PROBLEM:
            setattr(self, name, put(getattr(self, name), rows, getattr(part, name)))
        if self.history is not None and part.history is not None:
            last = self.history[-1]
            self.history += [put(last, rows, entry) for entry in part.history]

    def observe(self, step: int, point: Point, sweep: Sweep) -> Tensor:
        """Take in one sweep; returns the problems that became non-finite and may be retried."""
        value, residuals, total = sweep.value, sweep.residuals, sweep.total
        finite = (total < math.inf) & (value.abs() < math.inf)  # and no NaN
        running = self.active & finite
        failed = self.active ^ running
        reached = self._settled(sweep) & running
        candidate = Candidate.of(step, sweep)
        found = self.best
        keep = running & (self.rule(candidate, found.kept(self.lowest)) | reached)
        self._keep(keep, point, candidate)
        self.steps = self.steps + self.active
        stalled = self._stalled(step) & running & ~reached
        if self.drawn is not None:
            self._draw(running, point)
        if self.trail is not None:
            self.trail.push(point, sweep.r, running, sweep.loss_grad)
        if self.history is not None:
            self.history.append((value * self.kkt.sign, residuals))
        return self._end(reached, stalled, failed, found)

    def _end(self, reached: Tensor, stalled: Tensor, failed: Tensor, before: Found) -> Tensor:
        """Who is finished, and how; returns the non-finite ones that may be retried."""
        if not some(reached | stalled | failed):
            return failed
        self.failures = self.failures + failed
        known = before.residual < math.inf
        hopeless = failed & ((self.failures > RETRIES) | ~known)
        self.status = self.status.masked_fill(reached, Status.CONVERGED)
        self.status = self.status.masked_fill(stalled, Status.STALLED)
        self.status = self.status.masked_fill(hopeless, Status.NONFINITE)
        self.active = self.active & ~(reached | stalled | hopeless)
        return failed & ~hopeless

    def _settled(self, sweep: Sweep) -> Tensor:
        """Which problems meet the tolerance, and do not owe it to iterates that ran away.

        A μ that grows without bound would hide a state that is no equilibrium, and an x that does
        a gradient that is not small: where there is no solution both do, until rounding hides all.
        """
        total, sizes = sweep.total, sweep.sizes
        small: Tensor = total <= self.tol
        if not some(small):
            return small
        state = sweep.residuals.z * sizes.whole <= self.tol * sizes.state
        rounding = torch.finfo(self.point.x.dtype).eps
        # With a tol of 0 an exact solution is one too, but not where rounding alone made it so.
        within = max(self.tol, rounding) ** 0.5
        near = (total + rounding) * sizes.whole <= within * self.start_size
        settled: Tensor = small & state & near
        return settled

    def _keep(self, keep: Tensor, point: Point, new: Candidate) -> None:
        self.lowest = torch.fmin(self.lowest, new.residual)  # past NaN
        found = torch.stack(Found.of(new), dim=1)
        self.point, self.found = choose(keep, (point, found), (self.point, self.found))

    def _stalled(self, step: int) -> Tensor:
        """Who has got nowhere for ``PATIENCE`` steps; a look every ``LOOK_EVERY`` steps."""
        if (step + 1) % LOOK_EVERY:
            return torch.zeros_like(self.active)
        score = self.best.score
        bar = self.mark_score - 1e-4 * (1e-8 + self.mark_score.abs())
        improved = (self.lowest < 0.9 * self.mark) | ~(score >= bar)  # bar is NaN at first
        self.mark, self.mark_score = choose(
            improved, (self.lowest, score), (self.mark, self.mark_score)
        )
        self.since = (self.since + LOOK_EVERY).masked_fill(improved, 0)
        return self.since >= PATIENCE

    def _draw(self, running: Tensor, point: Point) -> None:
        """Reservoir sampling: step t replaces the draw with probability 1/t."""
        assert self.drawn is not None
        chance = torch.rand(running.shape, device=running.device, dtype=torch.float64)
        take = (running & (chance * self.steps < 1))[:, None]
        z, x = self.drawn
        self.drawn = (torch.where(take, point.z, z), torch.where(take, point.x, x))

    def outcome(self, initial: int) -> Outcome:
        history = None
        if self.history is not None:
            values, residuals = zip(*self.history, strict=True)
            history = History(
                torch.stack(values), Residuals(*map(torch.stack, zip(*residuals, strict=True)))
            )
        found = self.best
        never = ~found.residual.isfinite()
        return Outcome(
            self.point,
            found.value.masked_fill(never, math.nan).to(self.point.x.dtype),
            Residuals(found.z, found.mu, found.x),
            self.status.masked_fill(never, Status.NONFINITE),
            self.steps - initial,
            history,
            self.drawn,
            self.trail,
        )
