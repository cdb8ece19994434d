"""Open the safetensors files of a model folder: names and shapes now, arrays when they are read, and never a pickle."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxprune.errors import UsageError, clipped, reason

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
TYPES = ("F32", "F16", "BF16", "F64")  # what can be weights, as safetensors calls it


class Stored(NamedTuple):
    """An array in a safetensors file, which is memory-mapped: nothing is read before `read`."""

    path: Path
    name: str
    content: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Return its shape."""
        return tuple(self.content.get_shape())

    @property
    def dtype(self) -> str:
        """Return its type as safetensors calls it."""
        return self.content.get_dtype()

    def read(self) -> np.ndarray:
        """Return its values as float32.

        Raises:
          UsageError: some of them are NaN or infinite, or too large for float32.
        """
        with np.errstate(over="ignore"):
            array = np.asarray(self.content[:]).astype(np.float32, copy=False)
        finite = np.isfinite(array)
        if not finite.all():
            raise UsageError(
                f"{self.path}: {array.size - np.count_nonzero(finite)} of the {array.size} values of {self.name} are NaN "
                "or infinite in float32; get the weights again"
            )
        return array


def has_weights(folder: Path) -> bool:
    """Say whether `folder` has weights that `open_weights` can open."""
    return (folder / SINGLE).is_file() or (folder / INDEX).is_file()


def open_weights(folder: Path) -> dict[str, Stored]:
    """Map each array's name to where it is stored.

    Args:
      folder: holds `model.safetensors`, or `model.safetensors.index.json` and the shards it names.

    Raises:
      UsageError: there are no such files, one of them is missing or damaged, or the index disagrees with a shard.
    """
    if (folder / SINGLE).is_file():
        return _slices(folder / SINGLE)
    if not (folder / INDEX).is_file():
        pickles = sorted(p.name for pattern in PICKLES for p in folder.glob(pattern))
        if pickles:
            raise UsageError(
                f"{folder} has its weights only as a pickle ({pickles[0]}), which can run code when it is loaded; "
                f"expected {SINGLE}: convert it with `save_pretrained` of transformers, or take a safetensors revision"
            )
        raise UsageError(
            f"{folder} has no weights; expected {SINGLE} or {INDEX} in it (a pickle must be converted first)"
        )
    try:
        shard_of = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        shards = sorted(set(shard_of.values()))
        if any(Path(name).name != name for name in shards):
            raise ValueError("a shard is not a plain file name")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(f"{folder / INDEX} is not an index of shards ({reason(error)}); fetch it again") from None
    if absent := [name for name in shards if not os.path.isfile(folder / name)]:
        names = clipped(", ".join(absent))
        raise UsageError(f"{folder} lacks {len(absent)} shards that {INDEX} names: {names}; fetch them again")
    opened = {name: _slices(folder / name) for name in shards}
    if absent := [key for key, name in shard_of.items() if key not in opened[name]]:
        names = clipped(", ".join(absent))
        raise UsageError(f"{folder / INDEX} places arrays where they are not: {names}; fetch it again")
    return {key: opened[name][key] for key, name in shard_of.items()}


def _slices(path: Path) -> dict[str, Stored]:
    import ml_dtypes  # noqa: F401  registers bfloat16 with numpy
    from safetensors import SafetensorError, safe_open

    try:
        file = safe_open(path, framework="numpy")
        return {key: Stored(path, key, file.get_slice(key)) for key in file.keys()}
    except (SafetensorError, OSError, ValueError) as error:
        raise UsageError(f"{path} is truncated or not a safetensors file ({reason(error)}); fetch it again") from None
