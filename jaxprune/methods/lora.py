"""LoRA with one rank for all sites (Hu et al. 2022): h = x W + s (x A) B, s = alpha / r."""

from __future__ import annotations

from jaxprune.adapters import init_lora
from jaxprune.allocation import uniform_plan
from jaxprune.checks import Positive, Rank, Share
from jaxprune.methods.base import Context, Method, Start
from jaxprune.methods.registry import register


@register(paper="Hu et al. 2022, LoRA: Low-Rank Adaptation of Large Language Models")
def lora(*, rank: Rank = 8, alpha: Positive | None = None, dropout: Share = 0.0) -> Method:
    """Give every site the same rank.

    Args:
      rank: components at each site.
      alpha: numerator of s = alpha / rank; None for 2 * rank, that is s = 2.
      dropout: rate of the dropout on the adapters' inputs.

    Raises:
      UsageError: a setting is out of range.
    """

    def start(context: Context) -> Start:
        plan = uniform_plan(context.sites, rank)
        adapters, masks = init_lora(context.key, context.sites, plan.ranks, alpha=alpha, dropout=dropout)
        return Start(adapters, {}, masks, plan, context.params)

    return Method(start, name="lora")
