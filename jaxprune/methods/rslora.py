"""Rank-stabilised LoRA (Kalajdzievski 2023): s = alpha / sqrt(r), so that high ranks learn as fast as low ones."""

from __future__ import annotations

import math

from jaxprune.adapters import init_lora
from jaxprune.allocation import uniform_plan
from jaxprune.checks import Positive, Rank, Share
from jaxprune.methods.base import Context, Method, Start
from jaxprune.methods.registry import register


@register(paper="Kalajdzievski 2023, A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA")
def rslora(*, rank: Rank = 8, alpha: Positive | None = None, dropout: Share = 0.0) -> Method:
    """Give every site the same rank, and the scale s = alpha / sqrt(rank).

    Args:
      rank: components at each site.
      alpha: numerator of s; None for 8, PEFT's default.
      dropout: rate of the dropout on the adapters' inputs.

    Raises:
      UsageError: a setting is out of range.
    """

    def start(context: Context) -> Start:
        plan = uniform_plan(context.sites, rank)
        scale = (8.0 if alpha is None else alpha) / math.sqrt(rank)
        adapters, masks = init_lora(context.key, context.sites, plan.ranks, scale=scale, dropout=dropout)
        return Start(adapters, {}, masks, plan, context.params)

    return Method(start, name="rslora")
