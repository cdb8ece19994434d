"""PiSSA (Meng et al. 2024): LoRA that starts from the kernels' largest singular directions, taken out of the kernels.

    W = U S V^T,    A = U_r sqrt(S_r / s),    B = sqrt(S_r / s) V_r^T,    W <- W - s A B,    s = alpha / r = 1

so the model is the same at step 0, and what trains first is what the kernel does most. The frozen parameters become the residual
kernels, `Start.params`: train, evaluate and merge with those. An export in PEFT's format is relative to the checkpoint's own
kernels, as `save_peft(initial=...)` says.

`niter` takes the randomised SVD (Halko et al. 2011) in place of the exact one: r + 8 random columns, refined by `niter` rounds of
multiplying by W^T and W. PEFT's `pissa_niter_16` draws r columns without the 8 more and is less exact for it; the residual makes
the start exact either way. Both are functions of the kernels and the key alone, so a resumed run makes the same residual again.

Source: "PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models", eq. 2 to 4.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Annotated

import jax
import jax.numpy as jnp

from jaxprune.adapters import init_lora
from jaxprune.adapters.base import key_for, place
from jaxprune.allocation import uniform_plan
from jaxprune.checks import Positive, Range, Rank, Share
from jaxprune.errors import UsageError
from jaxprune.methods.base import Context, Method, Start
from jaxprune.methods.registry import register
from jaxprune.sites import flatten, layer_of, with_layers, with_leaves

_OVERSAMPLE = 8


@register(
    paper="Meng et al. 2024, PiSSA: Principal Singular Values and Singular Vectors Adaptation",
    # The factors are what a kernel does most, and the 1e-3 of the others unlearns it.
    defaults={"learning_rate": 2e-4},
)
def pissa(
    *,
    rank: Rank = 8,
    alpha: Positive | None = None,
    dropout: Share = 0.0,
    niter: Annotated[int, Range(0, 1000)] | None = None,
) -> Method:
    """Give every site the same rank and its kernel's largest singular directions.

    Args:
      rank: components at each site.
      alpha: numerator of s = alpha / rank; None for the rank, that is s = 1.
      dropout: rate of the dropout on the adapters' inputs; above 0 it is no exact no-op at step 0.
      niter: None for the exact SVD, or rounds of the randomised one (16 in the paper's code).

    Raises:
      UsageError: a setting is out of range, or (by `start`) a kernel has fewer than `rank` singular directions.
    """

    def start(context: Context) -> Start:
        plan = uniform_plan(context.sites, rank)
        small = [site for site in context.sites if min(site.d_in, site.d_out) < rank]
        if small:
            raise UsageError(
                f"rank {rank} is more than the {min(small[0].d_in, small[0].d_out)} singular directions of "
                f"{small[0].path!r}; lower the rank or leave the site out of the targets"
            )
        scale = 1.0 if alpha is None else alpha / rank
        drawn, masks = init_lora(context.key, context.sites, plan.ranks, scale=scale, dropout=dropout)
        flat, adapters = flatten(context.params), {}
        for path, empty in drawn.items():
            leaf, index = place(flat, path, empty, None)
            kernel = layer_of(flat[leaf], index).reshape(empty.a.shape[0], empty.b.shape[-1])
            a, b, rest = _split(key_for(context.key, path), kernel, rank, scale, niter)
            adapters[path] = dataclasses.replace(empty, a=a, b=b, residual=True)
            flat[leaf] = with_layers(flat[leaf], {index: rest.reshape(layer_of(flat[leaf], index).shape)})
        return Start(adapters, {}, masks, plan, with_leaves(context.params, flat))

    return Method(start, name="pissa")


@functools.partial(jax.jit, static_argnames=("rank", "scale", "niter"))
@jax.default_matmul_precision("highest")
def _split(key: jax.Array, kernel: jax.Array, rank: int, scale: float, niter: int | None):
    """Return A, B and W - s A B."""
    w = kernel.astype(jnp.float32)
    u, s, vt = jnp.linalg.svd(w, full_matrices=False) if niter is None else _randomised_svd(key, w, rank, niter)
    root = jnp.sqrt(s[:rank] / scale)
    a, b = u[:, :rank] * root, root[:, None] * vt[:rank]
    return a, b, (w - scale * jnp.matmul(a, b)).astype(kernel.dtype)


def _randomised_svd(key: jax.Array, w: jax.Array, rank: int, niter: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Approximate the largest singular triplets of w."""
    columns = min(rank + _OVERSAMPLE, *w.shape)
    basis = lambda x: jnp.linalg.qr(x)[0]  # noqa: E731
    q = basis(jnp.matmul(w, jax.random.normal(key, (w.shape[1], columns))))
    q = jax.lax.fori_loop(0, niter, lambda _, q: basis(jnp.matmul(w, basis(jnp.matmul(w.T, q)))), q)
    u, s, vt = jnp.linalg.svd(jnp.matmul(q.T, w), full_matrices=False)
    return jnp.matmul(q, u), s, vt
