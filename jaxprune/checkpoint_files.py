"""One checkpoint on the disk: written, described, checked and read.

`STEP/state/` is Orbax's; `STEP/description.json` says what it holds, with a checksum of every file of it, because Orbax hands
back wrong values in silence where a bit has flipped on the disk.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

_DESCRIPTION = "description.json"
# Ends the names of what is being written or deleted; nothing else is ever swept away.
UNFINISHED = ".jaxprune-tmp"


class Damaged(Exception):
    """A checkpoint is not what was written; the message says what is wrong."""


def write(folder: Path, saved: dict[str, Any], arrays: Mapping[str, jax.Array]) -> None:
    """Write the arrays, then the description with a checksum of each file they are in, and of itself."""
    # Orbax refuses arrays of size zero; their shapes say it all.
    host = {name: np.asarray(array) for name, array in arrays.items() if array.size}
    ocp = _orbax()
    failed: list[Exception] = []

    class Patient(ocp.type_handlers.NumpyHandler):
        """Goes on after a write that failed: Orbax leaves the other writes to run on, and to complain, when it is gone."""

        async def _open_and_write(self, *args: Any, **kwargs: Any) -> None:
            try:
                await super()._open_and_write(*args, **kwargs)
            except Exception as error:
                failed.append(error)

    registry = ocp.type_handlers.create_type_handler_registry((np.ndarray, Patient(deepcopy_host_arrays=False)))
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(type_handler_registry=registry)) as writer:
            writer.save(folder / "state", args=ocp.args.PyTreeSave(host))
    finally:
        if failed:
            raise failed[0]
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    saved = {**saved, "files": {path.relative_to(folder).as_posix(): _checksum(path) for path in files}}
    whole = {"crc32": zlib.crc32(json.dumps(saved).encode()), "checkpoint": saved}
    with open(folder / _DESCRIPTION, "w", encoding="ascii") as file:
        json.dump(whole, file)
        file.flush()
        os.fsync(file.fileno())


def read(folder: Path) -> dict[str, np.ndarray]:
    """Read the arrays of a checkpoint that is known to be whole."""
    ocp = _orbax()
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as reader:
        return reader.restore(folder / "state", args=ocp.args.StandardRestore())


def _orbax() -> Any:
    import orbax.checkpoint as ocp

    # Orbax reports on every step it takes; what a user must know is raised or returned.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    return ocp


def description(folder: Path) -> dict[str, Any]:
    """Read what a folder says of itself; anything but a description of this very folder is damage."""
    try:
        whole = json.loads((folder / _DESCRIPTION).read_bytes())
        saved = whole["checkpoint"]
        step, sound = str(saved["step"]), whole["crc32"] == zlib.crc32(json.dumps(saved).encode())
    except OSError as error:
        raise Damaged(_unread(_DESCRIPTION, error)) from None
    except (ValueError, TypeError, LookupError, RecursionError):
        raise Damaged(f"{_DESCRIPTION} is not as it was written") from None
    if not sound:
        raise Damaged(f"{_DESCRIPTION} is not as it was written")
    if step != folder.name:
        raise Damaged(f"it was saved as step {step}")
    return saved


def checked(folder: Path) -> dict[str, Any]:
    """Read what a folder says of itself, and compare every file with it."""
    saved = description(folder)
    for name, expected in saved["files"].items():
        try:
            found = _checksum(folder / name)
        except OSError as error:
            raise Damaged(_unread(name, error)) from None
        if found != expected:
            change = f"has {found[0]} bytes of {expected[0]}" if found[0] != expected[0] else "is not as it was written"
            raise Damaged(f"{name} {change}")
    return saved


def _unread(name: str, error: OSError) -> str:
    return f"{name} is missing" if isinstance(error, FileNotFoundError) else f"{name}: {os.strerror(error.errno or 0)}"


def _checksum(path: Path) -> list[int]:
    """Return the size of a file and its CRC-32."""
    size, crc = 0, 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return [size, crc]


def delete(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink()
    else:
        shutil.rmtree(path)


def errno_of(error: Exception) -> int | None:
    """Return the number of the system's error behind an exception, None where there is none."""
    if isinstance(error, OSError):
        return error.errno
    said = re.search(r"os_error_code='(\d+)'", str(error))  # tensorstore raises a ValueError that ends so
    return int(said[1]) if said else None
