"""LoRA-drop (Zhou et al. 2024): keep the LoRA of the layers whose output matters, let all other layers share one.

LoRA is trained for a while. Then the importance of a layer is measured on a sample of the data,

    I_l = sum over sites of l of the mean over tokens of |s x A B|^2,   share_l = I_l / sum_k I_k

The layers of largest share keep their own LoRA until their shares add up to T. Of the others, all sites of one type and one
shape use one LoRA from then on, and training goes on. The shared one starts as that of the most important layer among them.

What the paper leaves open, or what could only be read about it second hand: which layer the shared LoRA starts from;
that training goes on with what was trained so far; a layer's sites count together (`per="site"` ranks the sites of each type
apart). The mean is over the tokens that a site sees: the last layer of a classifier may see first tokens alone, and a sum would
make it small for that. The tokens of padding count like others, since a
site cannot tell.

Sharing is a property of the adapter: `view` spreads a shared one over its sites, so that `Method.seen` gives plain LoRA to
merge and to export.

Source: "LoRA-drop: Efficient LoRA Parameter Pruning based on Output Evaluation", arXiv 2402.07721, COLING 2025.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.adapters import Adapters, Lora, Masks, SharedLora, init_lora
from jaxprune.adapters.base import Array, base, matmul
from jaxprune.allocation import uniform_plan
from jaxprune.checks import Count, OneOf, Positive, Range, Rank, Share
from jaxprune.errors import UsageError
from jaxprune.methods.base import Context, Method, Start
from jaxprune.methods.registry import register
from jaxprune.schedules import Stage, stage_steps
from jaxprune.sites import Site
from jaxprune.surgery import Decision
from jaxprune.surgery.components import host

PER = ("layer", "site")


@register(paper="Zhou et al. 2024, LoRA-drop: Efficient LoRA Parameter Pruning based on Output Evaluation")
def loradrop(
    *,
    total_steps: Count | None = None,
    measure_at: Stage = 0.1,
    rank: Rank = 8,
    threshold: Annotated[float, Range(above=0, high=1)] = 0.9,
    per: Annotated[str, OneOf(PER)] = "layer",
    alpha: Positive | None = None,
    dropout: Share = 0.0,
) -> Method:
    """Train LoRA, then let the layers of little output share.

    Args:
      total_steps: optimiser steps of the whole run, needed where `measure_at` is a fraction of it.
      measure_at: the step after which importance is measured; below 1 a fraction of `total_steps`.
      rank: components at each site.
      threshold: T, the share of the importance whose layers keep a LoRA of their own, in (0, 1].
      per: rank `layer`s, or the `site`s of each type.
      alpha: numerator of s = alpha / rank; None for s = 2.
      dropout: rate of the dropout on the adapters' inputs.

    Raises:
      UsageError: a setting is out of range, or nothing would be measured within the run.
    """
    at = stage_steps("measure_at", measure_at, total_steps)
    if not 1 <= at <= (total_steps or at):
        raise UsageError(
            f"measure_at {measure_at} is out of range; expected a step from 1 to {total_steps or 'the last'}"
        )

    def start(context: Context) -> Start:
        plan = uniform_plan(context.sites, rank)
        adapters, masks = init_lora(context.key, context.sites, plan.ranks, alpha=alpha, dropout=dropout)
        return Start(adapters, {}, masks, plan, context.params)

    def decide(state, adapters, masks, step, context):
        if not context.batches:
            raise UsageError("LoRA-drop measures on data and got none; give prune a context with batches")
        importance = output_importance(context, adapters, masks)
        return state, _share(importance, context.sites, adapters, masks, threshold, per)

    def view(state, adapters, masks, key, step):
        new_adapters, new_masks = dict(adapters), dict(masks)
        for path, x in adapters.items():
            if isinstance(x, SharedLora):
                for user in (path, *x.members):
                    new_adapters[user], new_masks[user] = x.plain(), masks[path]
        return new_adapters, new_masks

    return Method(start, decide=decide, events=(at,), view=view, name="loradrop")


def output_importance(context: Context, adapters: Adapters, masks: Masks) -> dict[str, float]:
    """Measure the mean over tokens of |s x A B|^2 at every LoRA site, averaged over the batches of the context.

    One forward and backward pass a batch, with nothing dropped; needs `attach`, since a merged kernel has no outputs.

    Returns:
      {site path: importance}.
    """
    taus = {path: jnp.zeros((), jnp.float32) for path in adapters}

    def loss(taus, adapters, params, batch):
        taps = {path: _OutputTap(adapters[path], tau) for path, tau in taus.items()}
        apply = lambda *inputs, **kw: context.forward(params, taps, masks, *inputs, **kw)  # noqa: E731
        value = context.loss_fn(apply, batch, None)
        return value[0] if isinstance(value, tuple) else value

    measure = jax.jit(jax.grad(loss))
    rows = [jax.device_get(measure(taus, dict(adapters), context.params, batch)) for batch in context.batches]
    return {path: float(np.mean([row[path] for row in rows], dtype=np.float64)) for path in taus}


@functools.partial(jax.tree_util.register_dataclass, data_fields=["adapter", "tau"], meta_fields=[])
@dataclass(frozen=True)
class _OutputTap:
    """Compute what the adapter computes, and hand the mean of |s x A B|^2 over tokens to tau as its gradient."""

    adapter: Lora
    tau: Array

    def linear(self, x_NxI: Array, kernel_IxO: Array, mask: Array | None, key: Array | None) -> Array:
        return base(x_NxI, kernel_IxO) + _measured(matmul(x_NxI, self.adapter.delta(mask)), self.tau)

    def merge(self, kernel: Array, mask: Array | None) -> Array:
        raise UsageError("LoRA-drop measures outputs of adapters, which a merged kernel has none of; use attach")


@jax.custom_vjp
def _measured(value: Array, tau: Array) -> Array:
    return value


def _backward(value: Array, gradient: Array) -> tuple[Array, Array]:
    return gradient, jnp.sum(jnp.square(value.astype(jnp.float32))) / (value.size // value.shape[-1])


_measured.defvjp(lambda value, tau: (value, value), _backward)


@dataclass(frozen=True)
class _Part:
    """A site and its importance."""

    site: Site
    value: float

    def name(self, per: str) -> Any:
        """Say what it is ranked as: its layer, or itself."""
        return self.site.layer if per == "layer" else self.site.path

    @property
    def group(self) -> tuple[Any, ...]:
        """What may share with it."""
        return self.site.type, self.site.d_in, self.site.d_out


def _share(
    importance: Mapping[str, float],
    sites: Sequence[Site],
    adapters: Adapters,
    masks: Masks,
    threshold: float,
    per: str,
) -> Decision:
    parts = [_Part(site, importance[site.path]) for site in sites if site.path in importance]
    own = _retained(parts, threshold, per)
    others: dict[tuple[Any, ...], list[_Part]] = {}
    for part in sorted(parts, key=lambda p: (-p.value, p.name(per), p.site.path)):
        if part.name(per) not in own:
            others.setdefault(part.group, []).append(part)

    new_masks: dict[str, Any] = host({path: masks[path] for path in importance})
    shared: dict[str, SharedLora] = {}
    for first, *rest in others.values():
        if not rest:  # alone, it shares with nobody
            continue
        members = tuple(part.site.path for part in rest)
        new_masks |= {path: np.zeros_like(new_masks[path]) for path in members}
        shared[first.site.path] = SharedLora.of(adapters[first.site.path], members)
    kept = sum(part.value for part in parts if part.name(per) in own) / sum(part.value for part in parts)
    return Decision(new_masks, shared, report={"own": len(own), "share": kept})


def _retained(parts: Sequence[_Part], threshold: float, per: str) -> set[Any]:
    """Name the layers, or the sites, that keep their own: the best until their shares reach the threshold."""
    own: set[Any] = set()
    for kind in sorted({part.site.type if per == "site" else "" for part in parts}):
        values: dict[Any, float] = {}
        for part in parts:
            if per == "layer" or part.site.type == kind:
                values[part.name(per)] = values.get(part.name(per), 0.0) + part.value
        total, reached = sum(values.values()), 0.0
        if not 0 < total < np.inf:
            raise UsageError(
                f"the outputs of LoRA add up to {total}, so no layer can be ranked; measure later in training"
            )
        for name in sorted(values, key=lambda n: (-values[n], n)):
            if reached >= threshold * total:
                break
            own.add(name)
            reached += values[name]
    return own
