"""From the command line to a dataclass and back to an exit status: every bad input is one line and status 2."""

from __future__ import annotations

import contextlib
import io
import re
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax

from experiments.run.stopping import Stopped
from jaxprune.errors import UsageError
from jaxprune.train import NonFiniteError

T = TypeVar("T")


def parse(config: type[T], arguments: Sequence[str], program: str) -> T:
    """Parse flags into `config`; tyro's boxes become one `UsageError` line."""
    return _parse(config, arguments, program, others=False)[0]


def parse_known(config: type[T], arguments: Sequence[str], program: str) -> tuple[T, list[str]]:
    """Parse the flags that `config` has, and return the others as they were given."""
    return _parse(config, arguments, program, others=True)


def parse_into(config: type[T], arguments: Sequence[str], program: str, *, description: str) -> T:
    """Parse flags into a dataclass of dataclasses, whose names are the titles of groups and no parts of flags."""
    return _parse(config, arguments, program, others=False, description=description)[0]


def _parse(
    config: type[T], arguments: Sequence[str], program: str, *, others: bool, description: str | None = None
) -> tuple[T, list[str]]:
    import tyro

    complaint = io.StringIO()
    about: Any = {"prog": program, "description": description, "config": (tyro.conf.OmitArgPrefixes,)}
    try:
        with contextlib.redirect_stderr(complaint):
            if others:
                return tyro.cli(config, args=list(arguments), return_unknown_args=True, **about)
            return tyro.cli(config, args=list(arguments), **about), []
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise UsageError(_one_line(complaint.getvalue())) from None


def _one_line(box: str) -> str:
    """Fold a boxed message into one line: its first paragraph, and the flag it suggests."""
    inner = [line.strip("│ ") for line in box.splitlines() if line.startswith("│")]
    # Where the terminal has no lines to draw with, there is no box, and its title stands over a rule of its own.
    lines, title = (inner, 0) if inner else ([line.strip() for line in box.splitlines()], 1)
    paragraphs = [*re.split(r"\n[─-]+\n", "\n".join(lines))[title:], ""]
    message = " ".join(paragraphs[0].split()).rstrip(".") or "the command line could not be understood"
    # Of a value that may be left open tyro says at length that it is neither None nor a number.
    message = re.sub(
        r"no type matching \S+ could be instantiated from \['(.*?)'\].*<class '(\w+)'>.*", r"\1 is no \2", message
    )
    if len(message) > 300:  # a value of thousands of characters
        message = f"{message[:200]} ... {message[-60:]}"
    suggestions = re.findall(r"^(--[\w-]+)", "\n".join(p for p in paragraphs if "meant" in p), re.MULTILINE)
    hint = f"; nearest known: {', '.join(dict.fromkeys(suggestions))}" if suggestions else ""
    return f"{message}{hint}; --help lists every flag"


def main(run: Callable[[list[str]], object], program: str) -> None:
    """Run on the command line's arguments, and exit.

    The status is 0 on success, 2 on wrong input, 1 where training broke off or the machine failed it, and 128 + n on signal n.
    """
    try:
        run(sys.argv[1:])
    except UsageError as error:
        _end(2, f"{program}: error: {error}")
    except NonFiniteError as error:
        _end(1, f"{program}: stopped: {error}")
    except Stopped as stopped:
        _end(128 + stopped.signal, f"{program}: stopped {stopped}")
    except BrokenPipeError:  # whoever read the output has gone, as `head` does
        sys.stdout = None
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        _end(1, f"{program}: stopped: {error.strerror or error}{where}")
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        _end(1, f"{program}: stopped: not enough memory; lower --batch-size, or raise --accumulate")


def _end(status: int, line: str) -> None:
    print(" ".join(line.splitlines()), file=sys.stderr)
    sys.exit(status)
