"""Learn which channels to prune while DoRA adapts the rest (Ali et al., ASP-DAC 2025), in two stages.

Every site gets DoRA, and every masked site a logit l for each output channel (`jaxprune.adapters.MaskedDora`):

    h = g * (magnitude * x V / |V| + bias),    V = W + s A B,    g in {0, 1} per channel.

Stage 1 trains the masks with the adapters. Each step draws one mask and differentiates straight through it:

    u ~ Logistic(0, 1),    y = sigmoid((l + u) / tau),    g = 1[y > 1/2] forward, the gradient of y backward,

with tau falling from 1.0 to 0.3 exponentially; evaluation has no noise, g = 1[l > 0]. Added to the loss is lam * D, or
lam * (D - target)^2, where D is the mean of sigmoid(l) over all masked channels, each weighted by its kernel parameters. The
event at the end of stage 1 freezes g = 1[l > 0] (the largest logit of a group where none is positive), and stage 2 trains A, B
and the magnitudes on. `jaxprune.prune.extract` then takes the masked channels out of the model.

The source gives the masks, their place on DoRA's magnitudes, the Gumbel-Sigmoid and two learning rates, 5e-5 and 1e-5. Ours
are: the penalty and its weight, the initial logit 3, the temperatures, the length of stage 1, the reading of the two rates as
those of the stages, the mask on the bias (without which a channel cannot be removed) and the channel that every group keeps.

Source: "Learning to prune and low-rank adaptation for compact language model deployment", slides and abstract.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.adapters import Adapters, MaskedDora, mask_channels, settle
from jaxprune.adapters.base import key_for
from jaxprune.adapters.channel import SETTLED
from jaxprune.errors import UsageError, nearest
from jaxprune.methods.base import Context, Method, Start
from jaxprune.methods.dora import dora
from jaxprune.prune import Decision

# Types of the masked sites. The paper's numbers of parameters are those of DoRA of rank 8 on query and value, all masked;
# what makes an encoder fast is the MLP.
PRESETS = {"paper_like": ("query", "value"), "useful": ("query", "value", "fc1")}

# Their channels belong to attention heads.
_HEADED = ("query", "key", "value", "q_proj", "k_proj", "v_proj")


def channelmask(
    *,
    total_steps: int,
    stage: float = 0.5,
    channels: str | Sequence[str] = "useful",
    lam: float = 1.0,
    target: float | None = None,
    rank: int = 8,
    alpha: float | None = None,
    dropout: float = 0.0,
    heads: int = 1,
    shared: bool = False,
    start_logit: float = 3.0,
    temperatures: tuple[float, float] = (1.0, 0.3),
) -> Method:
    """Train channel masks with DoRA, freeze them, and train on.

    Args:
      total_steps: optimiser steps of the whole run.
      stage: share of them that stage 1 takes, above 0 and up to 1.
      channels: `paper_like`, `useful`, or types of the sites to mask. A mask on queries stands for the query-key pairs.
      lam: weight of the penalty.
      target: share D of the channels that should stay; None to penalise D itself.
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
    if min(first, last) <= 0 or lam < 0 or not (target is None or 0 < target <= 1):
        raise UsageError(
            f"temperatures {first}, {last}, lam {lam}, target {target} are out of range; expected above 0, 0 or more, and "
            f"a share of channels above 0 and up to 1"
        )
    end = stage_end(total_steps, stage)

    def view(adapters, masks, key, step):
        if key is None:
            return adapters, masks
        tau = temperature(step, end, first, last)
        drawn = {
            path: dataclasses.replace(x, logits=draw(x.logits, key_for(key, path), tau))
            for path, x in _masked(adapters)
        }
        return {**adapters, **drawn}, masks

    def penalty(adapters):
        mean = density(adapters)
        return lam * (mean if target is None else jnp.square(mean - target))

    def decide(state, adapters, masks, step, context):
        return state, _freeze({path: (x, np.asarray(x.kept())) for path, x in _masked(adapters)})

    return Method(
        lambda context: _start(context, channels, rank, alpha, dropout, heads, shared, start_logit),
        view=view,
        penalty=penalty if lam else None,
        decide=decide,
        triggers=lambda number: number == end,
    )


