"""Scores of single rank components."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxprune.adapters import Adapters


@jax.jit
def component_norms(adapters: Adapters) -> dict[str, jax.Array]:
    """Score every component of every site by |A_j| |B_j|, the Frobenius norm of what it adds to the kernel over s.

    Args:
      adapters: {site path: adapter}; those without factors `a` and `b` are passed over.

    Returns:
      {site path: (r,)}.

    Source: DPLoRA, algorithm 1.
    """
    return {
        path: jnp.linalg.norm(adapter.a.astype(jnp.float32), axis=-2)
        * jnp.linalg.norm(adapter.b.astype(jnp.float32), axis=-1)
        for path, adapter in adapters.items()
        if hasattr(adapter, "a") and hasattr(adapter, "b")
    }
