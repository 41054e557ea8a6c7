"""A command-line flag for each field of a settings dataclass."""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
from collections.abc import Mapping
from functools import partial
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from .results import table


def flag(name: str) -> str:
    """The flag of a field."""
    return "--" + name.replace("_", "-")


def add_flags(group: argparse._ArgumentGroup, kind: type) -> None:
    """A flag for each field, absent from the namespace unless given."""
    hints, described = get_type_hints(kind), _described(kind)
    for f in dataclasses.fields(kind):
        text = f.metadata.get("help", described.get(f.name, ""))
        options = {"default": argparse.SUPPRESS, "help": text.replace("%", "%%")}
        group.add_argument(flag(f.name), **options, **_form(f.name, hints[f.name]))


def _described(kind: type) -> dict[str, str]:
    """What the class docstring's Args say of each field."""
    entries = re.findall(r"^ {4}(\w+): (.+(?:\n {8}.+)*)$", inspect.getdoc(kind) or "", re.M)
    return {name: " ".join(text.split()) for name, text in entries}


def _form(name: str, hint: Any) -> dict[str, Any]:
    """How argparse is to read a field of that type."""
    optional = get_origin(hint) in (Union, UnionType) and NoneType in get_args(hint)
    if optional and len(get_args(hint)) == 2:
        (hint,) = set(get_args(hint)) - {NoneType}
    if get_origin(hint) is Literal and not optional:
        return {"choices": get_args(hint)}
    if hint is bool and not optional:
        return {"action": argparse.BooleanOptionalAction}
    several = get_origin(hint) is tuple and get_args(hint)[1:] == (Ellipsis,)
    kind = get_args(hint)[0] if several else hint
    if kind not in (int, float, str):
        raise TypeError(
            f"settings field {name} must be int, float, str, bool, a Literal, a tuple[int, ...] or "
            f"one of these or None; got {hint}. Leave it out of the settings."
        )
    metavar = {int: "N", float: "X", str: "TEXT"}[kind]
    read = partial(_read, kind=kind, several=several, optional=optional)
    return {"type": read, "metavar": f"{metavar},{metavar}" if several else metavar}


def _read(text: str, kind: type, several: bool, optional: bool) -> Any:
    """The value that a text stands for."""
    if optional and text.lower() == "none":
        return None
    try:
        found = tuple(kind(part) for part in (text.split(",") if several else [text]))
        sound = all(part == part for part in found)  # NaN is not
    except ValueError:
        sound = False
    if not sound:
        example = {int: "24", float: "0.1", str: "text"}[kind]
        wanted = f"{kind.__name__}, such as {example}"
        if several:
            wanted = f"{kind.__name__}s with commas between, such as {example},{example}"
        raise argparse.ArgumentTypeError(f"expected {wanted}; got {text!r}")
    return found if several else found[0]


def values(presets: Mapping[str, Any]) -> str:
    """A table of what each preset sets."""
    names = [f.name for f in dataclasses.fields(next(iter(presets.values())))]
    rows = [[flag(name), *(_shown(getattr(s, name)) for s in presets.values())] for name in names]
    return table(rows, ("", *presets))


def _shown(value: Any) -> str:
    """A value as one would type it."""
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool | None) else str(value)
