"""Adapters that PEFT has no format for, such as bottlenecks, in a folder of jaxprune's own.

`adapters.json` holds `{"format": "jaxprune-adapters", "version": 2, "adapters": {PATH: {"kind": NAME, "settings": {...}}},
"weights": [PATH, ...]}`: the class of every adapter in `jaxprune.adapters`, its fields that are no arrays, and the trained
weights. `adapters.safetensors` holds the arrays under `PATH:FIELD`, the mask of a site under `PATH:mask` and a weight under its
path.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxprune import adapters as kinds
from jaxprune.adapters import Adapters, Masks
from jaxprune.adapters.base import check_mappings, check_mask, leaves_of
from jaxprune.adapters.weight import NONE, Weights, check_weights
from jaxprune.errors import UsageError, reason, shown
from jaxprune.files import checked_path, new_folder

ADAPTERS, ARRAYS = "adapters.json", "adapters.safetensors"
_FORMAT = {"format": "jaxprune-adapters", "version": 2}


def save_adapters(
    adapters: Adapters,
    masks: Masks,
    folder: str | os.PathLike[str],
    *,
    weights: Weights = NONE,
    beside: Mapping[str, bytes] | None = None,
) -> None:
    """Write adapters of any kind, their masks and trained weights as they are, for `load_adapters`.

    Args:
      adapters: {path: adapter}.
      masks: {site path: mask}.
      folder: appears whole or not at all; adapters that were there before are replaced.
      weights: {leaf path: array}.
      beside: {name: content} of further files to write into the folder.

    Raises:
      UsageError: an adapter is of no kind in `jaxprune.adapters`, or the folder cannot be written or holds other files.
    """
    from safetensors.numpy import save_file

    check_mappings(adapters, masks)
    check_weights(weights)
    described: dict[str, Any] = {}
    arrays = {f"{path}:mask": np.asarray(masks[path]) for path in adapters if path in masks}
    for path, adapter in adapters.items():
        kind = type(adapter).__name__
        if getattr(kinds, kind, None) is not type(adapter):
            raise UsageError(f"the adapter at {shown(path)} is {shown(adapter)}; expected one of jaxprune.adapters")
        leaves = leaves_of(adapter)
        settings = {f.name: getattr(adapter, f.name) for f in dataclasses.fields(adapter) if f.name not in leaves}
        described[path] = {"kind": kind, "settings": settings}
        arrays |= {f"{path}:{name}": np.asarray(leaf) for name, leaf in leaves.items()}
    arrays |= {path: np.asarray(value) for path, value in weights.items()}
    said = {**_FORMAT, "adapters": described, "weights": list(weights)}
    beside = beside or {}
    with new_folder(checked_path("folder", folder), (ADAPTERS, ARRAYS, *beside), "adapters") as new:
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, new / ARRAYS)
        (new / ADAPTERS).write_text(json.dumps(said, indent=2, default=float) + "\n")
        for name, content in beside.items():
            (new / name).write_bytes(content)


def load_adapters(folder: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Read what `save_adapters` wrote.

    Raises:
      UsageError: a file is missing, damaged, or of another format or version.

    Returns:
      (adapters, masks, weights), as they were saved.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    folder = checked_path("folder", folder)
    try:
        said = json.loads((folder / ADAPTERS).read_text(encoding="utf-8"))
        if not isinstance(said, dict) or {name: said.get(name) for name in _FORMAT} != _FORMAT:
            raise ValueError(f"{ADAPTERS} is not of version {_FORMAT['version']} of {_FORMAT['format']}")
        left = load_file(folder / ARRAYS)
        bad = [name for name, array in left.items() if not np.isfinite(array).all()]
        if bad:
            raise ValueError(f"{len(bad)} arrays hold NaN or infinity, first {bad[0]!r}")
        adapters, masks = {}, {}
        for path, of in said["adapters"].items():
            adapters[path] = _adapter(path, of, left)
            if (mask := left.pop(f"{path}:mask", None)) is not None:
                masks[path] = jnp.asarray(mask)
        weights = {path: jnp.asarray(left.pop(path)) for path in said["weights"]}
        if left:
            raise ValueError(f"array {next(iter(left))!r} belongs to no adapter")
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(f"{folder} cannot be read as adapters of jaxprune: {reason(error)}; save it again") from None
    for path, adapter in adapters.items():
        check_mask(path, adapter, masks.get(path))
    return adapters, masks, weights


def _adapter(path: str, of: Mapping[str, Any], arrays: dict[str, np.ndarray]) -> Any:
    kind = getattr(kinds, str(of["kind"]), None)
    if not isinstance(kind, type) or not dataclasses.is_dataclass(kind):
        raise ValueError(f"{path!r} is of the unknown kind {shown(of['kind'])}")
    names = [f.name for f in dataclasses.fields(kind) if f"{path}:{f.name}" in arrays]
    return kind(**{name: jnp.asarray(arrays.pop(f"{path}:{name}")) for name in names}, **of["settings"])
