"""Options, checked: every message says what was expected, what came, and what to do."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any

__all__ = ["check_callable", "check_choice", "check_option"]


def check_option(
    name: str,
    value: Any,
    kind: type,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
) -> None:
    """``value`` must be a ``kind`` (an int will do for a float), within the bounds given."""
    numeric: Any = {int: Integral, float: Real}.get(kind, kind)
    article = "an" if kind is int else "a"
    limits = (("of at least", least), ("above", above), ("at most", most), ("below", below))
    bound = " and ".join(f"{word} {limit}" for word, limit in limits if limit is not None)
    message = (
        f"{name} must be {article} {kind.__name__}{bound and ' ' + bound}; got {value!r}. "
        f"Pass {name}=... of that kind, or leave it out for the default."
    )
    if not isinstance(value, numeric) or (isinstance(value, bool) and kind is not bool):
        raise TypeError(message)
    within = (  # each False for NaN
        least is None or value >= least,
        above is None or value > above,
        most is None or value <= most,
        below is None or value < below,
    )
    if not all(within):
        raise ValueError(message)


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """``value`` must be one of the strings ``choices``."""
    if not isinstance(value, str) or value not in choices:
        listed = " or ".join(f'"{choice}"' for choice in choices)
        raise ValueError(f"{name} must be {listed}; got {value!r}. Pass one of these.")


def check_callable(name: str, value: Any, form: str) -> None:
    """``value`` must be callable, as ``form`` shows."""
    if not callable(value):
        raise TypeError(f"{name} must be callable as {form}; got {value!r}. Pass a function.")
