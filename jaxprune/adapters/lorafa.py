"""LoRA-FA (Zhang et al. 2023): LoRA whose A stays as drawn, so that only B is trained."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import jax

from jaxprune.adapters.base import Array
from jaxprune.adapters.lora import Lora
from jaxprune.errors import UsageError


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["a", "b"], meta_fields=["scale", "dropout", "residual"]
)
class LoraFA(Lora):
    """Hold the factors of one site; `a` is frozen. The backward pass keeps x A (N, r) and has no need of x (N, d_in)."""

    frozen: ClassVar[tuple[str, ...]] = ("a",)

    def product(self, x_NxI: Array, mask: Array | None) -> Array:
        """Return s ((x A) * m) B."""
        return self._with_still_a().product(x_NxI, mask)

    def delta(self, mask: Array | None) -> Array:
        """Return s (A * m) B in float32, shaped as the kernel."""
        return self._with_still_a().delta(mask)

    def count(self, mask: Array | None) -> int:
        """Count d_out for every live component."""
        return super().count(mask) * self.b.shape[-1] // (self.a.shape[-2] + self.b.shape[-1])

    def _with_still_a(self) -> Lora:
        return Lora(jax.lax.stop_gradient(self.a), self.b, self.scale, self.dropout, self.residual)


def to_lorafa(adapters: Mapping[str, Lora]) -> dict[str, Any]:
    """Freeze A of every LoRA adapter; another kind is a UsageError."""
    wrong = [path for path, adapter in adapters.items() if type(adapter) is not Lora]
    if wrong:
        raise UsageError(f"adapter {wrong[0]!r} is a {type(adapters[wrong[0]]).__name__}; only Lora can become LoRA-FA")
    return {path: LoraFA(x.a, x.b, x.scale, x.dropout, x.residual) for path, x in adapters.items()}
