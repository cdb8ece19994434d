"""Ctrl-C and SIGTERM: one line and the end, at once; while a run trains, after the step and with everything saved.

A thread waits for the signals, because the main thread hears them only between two lines of Python: compiling a step takes
half a minute in one call, and an exception raised in the middle of an import may be swallowed there.
"""

from __future__ import annotations

import contextlib
import os
import signal

TYPE_CHECKING = False
if TYPE_CHECKING:  # imported where they are used, so that `hold` is called a few milliseconds after the process began
    import subprocess
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path
    from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_last_words: list[Callable[[], object]] = []  # what to do before the process ends by a signal, the latest first
_training: list[Stop] = []


class Stopped(Exception):
    """A run was stopped by a signal, after its state was saved."""

    def __init__(self, number: int, where: str) -> None:
        super().__init__(f"by {signal.Signals(number).name} {where}")
        self.signal = number


class Stop:
    """Hear the first SIGTERM or Ctrl-C while the `with` statement lasts, instead of ending; a second one ends the process.

    Args:
      told: what the signal brings about, for the line that says it was heard.
      first: called with the signal's number when it comes, in another thread.
    """

    def __init__(self, told: str, first: Callable[[int], object] = lambda number: None) -> None:
        self.signal, self.told, self.first = 0, told, first

    def __call__(self) -> bool:
        return bool(self.signal)

    def __enter__(self) -> Stop:
        _training.append(self)
        return self

    def __exit__(self, *exception: Any) -> None:
        _training.remove(self)


def hold() -> None:
    """Keep the signals back until `install`, over a second start of this Python too."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)


def install(program: str) -> None:
    """From now on a signal is answered whatever the main thread does; one that is ignored (nohup) stays so."""
    import threading

    heard, written = os.pipe()
    os.set_blocking(written, False)
    signal.set_wakeup_fd(written, warn_on_full_buffer=False)
    for number in _SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            # The byte that the interpreter writes to the pipe is what counts.
            signal.signal(number, lambda *_: None)
    threading.Thread(target=_watch, args=(program, heard), daemon=True, name="signals").start()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)


def _watch(program: str, heard: int) -> None:
    while True:
        number = os.read(heard, 1)[0]
        if number not in _SIGNALS:
            continue
        name = signal.Signals(number).name
        stop = _training[-1] if _training else None
        if stop is None or stop.signal:
            for last in reversed(_last_words):
                with contextlib.suppress(Exception):  # the process ends here, whatever happens
                    last()
            before = "\n" if _training else ""  # a progress bar may stand in this line
            os.write(
                2, f"{before}{program}: {'interrupted' if number == signal.SIGINT else f'ended by {name}'}\n".encode()
            )
            os._exit(128 + number)
        stop.signal = number
        os.write(2, f"\n{program}: {name}: {stop.told}; once more ends at once\n".encode())
        stop.first(number)


@contextlib.contextmanager
def before_end(last: Callable[[], object]) -> Iterator[None]:
    """Have `last` called should a signal end the process while the block runs."""
    _last_words.append(last)
    try:
        yield
    finally:
        _last_words.remove(last)


def run(command: Sequence[str], **settings: Any) -> subprocess.CompletedProcess[str]:
    """Run a command as `subprocess.run` does with text; should a signal end this process, that one is killed too."""
    import subprocess

    with subprocess.Popen(command, text=True, **settings) as process, before_end(process.kill):
        out, err = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@contextlib.contextmanager
def temporary_folder() -> Iterator[Path]:
    """Make a folder for the length of the block, removed too when a signal ends the process."""
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name, before_end(lambda: _remove(name)):
        yield Path(name)


def _remove(folder: str) -> None:
    import shutil

    shutil.rmtree(folder, ignore_errors=True)
