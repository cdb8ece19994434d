"""SoRA (Ding et al. 2023): LoRA with a gate on every component, made sparse by a proximal step.

Every site trains s A diag(g) B with gates g ~ N(0, 1). The loss has the penalty l1 * mean |g| over all gates, and after every
update each gate is shrunk towards 0 by a threshold l2 (not times the learning rate), in one of two ways:

- `prox="soft"`, the paper's: g <- sign(g) max(|g| - l2, 0);
- `prox="released"`, what the released code computes, in place and in this order: l2 is taken off where |g| > l2, and then what
  has |g| < l2 becomes 0. So all of l2 < |g| < 2 l2 goes too, and |g| = l2 stays as it is.

A gate at 0 gets gradients and can come back until the end of training, when the components with gates of exactly 0 die. Gates
take no weight decay (`Gated.undecayed`).

The paper trains on while the threshold rises step by step: `thresholds` makes that schedule.

Source: "Sparse Low-rank Adaptation of Pre-trained Language Models", EMNLP 2023; its released code.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.adapters import init_gated
from jaxprune.allocation import uniform_plan
from jaxprune.checks import MOST_STEPS, Count, NotNegative, OneOf, Positive, Range, Rank, Share, checked
from jaxprune.methods.base import Context, Method, Start
from jaxprune.methods.registry import register
from jaxprune.surgery import Decision
from jaxprune.surgery.components import host

PROX = ("soft", "released")


@register(paper="Ding et al. 2023, Sparse Low-rank Adaptation of Pre-trained Language Models")
def sora(
    *,
    total_steps: Count,
    rank: Rank = 8,
    penalty: NotNegative = 1e-3,
    threshold: NotNegative | Callable[[jax.Array], jax.Array] | None = None,
    prox: Annotated[str, OneOf(PROX)] = "soft",
    alpha: Positive | None = None,
    dropout: Share = 0.0,
) -> Method:
    """Train gated LoRA and drop the components whose gates end at 0.

    Args:
      total_steps: the step after which components of gate 0 die, usually the last.
      rank: components at each site at the start.
      penalty: l1, weight of mean |g|.
      threshold: l2, a number or a function of the step (1, 2, ...) such as `thresholds` makes; None for 0.5 / total_steps, which
        shrinks every gate by 0.5 in all, however long the run is (the released code's 1e-3 does so in 500 steps).
      prox: `soft`, the proximal step, or `released`, that of the released code.
      alpha: numerator of s = alpha / rank; None for s = 2.
      dropout: rate of the dropout on the adapters' inputs.

    Raises:
      UsageError: a setting is out of range.
    """

    if threshold is None:
        threshold = 0.5 / total_steps

    def start(context: Context) -> Start:
        plan = uniform_plan(context.sites, rank)
        adapters, masks = init_gated(context.key, context.sites, plan.ranks, alpha=alpha, dropout=dropout)
        return Start(adapters, {}, masks, plan, context.params)

    def regular(state, adapters, masks):
        gates = [x.gate for x in adapters.values()]
        return penalty * sum(jnp.sum(jnp.abs(g)) for g in gates) / max(1, sum(g.size for g in gates))

    def project(state, adapters, masks, grads, step):
        limit = threshold(step) if callable(threshold) else threshold
        return state, {path: dataclasses.replace(x, gate=shrink(x.gate, limit, prox)) for path, x in adapters.items()}

    def decide(state, adapters, masks, step, context):
        gates, alive = host({path: x.gate for path, x in adapters.items()}), host(masks)
        return state, Decision({path: alive[path] * (gate != 0) for path, gate in gates.items()})

    return Method(
        start,
        decide=decide,
        events=(total_steps,),
        penalty=regular if penalty else None,
        project=project,
        name="sora",
    )


def shrink(gate: jax.Array, threshold: jax.Array | float, prox: str) -> jax.Array:
    """Take the proximal step of one array of gates; `prox` is `soft` or `released`."""
    if prox == "soft":
        return jnp.sign(gate) * jnp.maximum(jnp.abs(gate) - threshold, 0)
    shrunk = jnp.where(jnp.abs(gate) > threshold, gate - jnp.sign(gate) * threshold, gate)
    return jnp.where(jnp.abs(shrunk) < threshold, 0, shrunk)


@checked
def thresholds(
    last: NotNegative,
    *,
    values: Annotated[int, Range(2, 100_000)],
    first_steps: Annotated[int, Range(0, MOST_STEPS)],
    steps: Count,
) -> Callable[[jax.Array], jax.Array]:
    """Return a threshold that rises from 0 to `last` in equal parts, as a function of the step.

    Args:
      last: the largest threshold.
      values: how many there are, the 0 at the start included.
      first_steps: steps at 0.
      steps: steps at each of the others; the last one stays.

    Raises:
      UsageError: a setting is out of range.
    """
    table = np.linspace(0.0, last, values)

    def at(step: jax.Array) -> jax.Array:
        index = jnp.where(step <= first_steps, 0, 1 + (step - 1 - first_steps) // steps)
        return jnp.asarray(table, jnp.float32)[jnp.minimum(index, values - 1)]

    return at
