"""Benchmarks: `python -m experiments.bench NAME ...` runs `main(argv)` of the module `experiments/bench_NAME.py`."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from experiments.memory import set_up_process
from jaxprune.errors import UsageError, nearest


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark that the first argument names with the rest; return the exit status."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    known = sorted(path.stem.removeprefix("bench_") for path in Path(__file__).parent.glob("bench_*.py"))
    if name in ("-h", "--help"):
        print(f"usage: python -m experiments.bench {{{','.join(known)}}} ...")
        return 0
    try:
        if name not in known:
            raise UsageError(f"benchmark {name!r} is not known; nearest names: {nearest(name, known)}")
        importlib.import_module(f"experiments.bench_{name}").main(rest)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    set_up_process()
    sys.exit(main())
