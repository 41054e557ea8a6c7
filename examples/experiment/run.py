"""The command line of a script, and the run that it asks for."""

from __future__ import annotations

import argparse
import dataclasses
import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from .flags import add_flags, values
from .results import machine, main_process, plain, write_json
from .solvers import SOLVERS

S = TypeVar("S")


@dataclass(frozen=True)
class Run(Generic[S]):
    """One run of a script: what was asked for, and where its results go.

    Args:
        name: the script's.
        preset: the name of the preset that the settings started from.
        settings: the script's own.
        out: folder of everything that the run writes.
        data: folder of the data sets; None: they are downloaded.
        seed: of everything random.
        solver: a name for ``solver()``.
        resume: go on from the newest checkpoint.
        quiet: no progress bars.
        command: the shell command that started the run.
    """

    name: str
    preset: str
    settings: S
    out: Path
    data: Path | None = None
    seed: int = 0
    solver: str = "joint-first"
    resume: bool = False
    quiet: bool = False
    command: str = ""
    began: float = field(default_factory=time.perf_counter, compare=False, repr=False)

    @property
    def configuration(self) -> dict[str, Any]:
        """What determines the results, ready for JSON."""
        return {
            "script": self.name,
            "preset": self.preset,
            "seed": self.seed,
            "solver": self.solver,
            "settings": plain(self.settings),
        }

    @property
    def resume_command(self) -> str:
        """The shell command that goes on with the run."""
        return self.command if self.resume else f"{self.command} --resume"

    def path(self, name: str) -> Path:
        """Where a file of that name goes; its folder is made."""
        path = self.out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def write(self, results: Mapping[str, Any], table: str) -> None:
        """Write results.json; print the table and where things are. Other processes do nothing."""
        if not main_process():
            return
        seconds = time.perf_counter() - self.began
        record = {
            "configuration": self.configuration,
            "machine": machine(),
            "seconds": seconds,
            "results": results,
        }
        write_json(self.path("results.json"), record)
        files = sorted(path.name + "/" * path.is_dir() for path in self.out.iterdir())
        print(f"{table}\n\n{seconds:.0f} s; in {self.out}/: {', '.join(files)}")


def parse(
    description: str | None,
    presets: Mapping[str, S],
    argv: Sequence[str] | None = None,
    *,
    name: str | None = None,
    solver: str = "joint-first",
) -> Run[S]:
    """Read the command line; a mistake in it ends the script with a message and status 2.

    Args:
        description: what the script does, for ``--help``; usually its ``__doc__``.
        presets: settings by name, all of one frozen dataclass; the first is the default. Each
            field is a flag that overrides the preset. Its type is its annotation: int, float, str,
            a tuple of one of these, or one of all these or None; a ``Literal`` of texts, or bool.
            Its help is its metadata's "help", or its line in the Args of the class docstring.
        argv: the arguments; None: those of the process.
        name: the script's; None: from the process.
        solver: what ``--solver`` is where it is not given.

    >>> @dataclass(frozen=True)
    ... class Settings:
    ...     steps: int = 100
    ...     channels: tuple[int, ...] = (24, 24)
    >>> presets = {"cpu": Settings(), "smoke": Settings(steps=2)}
    >>> run = parse(None, presets, ["--preset=smoke", "--channels=8,16"], name="digits")
    >>> run.settings
    Settings(steps=2, channels=(8, 16))
    >>> run.out.as_posix()
    'out/digits-smoke'
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = Path(sys.argv[0]).stem if name is None else name
    kind = type(next(iter(presets.values())))
    parser = argparse.ArgumentParser(
        prog=f"{name}.py",
        description=description,
        epilog=_epilog(name, presets),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_shared(parser, list(presets), name, solver)
    add_flags(parser.add_argument_group("settings, which override the preset's"), kind)
    found = vars(parser.parse_args(arguments))
    given = {f.name: found.pop(f.name) for f in dataclasses.fields(kind) if f.name in found}
    try:
        settings = dataclasses.replace(presets[found["preset"]], **given)
    except (ValueError, TypeError) as error:
        parser.error(str(error))
    found["out"] = found["out"] or Path("out") / f"{name}-{found['preset']}"
    return Run(name=name, settings=settings, command=_command(arguments), **found)


def _command(arguments: list[str]) -> str:
    """The shell command that starts this again; torchrun serves for every launcher."""
    processes = os.environ.get("WORLD_SIZE", "1")
    several = ["torchrun", "--nproc-per-node", processes]
    start = several if processes != "1" else sys.orig_argv[:1]
    return shlex.join([*start, sys.argv[0], *arguments])


def _add_shared(
    parser: argparse.ArgumentParser, presets: list[str], name: str, solver: str
) -> None:
    """The flags that every script has."""
    add = parser.add_argument_group("run").add_argument
    add("--preset", choices=presets, default=presets[0], help="default %(default)s; see below")
    add("--data", type=Path, metavar="DIR", help="folder of the data sets (default: download)")
    add("--out", type=Path, metavar="DIR", help=f"results (default out/{name}-PRESET)")
    add("--seed", type=_seed, default=0, metavar="N", help="of everything random (default 0)")
    found = (
        "of the inputs (default %(default)s: Adaptive(Joint()), which training's few sweeps suit); "
        "default is implicitopt's own, Adaptive()"
    )
    add("--solver", choices=SOLVERS, default=solver, help=found)
    add("--resume", action="store_true", help="go on from the newest checkpoint in --out")
    add("--quiet", action="store_true", help="no progress bars")


def _seed(text: str) -> int:
    """A seed: numpy's generators take no negative ones."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number from 0 up; got {text!r}")
    return int(text)


def _epilog(name: str, presets: Mapping[str, Any]) -> str:
    """The presets' values, and commands to begin with."""
    script, last = f"examples/{name}.py", list(presets)[-1]
    commands = [
        (f"python {script}", "the default preset"),
        (f"python {script} --preset {last} --out out/mine", "another, and where to"),
        (f"python {script} --preset {last} --out out/mine --resume", "after an interruption"),
        (f"torchrun --nproc-per-node 2 {script}", "two processes, each its GPU"),
    ]
    width = max(len(command) for command, _ in commands)
    lines = [f"{command:<{width}}  # {why}" for command, why in commands]
    blocks = {"presets": values(presets).splitlines(), "examples": lines}
    return "\n\n".join("\n  ".join([f"{title}:", *block]) for title, block in blocks.items())
