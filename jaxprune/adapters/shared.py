"""One LoRA that several sites use, or several layers of a stacked site."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxprune.adapters.base import Array
from jaxprune.adapters.lora import Lora
from jaxprune.errors import UsageError

_LEAVES = ["a", "b"]
_SETTINGS = [field.name for field in dataclasses.fields(Lora) if field.name not in _LEAVES]


@functools.partial(jax.tree_util.register_dataclass, data_fields=_LEAVES, meta_fields=[*_SETTINGS, "members", "rows"])
@dataclass(frozen=True, repr=False)
class SharedLora(Lora):
    """Hold the factors, once, at the path of one of the sites that use them; a method's `view` spreads them.

    Attributes:
      members: paths of the other sites that use them.
      rows: for a stacked site, the layer whose factors each layer uses; empty otherwise.
    """

    members: tuple[str, ...] = ()
    rows: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        # A description read from JSON has lists, and settings must be hashable.
        object.__setattr__(self, "members", tuple(self.members))
        object.__setattr__(self, "rows", tuple(self.rows))

    @classmethod
    def of(cls, lora: Lora, members: tuple[str, ...] = (), rows: tuple[int, ...] = ()) -> SharedLora:
        """Make the LoRA of one site the one of several."""
        return cls(**_fields(lora), members=members, rows=rows)

    def merge(self, kernel: Array, mask: Array | None) -> Array:
        """Refuse: this is the adapter of several kernels."""
        return self.as_lora(mask).merge(kernel, mask)

    def as_lora(self, mask: Array | None) -> Lora:
        """Refuse: this is the adapter of several kernels."""
        raise UsageError(
            "a shared LoRA is no adapter of one site; pass on what the method's `seen(adapters, masks)` returns"
        )

    def spread(self, mask: Array) -> tuple[Lora, Array]:
        """Return the plain adapter and the mask that every site which shares them sees."""

        def take(leaf: Array) -> Array:
            if not self.rows:
                return leaf
            layers = leaf.reshape(-1, *leaf.shape[mask.ndim - 1 :])
            return layers[np.asarray(self.rows)].reshape(leaf.shape)

        return Lora(**{**_fields(self), "a": take(self.a), "b": take(self.b)}), take(mask)


def _fields(lora: Lora) -> dict[str, Any]:
    return {name: getattr(lora, name) for name in (*_LEAVES, *_SETTINGS)}
