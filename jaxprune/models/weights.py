"""Open the safetensors files of a model folder: names and shapes now, arrays when they are read, and never a pickle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jaxprune.errors import UsageError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def has_weights(folder: Path) -> bool:
    """Say whether `folder` has weights that `open_weights` can open."""
    return (folder / SINGLE).is_file() or (folder / INDEX).is_file()


def open_weights(folder: Path) -> dict[str, Any]:
    """Map each array's name to a lazy, memory-mapped slice of its file.

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
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{folder / INDEX} is not an index of shards ({error}); fetch it again") from None
    if absent := [name for name in shards if not (folder / name).is_file()]:
        raise UsageError(f"{folder} lacks the shards {', '.join(absent)} that {INDEX} names; fetch them again")
    opened = {name: _slices(folder / name) for name in shards}
    if absent := [key for key, name in shard_of.items() if key not in opened[name]]:
        raise UsageError(f"{INDEX} in {folder} places arrays where they are not: {', '.join(absent)}; fetch it again")
    return {key: opened[name][key] for key, name in shard_of.items()}


def _slices(path: Path) -> dict[str, Any]:
    import ml_dtypes  # noqa: F401  registers bfloat16 with numpy
    from safetensors import SafetensorError, safe_open

    try:
        file = safe_open(path, framework="numpy")
        return {key: file.get_slice(key) for key in file.keys()}
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{path} is truncated or not a safetensors file ({error}); fetch it again") from None
