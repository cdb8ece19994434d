"""VeRA (Kopiczko et al. 2024): all sites share one frozen random pair A, B; trained are two vectors at each.

    h = x W + ((x A * d) B) * b,    d = 0.1 and b = 0 at the start

The pair lies once in the training state, without moments, and the `view` hands each site its part, so a checkpoint holds it and
a resumed run needs no other source of it. What is trained is r + d_out at each site, far below any LoRA of that rank, so there
is no plan, no budget and nothing to prune.

The paper draws A and B with Kaiming initialisation for layers of one shape; for several shapes one pair of the largest size is
cut to each, as in PEFT.

Source: "VeRA: Vector-based Random Matrix Adaptation".
"""

from __future__ import annotations

from jaxprune.adapters import init_vera, share_pair
from jaxprune.checks import Positive, Rank, Share
from jaxprune.methods.base import Context, Method, Start
from jaxprune.methods.registry import register


@register(
    paper="Kopiczko et al. 2024, VeRA: Vector-based Random Matrix Adaptation",
    # As its two vectors are small.
    defaults={"learning_rate": 1e-2},
)
def vera(*, rank: Rank = 256, d_initial: Positive = 0.1, dropout: Share = 0.0) -> Method:
    """Train the two vectors of every site.

    Args:
      rank: components of the shared pair; VeRA wants many.
      d_initial: the start of d.
      dropout: rate of the dropout on the adapters' inputs.

    Raises:
      UsageError: a setting is out of range.
    """

    def start(context: Context) -> Start:
        adapters = init_vera(context.key, context.sites, rank=rank, d_initial=d_initial, dropout=dropout)
        return Start(adapters, {}, {}, None, context.params)

    return Method(start, view=lambda state, adapters, masks, key, step: (share_pair(adapters), masks), name="vera")
