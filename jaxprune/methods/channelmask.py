"""Learn which channels to prune while DoRA adapts the rest (Ali et al., ASP-DAC 2025), in two stages.

Every site gets DoRA, and every masked site a logit l for each output channel (`jaxprune.adapters.MaskedDora`):

    h = g * (magnitude * x V / |V| + bias),    V = W + s A B,    g in {0, 1} per channel.

Stage 1 trains the masks with the adapters. Each step draws one mask and differentiates straight through it:

    u ~ Logistic(0, 1),    y = sigmoid((l + u) / tau),    g = 1[y > 1/2] forward, the gradient of y backward,

with tau falling from 1.0 to 0.3 exponentially; evaluation has no noise, g = 1[l > 0]. With D the mean of sigmoid(l) over all
masked channels, each weighted by its kernel parameters, either

- D falls from sigmoid(l0) to `target`, fast at first (cubic): after every update one number is added to all logits, so that
  D is what it should be and the loss decides only which channels stay. The event at the end of stage 1 freezes the `target`
  share of channels with the largest logits, equally many in all heads of a layer;
- or the loss gets the penalty lam * D, and the event freezes g = 1[l > 0] (the largest logit of a group where none is
  positive). How many channels go is then up to the loss, and to whether training is long enough for logits to get from l0 to 0:
  Adam moves them by at most ten times the learning rate a step, and far less where their gradients are mostly noise.

Stage 2 trains A, B and the magnitudes on. `jaxprune.surgery.extract` then takes the masked channels out of the model.

The source gives the masks, their place on DoRA's magnitudes, the Gumbel-Sigmoid, two learning rates, 5e-5 and 1e-5, and the
shares it arrived at, 75.5 % of the channels on average for RoBERTa-base and 83 % for DistilBERT. Ours are: the target and the
penalty, the initial logit 3, the temperatures, the length of stage 1, the reading of the two rates as those of the stages, the
mask on the bias (without which a channel cannot be removed) and the channel that every group keeps.

Source: "Learning to prune and low-rank adaptation for compact language model deployment", slides and abstract.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.adapters import Adapters, MaskedDora, mask_channels, settle
from jaxprune.adapters.base import key_for
from jaxprune.adapters.channel import SETTLED
from jaxprune.checks import Count, NotNegative, OneOf, Positive, Range, Rank, Share, checked
from jaxprune.errors import UsageError, nearest
from jaxprune.methods.base import Context, Method, Start
from jaxprune.methods.dora import dora
from jaxprune.methods.registry import register
from jaxprune.surgery import Decision

# Types of the masked sites. The paper's numbers of parameters are those of DoRA of rank 8 on query and value, all masked;
# what makes an encoder fast is the MLP.
PRESETS = {"paper_like": ("query", "value"), "useful": ("query", "value", "fc1")}

Channels = Annotated[str, OneOf(tuple(PRESETS))]
Stage = Annotated[float, Range(above=0, high=1)]

# Their channels belong to attention heads.
_HEADED = ("query", "key", "value", "q_proj", "k_proj", "v_proj")


@register(
    paper="Ali et al. 2025, Learning to prune and low-rank adaptation for compact language model deployment",
    staged=True,
)
def channelmask(
    *,
    total_steps: Count,
    stage: Stage = 0.5,
    channels: Channels | Sequence[str] = "useful",
    target: Annotated[float, Range(above=0, below=1)] | None = None,
    lam: NotNegative | None = None,
    rank: Rank = 8,
    alpha: Positive | None = None,
    dropout: Share = 0.0,
    heads: Count = 1,
    shared: bool = False,
    start_logit: Annotated[float, Range(-10, 10)] = 3.0,
    temperatures: tuple[Positive, Positive] = (1.0, 0.3),
) -> Method:
    """Train channel masks with DoRA, freeze them, and train on.

    Args:
      total_steps: optimiser steps of the whole run.
      stage: share of them that stage 1 takes, above 0 and up to 1.
      channels: `paper_like`, `useful`, or types of the sites to mask. A mask on queries stands for the query-key pairs.
      target: share of the channels that stay; 0.75 unless `lam` is given.
      lam: weight of the penalty, in place of a target.
      rank: components at every site, masked or not.
      alpha: numerator of s = alpha / rank; None for s = 2.
      dropout: rate of the dropout on the adapters' inputs.
      heads: attention heads of the model: each keeps at least one channel.
      shared: one mask for all heads of a layer. Heads that keep different numbers of channels are padded to the fullest
        when they are extracted; this way they are all equal.
      start_logit: initial logit; 3 draws a 1 with probability 0.95.
      temperatures: tau at the first step and at the end of stage 1.

    Raises:
      UsageError: a setting is out of range; by `start`, no site has a type of `channels`.
    """
    first, last = temperatures
    if lam is not None and target is not None:
        raise UsageError(f"target {target} and lam {lam} are two ways to prune; give one of them")
    if lam is None and target is None:
        target = 0.75
    end = stage_end(total_steps, stage)
    begin = 1 / (1 + math.exp(-start_logit))
    if target is not None and target > begin:
        raise UsageError(
            f"target {target} is above the share that start_logit {start_logit} begins with, {begin:.3f}; raise it"
        )

    def view(state, adapters, masks, key, step):
        if key is None:
            return adapters, masks
        tau = temperature(step - 1, end, first, last)
        drawn = {
            path: dataclasses.replace(x, logits=draw(x.logits, key_for(key, path), tau))
            for path, x in _masked(adapters)
        }
        return {**adapters, **drawn}, masks

    def decide(state, adapters, masks, step, context):
        masked = dict(_masked(adapters))
        kept = {path: np.asarray(x.kept()) for path, x in masked.items()} if target is None else largest(masked, target)
        return state, _freeze({path: (x, kept[path]) for path, x in masked.items()}, context)

    return Method(
        lambda context: _start(context, channels, rank, alpha, dropout, heads, shared, start_logit),
        view=view,
        penalty=(lambda state, adapters, masks: lam * density(adapters)) if lam else None,
        project=None if target is None else functools.partial(_hold_density, end=end, first=begin, last=target),
        decide=decide,
        events=(end,),
        removes="nothing",
        name="channelmask",
    )


@register(
    paper="the control of Ali et al. 2025",
    staged=True,
)
def uniformmask(
    *,
    total_steps: Count,
    stage: Stage = 0.5,
    channels: Channels | Sequence[str] = "useful",
    ratio: Share = 0.25,
    rank: Rank = 8,
    alpha: Positive | None = None,
    dropout: Share = 0.0,
    heads: Count = 1,
    shared: bool = False,
) -> Method:
    """Prune the same share of channels everywhere, those of the smallest magnitude: the control of `channelmask`.

    The stages are the same, with plain DoRA in the first. The magnitude of a channel is that of its column; heads that
    share a mask add squares up.

    Args:
      total_steps: optimiser steps of the whole run.
      stage: share of them that stage 1 takes, above 0 and up to 1.
      channels: `paper_like`, `useful`, or types of the sites to mask. A mask on queries stands for the query-key pairs.
      ratio: share of the channels of every group (a head, or a whole site) that goes; one stays in any case.
      rank: components at every site, masked or not.
      alpha: numerator of s = alpha / rank; None for s = 2.
      dropout: rate of the dropout on the adapters' inputs.
      heads: attention heads of the model: each keeps at least one channel.
      shared: one mask for all heads of a layer.

    Raises:
      UsageError: a setting is out of range; by `start`, no site has a type of `channels`.
    """
    end = stage_end(total_steps, stage)

    def decide(state, adapters, masks, step, context):
        return state, _freeze({path: (x, _top(x, _sizes(x), 1 - ratio)) for path, x in _masked(adapters)}, context)

    return Method(
        # Settled from the start: all channels are on, and no gradient reaches the logits.
        lambda context: _start(context, channels, rank, alpha, dropout, heads, shared, SETTLED),
        decide=decide,
        events=(end,),
        removes="nothing",
        name="uniformmask",
    )


def temperature(done: jax.Array, end: int, first: float, last: float) -> jax.Array:
    """Return tau = first (last / first)^(done / end) with `done` steps behind, and `last` after stage 1's `end`."""
    return first * (last / first) ** jnp.minimum(done / end, 1.0)


