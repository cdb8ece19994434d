"""The folder that a command writes to: made by it or empty, used by one process at a time, and nothing of another's removed.

A marker file lists what a command has made; whatever else lies in the folder is somebody's, and is never written over, removed
or followed. A lock file is held while a process works in the folder: the system frees it however the process ends.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.run.console import say
from jaxprune.errors import UsageError, reason
from jaxprune.files import write_json

MARKER, LOCK = ".jaxprune.json", ".jaxprune.lock"
_STEP = re.compile(r"\d+(\.old)?(\.jaxprune-tmp)?")  # what is made in checkpoints/


class Folder:
    """An output folder; leave the `with` statement to let others use it.

    Args:
      path: made by `begin`.
      names: the files and folders that the command may make in it, with a trailing `/` for folders.
      kind: what makes it, for messages.
    """

    def __init__(self, path: Path, names: Sequence[str], kind: str = "run") -> None:
        self.path, self._kind = path, kind
        self._names = {name.rstrip("/"): name.endswith("/") for name in names}
        # What is written beside its place, as a process leaves it that is killed before it moves it there.
        known = "|".join(map(re.escape, (*self._names, MARKER)))
        self._unfinished = re.compile(rf"\.({known})\.\d+\.(new|old)")
        self._lock: int | None = None
        self._known = False  # whether `check` found that an earlier run made the folder
        self._made: dict[str, list[str] | None] = {}  # name -> the files in a folder that is complete, None for any

    def __enter__(self) -> Folder:
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    @property
    def finished(self) -> bool:
        """Say whether a run that has ended lies here."""
        return (self.path / "summary.json").exists()

    def check(self, *, resume: bool, overwrite: bool, inputs: Mapping[str, Path]) -> None:
        """Find out whether the command may work here, and change nothing; a folder that an earlier run made is locked.

        Args:
          resume: whether it may go on with a run that lies here.
          overwrite: whether it may remove one.
          inputs: flag -> folder or file that the command reads, which must not be among what it removes.

        Raises:
          UsageError: it may not; the message says what lies there and what to do.
        """
        said = f"--output-dir {str(self.path)!r}"
        if resume and overwrite:
            raise UsageError("--resume goes on with a run and --overwrite removes it; give one of them")
        existing = next(p for p in (self.path, *self.path.absolute().parents) if os.path.lexists(p))
        if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
            raise UsageError(f"{said} cannot be written ({str(existing)!r} is no writable folder); choose another")
        if not self.path.is_dir():
            return
        if (self.path / LOCK).exists():
            self._take_lock()
        if not (self.path / MARKER).is_file():
            self._must_be_empty()
            return
        self._read_marker()
        self._known = True
        if foreign := next(self._foreign(), None):
            raise UsageError(
                f"{said} holds {foreign}, which no {self._kind} made; move it away or choose another folder"
            )
        if not (resume or overwrite):
            if self.finished:
                raise UsageError(
                    f"{said} holds a finished {self._kind}; pass --overwrite to replace it, or choose another"
                )
            raise UsageError(
                f"{said} holds an unfinished {self._kind}; pass --resume to go on with it, --overwrite to replace it, or choose "
                f"another"
            )
        for flag, path in inputs.items() if overwrite else ():
            for name in self._made:
                if path.resolve().is_relative_to((self.path / name).resolve()):
                    raise UsageError(
                        f"{flag} {str(path)!r} lies in what --overwrite removes; choose another --output-dir, or copy it first"
                    )

    def begin(self, *, clear: bool) -> None:
        """Make the folder and take hold of it; with `clear`, remove what the marker says an earlier run has made.

        Raises:
          UsageError: it cannot be written, or another process has taken hold of it since `check`.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if not self._known:
                if self._lock is None:
                    self._take_lock()
                self._must_be_empty()
            if clear:
                # Without its summary it is an unfinished run, whatever ends this process.
                for name in sorted(self._made, key=lambda name: name != "summary.json"):
                    _remove(self.path / name)
                self._made = {}
            for name in os.listdir(self.path):
                if self._unfinished.fullmatch(name):
                    _remove(self.path / name)
            self._write_marker()
        except OSError as error:
            raise UsageError(
                f"--output-dir {str(self.path)!r} cannot be written ({error.strerror}); choose another"
            ) from None

    def own(self, name: str) -> Path:
        """Put a file or folder on the list of what is made here, before it is made, and return its path."""
        assert name in self._names, name
        if self._made.get(name, ()) is not None:
            self._made[name] = None
            self._write_marker()
        return self.path / name

    def complete(self, name: str) -> None:
        """Write down the files of a folder that is complete: what comes to them later is not ours."""
        inside = self.path / name
        self._made[name] = sorted(str(path.relative_to(inside)) for path in _walk(inside))
        self._write_marker()

    # The marker

    def _read_marker(self) -> None:
        path = self.path / MARKER
        try:
            made = json.loads(path.read_bytes())["made"]
            if not all(made[name] is None or all(isinstance(x, str) for x in made[name]) for name in made):
                raise ValueError("made is no list of names")
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise UsageError(
                f"{str(path)!r}, the list of what a {self._kind} made there, is damaged ({reason(error)}); choose another "
                f"folder"
            ) from None
        self._made = {name: made[name] for name in made if name in self._names}

    def _write_marker(self) -> None:
        write_json(self.path / MARKER, {"made_by": "jaxprune", "kind": self._kind, "made": self._made})

    def _foreign(self) -> Iterator[str]:
        """Name what bears a name of ours and is not on the list, or is no longer what we made."""
        for name, folder in self._names.items():
            path = self.path / name
            if not os.path.lexists(path):
                continue
            if name not in self._made:
                yield repr(name)
            elif path.is_symlink() or path.is_dir() != folder:
                yield f"{name!r}, now {'a link' if path.is_symlink() else 'of another kind'}"
            elif folder:
                listed = self._made[name]
                for inside in sorted(_walk(path)):
                    part = inside.relative_to(path)
                    ours = (
                        _STEP.fullmatch(part.parts[0])
                        if name == "checkpoints"
                        else listed is None or str(part) in listed
                    )
                    if not ours:
                        yield repr(f"{name}/{part}")

    def _must_be_empty(self) -> None:
        found = sorted(name for name in os.listdir(self.path) if name != LOCK and not self._unfinished.fullmatch(name))
        if found:
            made = (
                "another process has begun there"
                if MARKER in found
                else f"it holds {found[0]!r}, which no {self._kind} made"
            )
            raise UsageError(f"--output-dir {str(self.path)!r}: {made}; choose a new or empty folder")

    # The lock

    def _take_lock(self) -> None:
        import fcntl

        try:
            lock = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            raise UsageError(
                f"--output-dir {str(self.path)!r} cannot be written ({LOCK}: {error.strerror}); choose another"
            ) from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(lock, 200, 0).decode(errors="replace").strip()
            os.close(lock)
            raise UsageError(
                f"--output-dir {str(self.path)!r} is in use by {holder or 'another process'}; wait for it, stop it, or choose "
                f"another"
            ) from None
        except OSError:
            # Some network file systems have no locks.
            os.close(lock)
            say("note", f"the file system of {self.path} has no locks: start no second {self._kind} there")
            return
        self._lock = lock
        holder = f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}\n"
        with contextlib.suppress(OSError):  # a full disk; the lock holds without it
            os.truncate(lock, 0)
            os.pwrite(lock, holder.encode(), 0)


def _walk(folder: Path) -> Iterable[Path]:
    """Yield everything under a folder, links not followed."""
    for parent, folders, files in os.walk(folder):
        yield from (Path(parent) / name for name in (*folders, *files))


def _remove(path: Path) -> None:
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path)  # which does not follow links
