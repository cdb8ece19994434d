"""One LoRA that several sites use."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import jax

from jaxprune.adapters.base import Array
from jaxprune.adapters.lora import Lora
from jaxprune.errors import UsageError

_LEAVES = ["a", "b"]
_SETTINGS = [field.name for field in dataclasses.fields(Lora) if field.name not in _LEAVES]


@functools.partial(jax.tree_util.register_dataclass, data_fields=_LEAVES, meta_fields=[*_SETTINGS, "members"])
@dataclass(frozen=True, repr=False)
class SharedLora(Lora):
    """Hold the factors, once, at the path of one of the sites that use them; a method's `view` spreads them.

    Attributes:
      members: paths of the other sites that use them.
    """

    members: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        # A description read from JSON has lists, and settings must be hashable.
        object.__setattr__(self, "members", tuple(self.members))

    @classmethod
    def of(cls, lora: Lora, members: tuple[str, ...]) -> SharedLora:
        """Make the LoRA of one site the one of several."""
        return cls(**_fields(lora), members=members)

    def merge(self, kernel: Array, mask: Array | None) -> Array:
        """Refuse: this is the adapter of several kernels."""
        return self.as_lora(mask).merge(kernel, mask)

    def as_lora(self, mask: Array | None) -> Lora:
        """Refuse: this is the adapter of several kernels."""
        raise UsageError(
            "a shared LoRA is no adapter of one site; pass on what the method's `seen(adapters, masks)` returns"
        )

    def plain(self) -> Lora:
        """Return the adapter as every site that shares it sees it."""
        return Lora(**_fields(self))


def _fields(lora: Lora) -> dict[str, Any]:
    return {name: getattr(lora, name) for name in (*_LEAVES, *_SETTINGS)}
