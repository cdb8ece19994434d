"""DyLoRA (Valipour et al. 2023): LoRA whose first b components are a good LoRA of rank b, for every b at once.

Each step draws b uniformly from 1 ... r, the same for all sites, and computes with the first b components and s = alpha / b. With
`frozen=True`, as in the paper's experiments, only component b learns: those before it are held constant, those after it are
absent. After training the model can be cut at any rank, see `at_rank`.

The released code multiplies both factors by sqrt(r / b); here B alone takes r / b, inside the loss. Products and gradients
are the same. With gradient accumulation each microbatch draws its own b, as there.

Source: "DyLoRA: Parameter-Efficient Tuning of Pre-trained Models using Dynamic Search-Free Low-Rank Adaptation", EACL 2023.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jaxprune.adapters import Adapters, Masks, init_lora
from jaxprune.allocation import uniform_plan
from jaxprune.checks import Positive, Rank, Share
from jaxprune.errors import UsageError
from jaxprune.methods.base import Context, Method, Start
from jaxprune.methods.registry import register


@register(
    paper="Valipour et al. 2023, DyLoRA: Parameter-Efficient Tuning using Dynamic Search-Free Low-Rank Adaptation"
)
def dylora(*, rank: Rank = 8, frozen: bool = True, alpha: Positive | None = None, dropout: Share = 0.0) -> Method:
    """Train one LoRA for all ranks up to `rank`.

    Args:
      rank: components at each site, r.
      frozen: train only component b of a step that drew b; otherwise the first b.
      alpha: numerator of s = alpha / b; None for 2 * rank.
      dropout: rate of the dropout on the adapters' inputs.

    Raises:
      UsageError: a setting is out of range.
    """

    def start(context: Context) -> Start:
        plan = uniform_plan(context.sites, rank)
        adapters, masks = init_lora(context.key, context.sites, plan.ranks, alpha=alpha, dropout=dropout)
        return Start(adapters, {}, masks, plan, context.params)

    def view(state, adapters, masks, key, step):
        if key is None:
            return adapters, masks
        drawn = jax.random.randint(key, (), 1, rank + 1)
        return _cut(adapters, masks, drawn, frozen)

    return Method(start, view=view, name="dylora")


def at_rank(adapters: Adapters, masks: Masks, rank: int) -> tuple[dict, dict]:
    """Cut a model trained by `dylora` at a lower rank: its first components, with s = alpha / rank.

    Shapes stay, so evaluating at another rank compiles nothing; merging, counting and exporting see the rank asked for.

    Args:
      adapters: as trained, not compacted.
      masks: {site path: mask}.
      rank: components to use, 1 to what was trained.

    Raises:
      UsageError: the rank is out of range.

    Returns:
      (adapters, masks).
    """
    most = min((x.rank for x in adapters.values()), default=0)
    if not 1 <= rank <= most:
        raise UsageError(f"rank {rank} is out of range; the adapters were trained for 1 to {most}")
    return _cut(adapters, masks, rank, False)


def _cut(adapters: Adapters, masks: Masks, rank: jax.Array | int, frozen: bool) -> tuple[dict, dict]:
    new_adapters, new_masks = dict(adapters), dict(masks)
    for path, x in adapters.items():
        index = jnp.arange(x.rank)
        a, b = x.a, x.b
        if frozen:
            learns = index == rank - 1
            a = jnp.where(learns, a, jax.lax.stop_gradient(a))
            b = jnp.where(learns[:, None], b, jax.lax.stop_gradient(b))
        new_adapters[path] = dataclasses.replace(x, a=a, b=b * (x.rank / rank))
        new_masks[path] = masks[path] * (index < rank)
    return new_adapters, new_masks
