"""What every script shares before and after its work: its command line, solver and results.

A script describes its settings as a frozen dataclass and gives presets of it; `parse` makes a flag
of every field. What comes back, a `Run`, knows the settings and the folder of the results.
"""

from .results import main_process, plain, table, write_json, write_text
from .run import Run, parse
from .solvers import SOLVERS, solver

__all__ = [
    "SOLVERS",
    "Run",
    "main_process",
    "parse",
    "plain",
    "solver",
    "table",
    "write_json",
    "write_text",
]
