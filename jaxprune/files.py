"""Put files and folders on disk: each appears whole or not at all, whenever the process is killed or the power fails."""

from __future__ import annotations

import contextlib
import fnmatch
import json
import math
import os
import re
import shutil
import stat
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxprune.errors import UsageError, reason, shown


def write_json(path: str | os.PathLike[str], obj: Any) -> None:
    """Write an object as an indented JSON file that readers see whole, old or new.

    NumPy and JAX values become numbers and lists; NaN and infinity, which JSON lacks, become null.

    Raises:
      UsageError: the file cannot be written.
      TypeError: the object holds something JSON has no form for.
    """
    write_whole(Path(path), (json.dumps(_plain(obj), indent=2, allow_nan=False) + "\n").encode())


def append_jsonl(path: str | os.PathLike[str], obj: Any) -> None:
    """Append an object to a file with one JSON object a line, converted as in `write_json`.

    A last line that was cut off when the process before was killed is ended first, so that only that line is lost.

    Raises:
      UsageError: the file cannot be written.
      TypeError: the object holds something JSON has no form for.
    """
    line = (json.dumps(_plain(obj), allow_nan=False) + "\n").encode()
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                line = line if file.read(1) == b"\n" else b"\n" + line
            file.write(line)
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot write {path}: {reason(error)}; name a file that can be written") from None


def write_whole(path: Path, content: bytes) -> None:
    """Write a file beside its place and move it there, so that readers see the old one or the new one.

    Raises:
      UsageError: the file cannot be written.
    """
    new = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new.write_bytes(content)
        _to_disk(new)
        new.replace(path)
        _names_to_disk(path.parent)
    except (OSError, ValueError) as error:  # a ValueError is a name that no file can have
        with contextlib.suppress(OSError, ValueError):
            new.unlink()
        raise UsageError(f"cannot write {path}: {reason(error)}; name a file that can be written") from None


def checked_path(what: str, given: str | os.PathLike[str]) -> Path:
    """Return a path that a user gave; what is none, or empty, is a UsageError."""
    try:
        name = os.fspath(given)
        os.fsencode(name)
    except (TypeError, UnicodeEncodeError):
        name = None
    if not isinstance(name, str) or not name.strip() or "\0" in name:
        raise UsageError(f"{what} {shown(given)} cannot be used: expected the name of a folder")
    return Path(name)


@contextlib.contextmanager
def new_folder(folder: Path, may_replace: Sequence[str], what: str) -> Iterator[Path]:
    """Give an empty folder beside `folder` to write files into; it takes its place when the block ends well.

    Readers see the old folder or the new one under its name. Two names cannot be exchanged in one step, so for the instant
    between two renames the old one is `.NAME.PROCESS.old` only; where a process was killed there, the next use brings it back,
    as it removes what others left when they were killed. A link is not followed: what it points to is never replaced.

    Args:
      folder: where the files go; its parents are made.
      may_replace: names, or patterns of them, that a folder to be replaced may hold; it may hold plain files only.
      what: what is written, for messages.

    Raises:
      UsageError: the folder cannot be written, is a link, or holds other files.
    """
    from safetensors import SafetensorError

    folder = Path(os.path.abspath(folder))
    new, old = _aside(folder, f"{os.getpid()}.new"), _aside(folder, f"{os.getpid()}.old")
    try:
        _check_replaceable(folder, may_replace, what)
        folder.parent.mkdir(parents=True, exist_ok=True)
        _clear_up(folder, may_replace)
        new.mkdir()
        yield new
        # Some writers make files for their owner only: they get the mode that the umask left the folder.
        mode = stat.S_IMODE(new.stat().st_mode) & 0o666
        for path in sorted(new.iterdir()):
            path.chmod(mode)
            _to_disk(path)
        _names_to_disk(new)
        _check_replaceable(folder, may_replace, what)
        _swap(folder, new, old)
        _names_to_disk(folder.parent)
        _discard(old)
    except (OSError, SafetensorError) as error:
        raise UsageError(
            f"cannot write the {what} to {folder}: {reason(error)}; name a folder that can be written"
        ) from None
    finally:
        shutil.rmtree(new, ignore_errors=True)


def _swap(folder: Path, new: Path, old: Path) -> None:
    """Put the new folder at its place and the one that was there aside."""
    there = folder.exists()
    try:
        if there:
            folder.rename(old)
        new.rename(folder)
    except BaseException:  # an interrupt too
        if there and not folder.exists():
            old.rename(folder)
        raise


def _aside(folder: Path, end: str) -> Path:
    """Return the path beside a folder that is its name with an ending, or a checksum of it where that is too long."""
    name = os.fsencode(folder.name)
    return folder.parent / f".{folder.name if len(name) < 200 else f'{zlib.crc32(name):08x}'}.{end}"


def _check_replaceable(folder: Path, may_replace: Sequence[str], what: str) -> None:
    if why_not := _others(folder, may_replace):
        raise UsageError(f"{folder} {why_not}; name a new folder for the {what}")


def _others(folder: Path, may_replace: Sequence[str]) -> str:
    """Say what keeps a folder from being replaced, if anything."""
    if folder.is_symlink():
        return "is a link, and what it points to is never replaced"
    if not os.path.lexists(folder):
        return ""
    if not folder.is_dir():
        return "is a file"
    if folder.samefile(Path.cwd()):
        return "is the current folder, which cannot be replaced"
    for path in sorted(folder.iterdir()):
        known = any(fnmatch.fnmatchcase(path.name, pattern) for pattern in may_replace)
        if not known or path.is_symlink() or not path.is_file():
            return f"holds other files, such as {path.name!r}"
    return ""


def _clear_up(folder: Path, may_replace: Sequence[str]) -> None:
    """Bring back or remove what processes that are no more left beside a folder."""
    start, _, _ = _aside(folder, "").name.rpartition(".")
    for path in sorted(folder.parent.iterdir()):
        left = re.fullmatch(re.escape(start) + r"\.(\d{1,9})\.(new|old)", path.name)
        if not left or (int(left[1]) != os.getpid() and _runs(int(left[1]))):
            continue
        # The safetensors writer has a temporary file of its own in the new folder.
        if _others(path, [*may_replace, ".tmp*"] if left[2] == "new" else may_replace):
            continue
        if left[2] == "old" and not folder.exists():
            path.rename(folder)
        else:
            _discard(path)


def _discard(aside: Path) -> None:
    """Remove a folder, first renamed: a half of an old one must not be taken for one to bring back."""
    if aside.exists():
        aside = aside.rename(aside.with_suffix(".new"))
        shutil.rmtree(aside, ignore_errors=True)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it is another user's
        return True
    return True


def _to_disk(path: Path) -> None:
    """Wait until a file would outlast a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _names_to_disk(folder: Path) -> None:
    """Wait until the names in a folder would outlast a power cut, where the file system can do that."""
    with contextlib.suppress(OSError):
        _to_disk(folder)


def _plain(obj: Any) -> Any:
    if isinstance(obj, Mapping):
        return {str(key): _plain(value) for key, value in obj.items()}
    if isinstance(obj, list | tuple | set | frozenset):
        return [_plain(value) for value in obj]
    if isinstance(obj, os.PathLike):
        return os.fspath(obj)
    if hasattr(obj, "tolist"):
        return _plain(obj.tolist())
    return None if isinstance(obj, float) and not math.isfinite(obj) else obj
