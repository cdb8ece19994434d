"""The two baselines that train the model's own parameters: full fine-tuning, and BitFit (Ben Zaken et al. 2022)."""

from __future__ import annotations

import re

from jaxprune.adapters import init_weights
from jaxprune.errors import UsageError
from jaxprune.methods.base import Context, Method, Start
from jaxprune.methods.registry import register
from jaxprune.sites import flatten


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
    """Train the bias of every layer and of every normalisation, and nothing else.

    Raises (by `start`):
      UsageError: the model has none.
    """
    biases = r"(^|/)bias$"

    def start(context: Context) -> Start:
        if not any(re.search(biases, path) for path in flatten(context.params)):
            raise UsageError("the model has no biases, and BitFit trains nothing else; choose another method")
        return Start({}, init_weights(context.params, biases), {}, None, context.params)

    return Method(start, name="bitfit")
