"""Bottleneck adapters, the first of the parameter-efficient methods: y <- y + act(y D + c) U + e on outputs of layers.

- `houlsby` puts one after the attention's output projection and one after the MLP, in every layer (Houlsby et al. 2019,
  "Parameter-efficient transfer learning for NLP");
- `pfeiffer` puts one after the MLP alone (Pfeiffer et al. 2021, "AdapterFusion").

Both come before the sum with the residual stream. Departures from the papers: U starts at exactly 0, not near it, so that
training starts from the model itself; the model's dropout follows the bottleneck, where the papers put it before; the
LayerNorms stay frozen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated

from jaxprune.adapters import count, init_bottleneck
from jaxprune.adapters.bottleneck import ACTIVATIONS
from jaxprune.allocation import Plan
from jaxprune.checks import OneOf, Range, Rank
from jaxprune.errors import UsageError, nearest
from jaxprune.methods.base import Context, Method, Start
from jaxprune.methods.registry import register

Reduction = Annotated[float, Range(1)]
Activation = Annotated[str, OneOf(tuple(ACTIVATIONS))]

_IN_DECODERS = {"out": "o_proj", "fc2": "down_proj"}


@register(paper="Houlsby et al. 2019, Parameter-Efficient Transfer Learning for NLP")
def houlsby(
    *,
    reduction: Reduction = 16.0,
    width: Rank | None = None,
    activation: Activation = "gelu",
    types: Sequence[str] | None = None,
) -> Method:
    """Train a bottleneck after each attention and each MLP.

    Args:
      reduction: outputs of a site for each unit of its bottleneck; 16 makes 48 units of 768.
      width: units at every site, instead of `reduction`.
      activation: `gelu`, `relu`, `silu` or `tanh`.
      types: types of the sites that end the attention and the MLP; None for `out` and `fc2`, or in decoders `o_proj` and
        `down_proj`.
    """
    return _bottleneck("houlsby", reduction, width, activation, types, ("out", "fc2"))


@register(paper="Pfeiffer et al. 2021, AdapterFusion")
def pfeiffer(
    *,
    reduction: Reduction = 16.0,
    width: Rank | None = None,
    activation: Activation = "relu",
    types: Sequence[str] | None = None,
) -> Method:
    """Train a bottleneck after each MLP.

    Args:
      reduction: outputs of a site for each unit of its bottleneck; 16 makes 48 units of 768.
      width: units at every site, instead of `reduction`.
      activation: `gelu`, `relu`, `silu` or `tanh`.
      types: types of the sites that end the MLP; None for `fc2`, or in decoders `down_proj`.
    """
    return _bottleneck("pfeiffer", reduction, width, activation, types, ("fc2",))


def _bottleneck(
    name: str, reduction: float, width: int | None, activation: str, given: Sequence[str] | None, ends: Sequence[str]
) -> Method:
    def start(context: Context) -> Start:
        known = {site.type for site in context.sites}
        decoder = "down_proj" in known
        types = [_IN_DECODERS[end] if decoder else end for end in ends] if given is None else given
        for kind in types:
            if kind not in known:
                raise UsageError(
                    f"no site of type {kind!r} to put a bottleneck after; nearest types: {nearest(kind, known)}; set types"
                )
        units = {
            site.path: (width or max(1, int(site.d_out / reduction))) if site.type in types else 0
            for site in context.sites
        }
        adapters, masks = init_bottleneck(context.key, context.sites, units, activation=activation)
        cost = count(adapters, masks)
        status = f"Bottlenecks after {len(adapters)} of {len(units)} sites ({', '.join(types)}), nothing optimised."
        plan = Plan(units, math.nan, status, math.nan, 0.0, "uniform", cost, cost, tuple(context.sites))
        return Start(adapters, {}, masks, plan, context.params)

    return Method(start, name=name)
