"""Put numbers and pictures on disk: every file appears whole or not at all."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxprune.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 150


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
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}; name a file that can be written") from None


def write_figure(path: str | os.PathLike[str], figure: Figure) -> None:
    """Write a figure as a PNG.

    Raises:
      UsageError: the file cannot be written.
    """
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    write_whole(Path(path), picture.getvalue())


def write_whole(path: Path, content: bytes) -> None:
    """Write a file beside its place and move it there, so that readers see the old one or the new one.

    Raises:
      UsageError: the file cannot be written.
    """
    new = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        new.write_bytes(content)
        new.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            new.unlink()
        raise UsageError(f"cannot write {path}: {error.strerror}; name a file that can be written") from None


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
