"""The benchmarks: ``python -m benchmarks [PART…]``.

Parts: profile (sweeps and seconds to a target, over all problems), adam (against nested Adam and
the paper's iteration on trained decoders), budgets (what few sweeps come to), units (what the units
of x and of the loss matter), attacks (on a classifier, within bounds), shears (maps far from
normal), sharp (losses that bend sharply), overhead (a step over a bare sweep), memory (the same),
stragglers (a batch with one hard problem), warm (what warm starts save), gradients, recycle (what a
solve's differences spare its backward pass), peers, gpu.
Prints each table and writes results.json and profile.png to --out.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.decoders import trained_models
from benchmarks.problems import problems

#: With the problems of the profile, or with problems of their own.
SHARED = ("profile", "adam", "budgets")
OWN = (
    "units", "attacks", "shears", "sharp", "overhead", "memory", "stragglers", "warm", "gradients",
    "recycle", "peers", "gpu",
)  # fmt: skip


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("parts", nargs="*", metavar="PART", default=[*SHARED, *OWN], help="default: all")
    add("--quick", action="store_true", help="little of everything, to see that it works")
    add("--threads", type=int, default=1, help="of torch (default %(default)s)")
    add("--quiet", action="store_true", help="no progress bars")
    add("--out", type=Path, default=Path("out/benchmarks"), help="folder (default %(default)s)")
    both = {"type": Path, "action": "append", "default": []}
    add("--generator", **both, help="folder of examples/generative.py: adds its decoder; again for "
        "another one")  # fmt: skip
    add("--data", **both, help="folder of the images for that decoder, of faces or of MNIST")
    options = parser.parse_args(arguments)
    unknown = set(options.parts) - {*SHARED, *OWN}
    if unknown:
        parser.error(f"PART must be of {', '.join((*SHARED, *OWN))}; got {', '.join(unknown)}")
    if options.threads < 1:
        parser.error(f"--threads must be positive; got {options.threads}")
    if len(options.generator) != len(options.data):
        parser.error("each --generator goes with a --data: a decoder, and the images to find")
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    bar = partial(tqdm, disable=options.quiet, leave=False)
    pairs = list(zip(options.generator, options.data, strict=True))
    made = problems(trained_models(options.out, pairs, quick=options.quick, bar=bar))
    path = options.out / "results.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for part in options.parts:
        module = importlib.import_module(f"benchmarks.{part}")
        shared = (made,) if part in SHARED else ()
        results[part] = module.measure(*shared, quick=options.quick, bar=bar)
        results["torch"], results["threads"] = torch.__version__, torch.get_num_threads()
        options.out.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=1), encoding="utf-8")
        print(f"## {part}\n\n{module.table(results[part])}\n", flush=True)
        if part == "profile":
            module.draw(results[part], options.out / "profile.png")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as error:
        sys.exit(f"benchmarks: {error}")
