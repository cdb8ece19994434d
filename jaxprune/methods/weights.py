"""The two baselines that train the model's own parameters: full fine-tuning, and BitFit (Ben Zaken et al. 2022)."""

from __future__ import annotations

from jaxprune.adapters import init_weights
from jaxprune.methods.base import Method, Start
from jaxprune.methods.registry import register


@register(
    paper="Devlin et al. 2019, BERT",
    # The largest of BERT's grid: 1e-3 wrecks a pretrained model.
    defaults={"learning_rate": 5e-5},
)
def full() -> Method:
    """Train every parameter."""
    return Method(lambda context: Start({}, init_weights(context.params, ""), {}, None, context.params), name="full")


@register(paper="Ben Zaken et al. 2022, BitFit")
def bitfit() -> Method:
    """Train the bias of every layer and of every normalisation, and nothing else."""
    biases = r"(^|/)bias$"
    return Method(
        lambda context: Start({}, init_weights(context.params, biases), {}, None, context.params), name="bitfit"
    )