def draw(logits: jax.Array, key: jax.Array, tau: jax.Array) -> jax.Array:
    """Return (l + u) / tau with u ~ Logistic(0, 1), whose sign is the drawn mask."""
    return (logits + jax.random.logistic(key, logits.shape, logits.dtype)) / tau


def density(adapters: Adapters) -> jax.Array:
    """Return the mean of sigmoid(l) over all masked channels, weighted by the kernel parameters of a channel.

    Those are d_in, times the heads that share a logit; the row or column of the next kernel that goes with a channel is in
    proportion to them.
    """
    sites = [(_weight(x), x.logits) for _, x in _masked(adapters)]
    total = sum((weight * jnp.sum(jax.nn.sigmoid(logits)) for weight, logits in sites), jnp.zeros(()))
    return total / sum(weight * logits.size for weight, logits in sites)


def _hold_density(
    state: Any, adapters: Adapters, masks: Any, grads: Any, step: jax.Array, *, end: int, first: float, last: float
) -> tuple[Any, Adapters]:
    """Shift the logits so that the density has fallen from `first` towards `last` as far as it should by now; not in stage 2."""
    goal = last + (first - last) * (1 - jnp.minimum(step / end, 1.0)) ** 3
    shift = jnp.where(step <= end, density_shift(adapters, goal), 0.0)
    moved = {path: dataclasses.replace(x, logits=x.logits + shift) for path, x in _masked(adapters)}
    return state, {**adapters, **moved}


