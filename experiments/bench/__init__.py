"""Benchmarks: `python -m experiments.bench NAME ...` runs `main(arguments)` of the module `experiments/bench/NAME.py`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

PROGRAM = "experiments.bench"


def run(arguments: Sequence[str]) -> None:
    """Run the benchmark that the first argument names, with the others."""
    from jaxprune.errors import UsageError, nearest  # here, as importing jaxprune takes a second

    name, *rest = arguments or ["--help"]
    known = sorted(path.stem for path in Path(__file__).parent.glob("[a-z]*.py"))
    if name in ("-h", "--help"):
        print(f"usage: python -m {PROGRAM} {{{','.join(known)}}} ...")
        sys.exit(0)
    if name not in known:
        raise UsageError(f"benchmark {name!r} is not known; nearest names: {nearest(name, known)}")
    importlib.import_module(f"experiments.bench.{name}").main(rest)
