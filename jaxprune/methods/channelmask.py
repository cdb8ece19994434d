"""Prune channels while DoRA adapts the rest, in two stages: those of least Fisher information, or as Ali et al. (2025) learn it.

Every site gets DoRA, and every masked site a logit l for each output channel (`jaxprune.adapters.MaskedDora`):

    h = g * (magnitude * x V / |V| + bias),    V = W + s A B,    g = 1[l > 0] in {0, 1} per channel.

Stage 1 chooses the channels while it trains the adapters, an event at its end freezes them, and stage 2 trains A, B and the
magnitudes on. `jaxprune.surgery.extract` then takes the masked channels out of the model.

`learn="fisher"`, ours: nothing is drawn, and no logit is trained. With dL/dg the gradient of a microbatch's mean loss by a gate,

    F <- F + (1 - decay) / (1 - decay^t) (q_t - F),    q_t = mean over the microbatches of step t of (dL/dg)^2,

an average over steps without the bias of one that began at 0. Near a minimum the loss rises by about n F / 2 without the channel,
where a microbatch has n samples. The first share `measure` of stage 1 has all channels and only measures. Over half of the rest
the share that stays falls from 1 to `target`, fast at first (cubic): after every update those of least F go, and none comes back.
Then the masks stand still, so the event changes nothing. Channels of all layers are compared that have the same type (query,
value, fc1), and `target` is met in every type to a channel. Heads of a layer keep equally many, since extraction gives them one
width: the j-th best channels of all heads stay or go together, by the sum of their F.

No logit is trained here: under Adam each moves by about as much whatever its gradient is, and after a hundred steps of `paper`
their order had nothing to do with F.

`learn="paper"`: each step draws one mask and differentiates straight through it:

    u ~ Logistic(0, 1),    y = sigmoid((l + u) / tau),    g = 1[y > 1/2] forward, the gradient of y backward,

with tau falling from 1.0 to 0.3 exponentially; evaluation has no noise. With D the mean of sigmoid(l) over all masked channels,
each weighted by its kernel parameters, either

- D falls from sigmoid(l0) to `target`, fast at first (cubic): after every update one number is added to all logits, so that
  D is what it should be and the loss decides only which channels stay. The event at the end of stage 1 freezes the `target`
  share of channels with the largest logits, equally many in all heads of a layer;
- or the loss gets the penalty lam * D, and the event freezes g = 1[l > 0] (the largest logit of a group where none is
  positive). How many channels go is then up to the loss, and to whether training is long enough for logits to get from l0 to 0:
  Adam moves them by at most ten times the learning rate a step, and far less where their gradients are mostly noise.

The source gives the masks, their place on DoRA's magnitudes, the Gumbel-Sigmoid, two learning rates, 5e-5 and 1e-5, and the
shares it arrived at, 75.5 % of the channels on average for RoBERTa-base and 83 % for DistilBERT. Ours are: the target and the
penalty, the initial logit 3, the temperatures, the length of stage 1, the reading of the two rates as those of the stages, the
mask on the bias (without which a channel cannot be removed) and the channel that every group keeps.

Source: "Learning to prune and low-rank adaptation for compact language model deployment", slides and abstract. Fisher information
of gates: Theis et al. 2018, "Faster gaze prediction with dense networks and Fisher pruning" (arXiv 1801.05787).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.adapters import Adapters, MaskedDora, mask_channels, settle
from jaxprune.adapters.base import key_for
from jaxprune.adapters.channel import SETTLED
from jaxprune.checks import Count, NotNegative, OneOf, Positive, Range, Rank, Seed, Share, checked
from jaxprune.errors import UsageError, nearest
from jaxprune.methods.base import Context, Method, Probes, Start
from jaxprune.methods.dora import dora
from jaxprune.methods.registry import register
from jaxprune.scores.probe import gate_probe
from jaxprune.sites import site_at
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
    learn: Annotated[str, OneOf(("fisher", "paper"))] = "fisher",
    measure: Share | None = None,
    decay: Share | None = None,
    lam: NotNegative | None = None,
    start_logit: Annotated[float, Range(-10, 10)] | None = None,
    temperatures: tuple[Positive, Positive] | None = None,
    rank: Rank = 8,
    alpha: Positive | None = None,
    dropout: Share = 0.0,
    heads: Count = 1,
    shared: bool = False,
) -> Method:
    """Choose channels to prune while DoRA trains, freeze the choice, and train on.

    Args:
      total_steps: optimiser steps of the whole run.
      stage: share of them that stage 1 takes, above 0 and up to 1.
      channels: `paper_like`, `useful`, or types of the sites to mask. A mask on queries stands for the query-key pairs.
      target: share of the channels that stay, of every type with `learn=fisher`; 0.75 unless `lam` is given.
      learn: `fisher`, by the Fisher information of their gates, or `paper`, by trained logits; see the top of this file.
      measure: share of stage 1 in which `fisher` has all channels and only measures (default a third).
      decay: weight of earlier steps in the average of `fisher` (default 0.95).
      lam: weight of the penalty of `paper`, in place of a target.
      start_logit: initial logit of `paper` (default 3, which draws a 1 with probability 0.95).
      temperatures: tau of `paper` at the first step and at the end of stage 1 (default 1.0 and 0.3).
      rank: components at every site, masked or not.
      alpha: numerator of s = alpha / rank; None for s = 2.
      dropout: rate of the dropout on the adapters' inputs.
      heads: attention heads of the model: each keeps at least one channel.
      shared: one mask for all heads of a layer. With `lam` heads may keep different numbers of channels, and are padded to the
        fullest when they are extracted; this way they are all equal.

    Raises:
      UsageError: a setting is out of range, or is one of the other `learn`; by `start`, no site has a type of `channels`.
    """
    of_paper = {"lam": lam, "start_logit": start_logit, "temperatures": temperatures}
    other, foreign = ("paper", of_paper) if learn == "fisher" else ("fisher", {"measure": measure, "decay": decay})
    if given := [name for name, value in foreign.items() if value is not None]:
        raise UsageError(
            f"{given[0]} {foreign[given[0]]} is a setting of learn={other}, and learn is {learn}; give learn={other}, or leave "
            f"{given[0]} out"
        )
    if lam is not None and target is not None:
        raise UsageError(f"target {target} and lam {lam} are two ways to prune; give one of them")
    if lam is None and target is None:
        target = 0.75
    end = stage_end(total_steps, stage)
    first = SETTLED if learn == "fisher" else 3.0 if start_logit is None else start_logit

    def start(context: Context) -> Start:
        return _start(context, channels, rank, alpha, dropout, heads, shared, first)

    if learn == "fisher":
        assert target is not None
        return _by_fisher(start, end, target, 1 / 3 if measure is None else measure, 0.95 if decay is None else decay)
    return _as_the_paper(start, end, target, lam, first, temperatures or (1.0, 0.3))


def _by_fisher(start: Callable[[Context], Start], end: int, target: float, measure: float, decay: float) -> Method:
    """Return the method with `learn=fisher`; its state is {site path: F, shaped as the logits}."""
    begin = min(int(measure * end), end - 1)
    until = (begin + 1 + end) // 2

    def init(adapters, masks):
        return {path: jnp.zeros_like(x.logits) for path, x in _masked(adapters)}

    def wrap(adapters, zeros):
        return {**adapters, **{path: gate_probe(x, zeros[path]) for path, x in _masked(adapters)}}

    def observe(state, adapters, masks, grads, step, measured):
        weight = (1 - decay) / (1 - decay**step)
        return {path: known + weight * (measured[path] - known) for path, known in state.items()}

    def project(state, adapters, masks, grads, step):
        masked = dict(_masked(adapters))
        left = 1 - jnp.clip((step - begin) / (until - begin), 0.0, 1.0)
        share = target + (1 - target) * left**3
        kept = jax.lax.cond(
            (step > begin) & (step <= until),
            lambda: most_informed(masked, state, share),
            lambda: {path: x.kept() for path, x in masked.items()},
        )
        return state, {**adapters, **{path: settle(x, kept[path]) for path, x in masked.items()}}

    def decide(state, adapters, masks, step, context):
        return state, _freeze({path: (x, np.asarray(x.kept())) for path, x in _masked(adapters)}, context)

    return Method(
        start,
        init=init,
        observe=observe,
        project=project,
        probes=Probes(lambda adapters: init(adapters, None), wrap),
        decide=decide,
        events=(end,),
        removes="nothing",
        name="channelmask",
    )


def _as_the_paper(
    start: Callable[[Context], Start],
    end: int,
    target: float | None,
    lam: float | None,
    start_logit: float,
    temperatures: tuple[float, float],
) -> Method:
    """Return the method with `learn=paper`."""
    first, last = temperatures
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
        start,
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
    choose: Annotated[str, OneOf(("magnitude", "random"))] = "magnitude",
    seed: Seed = 0,
    rank: Rank = 8,
    alpha: Positive | None = None,
    dropout: Share = 0.0,
    heads: Count = 1,
    shared: bool = False,
) -> Method:
    """Prune the same share of channels everywhere, those of the smallest magnitude or any: the control of `channelmask`.

    The stages are the same, with plain DoRA in the first. The magnitude of a channel is that of its column; heads that
    share a mask add squares up.

    Args:
      total_steps: optimiser steps of the whole run.
      stage: share of them that stage 1 takes, above 0 and up to 1.
      channels: `paper_like`, `useful`, or types of the sites to mask. A mask on queries stands for the query-key pairs.
      ratio: share of the channels of every group (a head, or a whole site) that goes; one stays in any case.
      choose: which go: those of the smallest `magnitude`, or `random` ones.
      seed: of `random`, beside the run's own.
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
        key = jax.random.fold_in(context.key, seed)

        def values(path: str, x: MaskedDora) -> Any:
            return jax.random.uniform(key_for(key, path), x.logits.shape) if choose == "random" else _sizes(x)

        kept = {path: (x, _top(x, np.asarray(values(path, x)), 1 - ratio)) for path, x in _masked(adapters)}
        return state, _freeze(kept, context)

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