def uniformmask(
    *,
    total_steps: int,
    stage: float = 0.5,
    channels: str | Sequence[str] = "useful",
    ratio: float = 0.25,
    rank: int = 8,
    alpha: float | None = None,
    dropout: float = 0.0,
    heads: int = 1,
    shared: bool = False,
) -> Method:
    """Prune the same share of channels everywhere, those of the smallest magnitude: the control of `channelmask`.

    The stages are the same, with plain DoRA in the first. The magnitude of a channel is that of its column; heads that
    share a mask add squares up.

    Args:
      ratio: share of the channels of every group (a head, or a whole site) that goes; one stays in any case.

    The other arguments, and what is raised, are as for `channelmask`.
    """
    if not 0 <= ratio < 1:
        raise UsageError(f"ratio {ratio} is out of range; expected a share of channels, 0 or more and below 1")
    end = stage_end(total_steps, stage)

    def decide(state, adapters, masks, step, context):
        return state, _freeze({path: (x, _largest(x, ratio)) for path, x in _masked(adapters)})

    return Method(
        # Settled from the start: all channels are on, and no gradient reaches the logits.
        lambda context: _start(context, channels, rank, alpha, dropout, heads, shared, SETTLED),
        decide=decide,
        triggers=lambda number: number == end,
    )


def temperature(step: jax.Array, end: int, first: float, last: float) -> jax.Array:
    """Return tau = first (last / first)^(step / end), and `last` after stage 1's `end`."""
    return first * (last / first) ** jnp.minimum(step / end, 1.0)


def draw(logits: jax.Array, key: jax.Array, tau: jax.Array) -> jax.Array:
    """Return (l + u) / tau with u ~ Logistic(0, 1), whose sign is the drawn mask."""
    return (logits + jax.random.logistic(key, logits.shape, logits.dtype)) / tau


def density(adapters: Adapters) -> jax.Array:
    """Return the mean of sigmoid(l) over all masked channels, weighted by the kernel parameters of a channel.

    Those are d_in, times the heads that share a logit; the row or column of the next kernel that goes with a channel is in
    proportion to them.
    """
    sites = [(x.a.shape[-2] * (x.magnitude.shape[-1] // x.logits.shape[-1]), x.logits) for _, x in _masked(adapters)]
    total = sum((weight * jnp.sum(jax.nn.sigmoid(logits)) for weight, logits in sites), jnp.zeros(()))
    return total / sum(weight * logits.size for weight, logits in sites)


def stage_end(total_steps: int, stage: float) -> int:
    """Return the last step of stage 1."""
    if total_steps < 1 or not 0 < stage <= 1:
        raise UsageError(
            f"total_steps {total_steps}, stage {stage} are out of range; expected 1 or more, and a share above 0 and up to 1"
        )
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
    if isinstance(channels, str) and channels not in PRESETS:
        raise UsageError(f"channels {channels!r} is not known; expected one of {', '.join(PRESETS)}, or types of sites")
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


def _largest(adapter: MaskedDora, ratio: float) -> np.ndarray:
    """Choose the channels of the largest magnitude in every group; of equal ones the lower index stays."""
    groups = (adapter.heads, adapter.magnitude.shape[-1] // adapter.heads)
    size = np.asarray(adapter.magnitude, np.float64).reshape(*adapter.magnitude.shape[:-1], *groups) ** 2
    if adapter.logits.shape[-1] == groups[-1]:
        size = size.sum(-2, keepdims=True)
    order = np.argsort(-size, axis=-1, kind="stable")
    stay = max(1, round((1 - ratio) * groups[-1]))
    kept = np.zeros(size.shape, bool)
    np.put_along_axis(kept, order[..., :stay], True, axis=-1)
    return kept.reshape(adapter.logits.shape)


def _freeze(chosen: Mapping[str, tuple[MaskedDora, Any]]) -> Decision:
    """Settle the masks, and say for every type how many channels stay."""
    counts: dict[str, list[int]] = {}
    for path, (_, kept) in chosen.items():
        entry = counts.setdefault(path.rpartition("/")[2], [0, 0])
        entry[0] += int(kept.sum())
        entry[1] += kept.size
    report = {"channels": {kind: {"kept": kept, "of": of} for kind, (kept, of) in counts.items()}}
    return Decision(
        {}, {path: settle(adapter, jnp.asarray(kept)) for path, (adapter, kept) in chosen.items()}, report=report
    )
