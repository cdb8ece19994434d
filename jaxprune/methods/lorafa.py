"""LoRA-FA (Zhang et al. 2023): plain LoRA whose A is frozen where it was drawn; only B is trained, and only B has moments.

    h = x W + s (x A) B,    s = alpha / r,    A ~ U(-1/sqrt(d_in), 1/sqrt(d_in)) and B = 0 as in `lora`.

B gets its ordinary gradient. PEFT's LoRA-FA optimizer multiplies it by (A A^T)^-1 / s^2 (in PEFT's orientation); that is a choice
of optimizer, and here the optimizer is the caller's. The plan counts a rank as LoRA would, r (d_in + d_out); trained are r d_out.

Source: "LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models Fine-tuning".
"""

from __future__ import annotations

from jaxprune.adapters import to_lorafa
from jaxprune.checks import Positive, Rank, Share
from jaxprune.methods.base import Context, Method, Start
from jaxprune.methods.lora import lora
from jaxprune.methods.registry import register


@register(paper="Zhang et al. 2023, LoRA-FA: Memory-efficient Low-rank Adaptation")
def lorafa(*, rank: Rank = 8, alpha: Positive | None = None, dropout: Share = 0.0) -> Method:
    """Give every site the same rank, and train B alone.

    Args:
      rank: components at each site.
      alpha: numerator of s = alpha / rank; None for 2 * rank, that is s = 2.
      dropout: rate of the dropout on the adapters' inputs.

    Raises:
      UsageError: a setting is out of range.
    """
    plain = lora(rank=rank, alpha=alpha, dropout=dropout)

    def start(context: Context) -> Start:
        begun = plain.start(context)
        return begun._replace(adapters=to_lorafa(begun.adapters))

    return Method(start, name="lorafa")
