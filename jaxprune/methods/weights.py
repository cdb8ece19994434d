"""The two baselines that train the model's own parameters: full fine-tuning, and BitFit (Ben Zaken et al. 2022)."""

from __future__ import annotations

from jaxprune.adapters import init_weights
from jaxprune.methods.base import Method, Start


def full() -> Method:
    """Train every parameter."""
    return Method(lambda context: Start({}, init_weights(context.params, ""), {}, None, context.params), name="full")


def bitfit() -> Method:
    """Train the bias of every layer and of every normalisation, and nothing else."""
    biases = r"(^|/)bias$"
    return Method(
        lambda context: Start({}, init_weights(context.params, biases), {}, None, context.params), name="bitfit"
    )
