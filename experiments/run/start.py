"""How every command begins: Ctrl-C ends it from the first moment, malloc keeps memory, and only then are the libraries imported.

XLA takes a step's temporary memory from malloc and frees it at the end. glibc gives blocks of that size back to the
kernel, so that every step touches over a gigabyte of fresh pages, 4 KiB at a time. Told to keep what is freed, and to
ask for pages of 2 MiB, a step at RoBERTa-base size took 2.35 instead of 3.1 s on two cores, and one at MiniLM size 0.36
instead of 0.46 s (`python -m experiments.bench step`; with GLIBC_TUNABLES set to anything, nothing is changed).

LAPACK gets one thread unless OPENBLAS_NUM_THREADS says otherwise: what is inverted here is small, and on cores that other
work shares its threads wait for each other (0.1 s against up to 5 s for an event that prunes ranks of 512 by curvature).
"""

from __future__ import annotations

import importlib
import os
import sys

from experiments.run.stopping import hold, install

# One arena, as only the main one can keep large blocks; no block of its own mapping; nothing trimmed; huge pages.
_TUNABLES = (
    f"glibc.malloc.arena_max=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold={2**46}:glibc.malloc.hugetlb=1"
)


def start(program: str, target: str) -> None:
    """Run a command and end the process with its status.

    Args:
      program: its name in messages, such as `experiments.glue`.
      target: `module:function`, called with the list of arguments; the module is imported here, as that takes seconds.
    """
    hold()
    _restart()
    install(program)
    # A line is out when it is complete, whatever ends the process; and names that are no text can be printed.
    sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")  # pyright: ignore[reportAttributeAccessIssue]
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # transformers otherwise advises, on every start, to install PyTorch for models that are not used here.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    # In a terminal alone, where it goes away again.
    if waiting := sys.stderr.isatty():
        sys.stderr.write("importing the libraries ...")
        sys.stderr.flush()
    from experiments.run.cli import main

    def run(arguments: list[str]) -> None:
        module, _, name = target.partition(":")
        function = getattr(importlib.import_module(module), name)
        if waiting:
            sys.stderr.write("\r\033[K")
            sys.stderr.flush()
        function(arguments)

    main(run, program)


def _restart() -> None:
    """Start this Python again with malloc set to keep memory, unless it is so already or the C library is another.

    Glibc reads its tunables only when a process starts, hence the second start, which takes 20 ms.
    """
    if "GLIBC_TUNABLES" in os.environ or not sys.platform.startswith("linux"):
        return
    try:
        glibc = os.confstr("CS_GNU_LIBC_VERSION") or ""
    except (OSError, ValueError):
        return
    if glibc.startswith("glibc"):
        os.execve(sys.executable, sys.orig_argv, {**os.environ, "GLIBC_TUNABLES": _TUNABLES})
