"""Short reprs: shapes and settings instead of arrays, so that a state of millions of numbers is a few lines."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jaxprune.errors import shown


def one_line(self: Any) -> str:
    """Return the repr of an adapter: its sizes and settings, such as `Lora(384 -> 1536, rank 8, scale 2.0)`.

    Fields need not be arrays: JAX and Optax put flags and shapes in their place.
    """
    fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
    a: Any
    b: Any
    a, b = fields.get("a", fields.get("down")), fields.get("b", fields.get("up"))
    parts = []
    if len(getattr(a, "shape", ())) > 1 and len(getattr(b, "shape", ())) > 1:
        parts += [f"{a.shape[0]} -> {b.shape[-1]}", f"rank {a.shape[-1]}"]
        fields = {name: value for name, value in fields.items() if not _is_array(value)}
    for name, value in fields.items():
        if value is True:
            parts.append(name)
        elif isinstance(value, tuple | list):
            parts += [f"{len(value)} {name}"] if value else []
        elif value is not None and value is not False:
            parts.append(f"{name} {brief(value)}")
    return f"{type(self).__name__}({', '.join(parts)})"


def fields_line(self: Any) -> str:
    """Return the repr of a NamedTuple: the fields that are not as their defaults, each shortened by `brief`."""
    defaults = self._field_defaults
    parts = [
        f"{name}={brief(field)}"
        for name, field in zip(self._fields, self, strict=True)
        if name not in defaults or field is not defaults[name]
    ]
    return f"{type(self).__name__}({', '.join(parts)})"


def brief(value: Any) -> str:
    """Return a value in a few characters: an array by type and shape, a function by name, a long collection by its length."""
    if _is_array(value):
        return f"{value.dtype}[{', '.join(map(str, value.shape))}]"
    if isinstance(value, Mapping | list) or (isinstance(value, tuple) and not hasattr(value, "_fields")):
        items = list(value.values()) if isinstance(value, Mapping) else value
        if len(items) <= 8 and all(isinstance(item, str | int | float | None) for item in items):
            return shown(dict(value) if isinstance(value, Mapping) else value)
        return f"<{len(items)} {'entries' if isinstance(value, Mapping) else 'items'}>"
    if isinstance(value, functools.partial):
        return brief(value.func)
    if callable(value) and hasattr(value, "__qualname__"):
        return value.__qualname__.replace(".<locals>", "")
    return repr(float(f"{value:.6g}")) if isinstance(value, float) else shown(value)


def _is_array(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype")


def state_lines(self: Any) -> str:
    """Return the repr of a training state, in three lines.

    What cannot be read is a question mark: while a function is traced, or after the state was donated.
    """

    def read(f: Callable[[], int]) -> str:
        try:
            return f"{f():,}"
        except Exception:  # tracers, shapes without values, deleted arrays, arrays that lie with other processes
            return "?"

    adapters, masks = self.adapters, self.masks
    if not (isinstance(adapters, Mapping) and isinstance(masks, Mapping)):  # a tree of axes or shardings
        return fields_line(self)
    live = read(lambda: sum(int(np.sum(np.asarray(mask) > 0)) for mask in masks.values()))
    total = read(lambda: sum(mask.size for mask in masks.values()))
    count = read(lambda: sum(adapter.count(masks.get(path)) for path, adapter in adapters.items()))
    beside = sum(leaf.size for leaf in jax.tree.leaves(self.weights) if hasattr(leaf, "size"))
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self.opt_state) if hasattr(leaf, "dtype"))
    kinds = (
        ", ".join(f"{n} {kind}" for kind, n in Counter(type(x).__name__ for x in adapters.values()).items())
        or "no adapters"
    )
    return (
        f"{type(self).__name__}(step {read(lambda: int(self.step))}: {kinds}\n"
        f"  {live} of {total} components live, {count} parameters in adapters, {beside:,} in weights\n"
        f"  optimizer state {size / 2**20:.1f} MiB)"
    )
