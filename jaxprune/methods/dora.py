"""DoRA: LoRA for the directions of a kernel's columns, and a trained length for each (Liu et al. 2024).

    W' = m * (W + s A B) / |W + s A B|,    m = |W + s A B| at the start,

with norms by output channel that the gradient takes for constants. Any method whose adapters are LoRA becomes its DoRA by
`with_dora`: ranks are planned, masked, pruned and compacted as before, since the magnitude has no rank axis. Budgets count the
factors; the magnitudes, d_out for each adapted site, come on top.

Source: "DoRA: Weight-Decomposed Low-Rank Adaptation", eq. 5 and section 4.3; what dropout does is as in PEFT.
"""

from __future__ import annotations

from typing import Annotated

from jaxprune.adapters import to_dora
from jaxprune.checks import OneOf, Positive, Rank, Share
from jaxprune.methods.base import Context, Method, Start
from jaxprune.methods.lora import lora
from jaxprune.methods.pissa import pissa
from jaxprune.methods.registry import register

INITS = ("lora", "pissa")


@register(paper="Liu et al. 2024, DoRA: Weight-Decomposed Low-Rank Adaptation")
def dora(
    *, rank: Rank = 8, alpha: Positive | None = None, dropout: Share = 0.0, init: Annotated[str, OneOf(INITS)] = "lora"
) -> Method:
    """Give every site the same rank, and a magnitude.

    Args:
      rank: components at each site.
      alpha: numerator of s = alpha / rank; None for what `init` takes: 2 * rank for LoRA, rank for PiSSA.
      dropout: rate of the dropout on the adapters' inputs.
      init: `"lora"`, or `"pissa"` for factors taken out of the kernels.

    Raises:
      UsageError: a setting is out of range.
    """
    return with_dora((lora if init == "lora" else pissa)(rank=rank, alpha=alpha, dropout=dropout))


def with_dora(method: Method) -> Method:
    """Return the method with DoRA adapters in place of its LoRA ones; nothing else about it changes.

    Raises (by `start`):
      UsageError: the method's adapters are not LoRA.
    """

    def start(context: Context) -> Start:
        begun = method.start(context)
        return begun._replace(adapters=to_dora(begun.adapters, begun.params))

    return method._replace(start=start, name=method.name and f"dora+{method.name}")
