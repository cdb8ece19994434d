"""Run experiments' commands in processes forked after the imports: a second each instead of five.

A server process imports everything once and starts no computation; every command is a fork of it, with its own working folder,
standard output and error.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([
    "experiments.run.loop", "experiments.run.flags", "experiments.run.comparison",
    "cvxpy", "orbax.checkpoint", "tokenizers", "pyarrow.parquet",
    *(f"transformers.models.{name}.configuration_{name}" for name in ("auto", "bert", "roberta", "distilbert")),
])  # fmt: skip


class Ended(NamedTuple):
    """How a command ended."""

    status: int | None
    out: str
    err: str


def command(program: str, arguments: Sequence[str], folder: Path, *, seconds: float = 180.0) -> Ended:
    """Run `python -m PROGRAM ARGUMENTS` in `folder`; status None where it had not ended in time."""
    with tempfile.TemporaryDirectory() as aside:
        process = FORKS.Process(target=_child, args=(program, list(arguments), str(folder), aside))
        process.start()
        process.join(seconds)
        status = process.exitcode
        if status is None:
            process.kill()
            process.join()
        said = [(Path(aside) / name).read_text(errors="backslashreplace") for name in ("out", "err")]
    return Ended(status, *said)


def _child(program: str, arguments: list[str], folder: str, aside: str) -> None:
    status = 1
    try:
        os.chdir(folder)
        for descriptor, name in ((1, "out"), (2, "err")):
            file = os.open(os.path.join(aside, name), os.O_WRONLY | os.O_CREAT)
            os.dup2(file, descriptor)
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False, errors="strict")  # noqa: SIM115
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False, errors="backslashreplace")  # noqa: SIM115
        sys.argv = [program, *arguments]
        _main(program)
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _main(program: str) -> None:
    from experiments import alpaca, glue
    from experiments.run import comparison
    from experiments.run.cli import main

    mains = {"experiments.glue": glue.main, "experiments.alpaca": alpaca.main, "experiments.compare": comparison.run}
    main(mains[program], program)


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    """Map every path under a folder, links not followed, to its size and the time of its last change."""
    found = {}
    for parent, folders, files in os.walk(folder):
        for name in (name for name in (*folders, *files) if name != ".jaxprune.lock"):
            path = Path(parent) / name
            about = path.lstat()
            found[str(path.relative_to(folder))] = (about.st_size if path.is_file() else 0, about.st_mtime_ns)
    return found


def assert_refused(program: str, arguments: Sequence[str], folder: Path, message: str) -> None:
    """Check that a command ends with status 2 and one line that matches, and that nothing in `folder` is new or changed."""
    before = listing(folder)
    ended = command(program, arguments, folder)
    lines = [line for line in ended.err.splitlines() if line.strip()]
    said = f"status {ended.status}\n{ended.out}\n{ended.err}"
    assert ended.status == 2, said
    assert len(lines) == 1 and lines[0].startswith(f"{program}: error: ") and len(lines[0]) < 700, said
    assert re.search(message, lines[0]), said
    assert listing(folder) == before, said