def density_shift(adapters: Adapters, goal: jax.Array) -> jax.Array:
    """Return the number that, added to every logit, makes the density `goal` (by bisection, to 1e-6 of the logits' range)."""
    logits = jnp.concatenate([x.logits.ravel() for _, x in _masked(adapters)])
    weights = jnp.concatenate([jnp.full(x.logits.size, _weight(x), jnp.float32) for _, x in _masked(adapters)])
    weights = weights / weights.sum()
    middle = jnp.log(goal) - jnp.log1p(-goal)

    def halve(_: int, ends: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = ends
        shift = (low + high) / 2
        above = jnp.sum(weights * jax.nn.sigmoid(logits + shift)) > goal
        return jnp.where(above, low, shift), jnp.where(above, shift, high)

    low, high = jax.lax.fori_loop(0, 20, halve, (middle - logits.max(), middle - logits.min()))
    return (low + high) / 2


def largest(adapters: Mapping[str, MaskedDora], share: float) -> dict[str, np.ndarray]:
    """Choose the channels with the largest logits that together have a share of the kernel parameters.

    Heads of a layer keep equally many, since extraction gives them one width: as many as their channels among the largest, on
    average. Of equal logits the first stay.

    Returns:
      {site path: booleans shaped as the logits}.
    """
    flat = [np.ravel(np.asarray(x.logits)) for x in adapters.values()]
    weights = np.concatenate([np.full(x.logits.size, _weight(x), np.float64) for x in adapters.values()])
    order = np.argsort(-np.concatenate(flat), kind="stable")
    among = np.zeros(order.size, bool)
    # The 1e-9 keeps the channel with which the share is full.
    among[order[np.cumsum(weights[order]) <= share * weights.sum() * (1 + 1e-9)]] = True
    kept, start = {}, 0
    for path, x in adapters.items():
        here = among[start : start + x.logits.size]
        start += x.logits.size
        kept[path] = _top(x, np.asarray(x.logits), here.reshape(x.logits.shape).mean(axis=-1))
    return kept


@checked
def stage_end(total_steps: Count, stage: Stage) -> int:
    """Return the last step of stage 1."""
    return max(1, round(stage * total_steps))


def _start(
    context: Context,
    channels: str | Sequence[str],
    rank: int,
    alpha: float | None,
    dropout: float,
    heads: int,
    shared: bool,
    start_logit: float,
) -> Start:
    types = PRESETS[channels] if isinstance(channels, str) else channels
    known = {site.type for site in context.sites}
    for name in types:
        if name not in known:
            raise UsageError(
                f"no site of type {name!r} to mask; nearest types: {nearest(name, known)}; set channels, or adapt that type"
            )
    begun = dora(rank=rank, alpha=alpha, dropout=dropout).start(context)
    adapters = dict(begun.adapters)
    for site in context.sites:
        if site.type in types:
            groups = heads if site.type in _HEADED else 1
            adapters[site.path] = mask_channels(
                adapters[site.path], start=start_logit, heads=groups, shared=shared and groups > 1
            )
    return begun._replace(adapters=adapters)


def _masked(adapters: Adapters) -> list[tuple[str, MaskedDora]]:
    return [(path, x) for path, x in adapters.items() if isinstance(x, MaskedDora)]


def _weight(adapter: MaskedDora) -> int:
    """Count the kernel parameters that go with a logit."""
    return adapter.a.shape[-2] * (adapter.magnitude.shape[-1] // adapter.logits.shape[-1])


def _top(adapter: MaskedDora, values: np.ndarray, share: Any) -> np.ndarray:
    """Choose a share of the largest values in every group, one at least; of equal ones the first stay.

    Args:
      values: shaped as the logits, (..., channels).
      share: of every layer, (...), or of all.
    """
    grouped = values.reshape(*values.shape[:-1], -1, adapter.magnitude.shape[-1] // adapter.heads)
    stay = np.maximum(1, np.round(np.multiply(share, grouped.shape[-1])))
    place = np.argsort(np.argsort(-grouped, axis=-1, kind="stable"), axis=-1)
    return (place < stay[..., None, None]).reshape(values.shape)


def _sizes(adapter: MaskedDora) -> np.ndarray:
    """Square the magnitudes, and add up those of heads that share a mask; shaped as the logits."""
    size = np.square(np.asarray(adapter.magnitude, np.float64))
    return size.reshape(*size.shape[:-1], -1, adapter.logits.shape[-1]).sum(-2)


def _freeze(chosen: Mapping[str, tuple[MaskedDora, Any]], context: Context) -> Decision:
    """Settle the masks, and say for every type how many channels stay."""
    types = {site.path: site.type for site in context.sites}
    counts: dict[str, list[int]] = {}
    for path, (_, kept) in chosen.items():
        entry = counts.setdefault(types[path], [0, 0])
        entry[0] += int(kept.sum())
        entry[1] += kept.size
    report = {"channels": {kind: {"kept": kept, "of": of} for kind, (kept, of) in counts.items()}}
    return Decision(
        {}, {path: settle(adapter, jnp.asarray(kept)) for path, (adapter, kept) in chosen.items()}, report=report
    )
