"""The perplexity of a decoder on a text: `python -m experiments.bench perplexity --text FILE`.

The text is one stream of tokens, cut into windows that see nothing of each other; in each all tokens but the first are predicted:

    exp(mean over all predicted tokens of -log p(token | those before it in its window)).
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from experiments.run.cli import parse
from jaxprune.checks import Range, whole
from jaxprune.errors import UsageError, reason
from jaxprune.models import load_decoder, load_tokenizer


@dataclass(frozen=True)
class PerplexityConfig:
    """Measure the perplexity of a decoder on a text."""

    text: Path
    """file of plain text"""
    model: str = "HuggingFaceTB/SmolLM2-135M-Instruct"
    """hub id, folder or GGUF file"""
    window: int = 512
    """tokens that see each other"""
    batch: int = 4
    """windows computed together"""
    windows: int | None = None
    """measure on the first so many only"""


def main(arguments: list[str]) -> None:
    """Measure and print."""
    config = parse(PerplexityConfig, arguments, "experiments.bench perplexity")
    for flag, value, least in (("--window", config.window, 2), ("--batch", config.batch, 1)):
        whole(flag, value, Range(least))
    try:
        text = config.text.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UsageError(f"--text {config.text} cannot be read ({reason(error)}); name a file of plain text") from None
    loaded = load_decoder(config.model)
    ids = np.asarray(load_tokenizer(loaded.source).encode(text, special=False), np.int32)
    count = min(len(ids) // config.window, config.windows or len(ids))
    if not count:
        raise UsageError(f"--text {config.text} has {len(ids)} tokens; expected {config.window} or more")
    rows = ids[: count * config.window].reshape(count, config.window)

    @jax.jit
    def losses(params, rows):
        return loaded.model.apply({"params": params}, rows, targets=jnp.roll(rows, -1, axis=1))[0][:, :-1].sum(axis=1)

    start, total = time.perf_counter(), 0.0
    for first in range(0, count, config.batch):
        part = rows[first : first + config.batch]
        filled = np.resize(part, (config.batch, config.window))
        total += float(losses(loaded.params, filled)[: len(part)].sum())
    tokens, seconds = count * (config.window - 1), time.perf_counter() - start
    print(
        f"{config.model}: perplexity {math.exp(total / tokens):.3f} on {count:,} windows of {config.window} tokens "
        f"({count * config.window / seconds:,.0f} tokens a second)"
    )