def most_informed(
    adapters: Mapping[str, MaskedDora], fisher: Mapping[str, jax.Array], share: jax.Array | float
) -> dict[str, jax.Array]:
    """Choose, in every type of site, the share of the channels that are on whose removal costs the loss most.

    The j-th best channels of all heads of a layer are one unit, worth the sum of their F. Those of most worth stay, as many as
    the share of all units in the layers' sites rounds to, and the first of every site. Of equal ones the first stay.

    Args:
      adapters: {site path: adapter}, whose channels once off stay off.
      fisher: {site path: F}, shaped as the logits.
      share: of all channels of a type, those that are off too.

    Returns:
      {site path: booleans shaped as the logits}.
    """
    types: dict[str, list[str]] = {}
    for path, x in adapters.items():
        types.setdefault(site_at(path, x.a.shape[-2], x.b.shape[-1]).type, []).append(path)
    kept = {}
    for paths in types.values():
        # F is not negative.
        values = {path: adapters[path].grouped(jnp.where(adapters[path].kept(), fisher[path], -1.0)) for path in paths}
        units = [jnp.sum(jnp.sort(x, axis=-1, descending=True), axis=0).at[0].set(jnp.inf) for x in values.values()]
        together = jnp.concatenate(units)
        stay = jnp.maximum(jnp.round(share * together.size), len(paths))
        among = jnp.split(_place(together) < stay, np.cumsum([x.size for x in units])[:-1])
        for (path, x), own in zip(values.items(), among, strict=True):
            kept[path] = (_place(x) < own.sum()).reshape(adapters[path].logits.shape)
    return kept


def _place(values: Any) -> jax.Array:
    """Return the place of every value in its row, the largest first, and of equal ones the first."""
    return jnp.argsort(jnp.argsort(-values, axis=-1, stable=True), axis=-1)


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
