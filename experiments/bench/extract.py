"""Time inference before and after channels are taken out of a DistilBERT: `python -m experiments.bench extract`.

Random weights, DoRA on all six kinds of linear layers, float32. The same share of the channels of every group goes: of each
layer's MLP, of the values of each head and of the query-key pairs of each head. Both models have their adapters merged, and
the one before has its masked channels at 0, so both give the same logits, which is checked. They run in turn, so that a
machine whose speed drifts slows both.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from experiments.run.cli import parse
from jaxprune.errors import UsageError


@dataclass(frozen=True)
class ExtractConfig:
    """Time inference before and after extraction."""

    batch: int = 32
    """rows of a batch"""
    length: int = 128
    """tokens a row"""
    ratio: float = 0.25
    """share of the channels of every group that goes"""
    layers: int = 6
    """encoder layers"""
    runs: int = 9
    """timed runs of each model, after one that compiles"""


def main(arguments: list[str]) -> None:
    """Time the two models and print seconds, parameters and the ratio of medians."""
    import jax
    import jax.numpy as jnp

    import jaxprune as jp
    from jaxprune.models import EncoderConfig, SequenceClassifier, init_classifier

    config = parse(ExtractConfig, arguments, "experiments.bench extract")
    if min(config.batch, config.length, config.layers, config.runs) < 1:
        raise UsageError("--batch, --length, --layers and --runs must be 1 or more")
    whole = EncoderConfig(
        family="distilbert", num_layers=config.layers, type_vocab_size=0, attention_output_dropout=0.0,
        max_positions=max(512, config.length),
    )  # fmt: skip
    model, params = init_classifier(whole)
    context = jp.Context(jax.random.key(0), params, jp.find_sites(params), jp.attach(model), lambda *_: jnp.zeros(()))
    method = jp.uniformmask(total_steps=1, stage=1.0, ratio=config.ratio, heads=whole.num_heads)
    start = method.start(context)
    assert method.decide
    adapters = {**start.adapters, **method.decide((), start.adapters, start.masks, 1, context)[1].adapters}
    small = jp.extract(whole, params, adapters, start.masks)
    ids = np.random.default_rng(0).integers(1, whole.vocab_size, (config.batch, config.length), np.int32)
    apply = {
        "before": (jax.jit(model.apply), {"params": jp.merge(params, adapters, start.masks)}),
        "after": (
            jax.jit(SequenceClassifier(small.config).apply),
            {"params": jp.merge(small.params, small.adapters, start.masks)},
        ),
    }
    logits = {name: np.asarray(function(variables, ids)) for name, (function, variables) in apply.items()}
    seconds: dict[str, list[float]] = {name: [] for name in apply}
    for _ in range(config.runs):
        for name, (function, variables) in apply.items():
            begin = time.perf_counter()
            jax.block_until_ready(function(variables, ids))
            seconds[name].append(time.perf_counter() - begin)

    print(
        f"DistilBERT, {config.layers} layers, {config.batch} x {config.length} tokens, float32, {config.runs} runs each; "
        f"{config.ratio:.0%} of the channels of every group extracted"
    )
    for name, values in seconds.items():
        tree = apply[name][1]["params"]
        sizes = [sum(leaf.size for leaf in jax.tree.leaves(part)) for part in (tree, tree["encoder"])]
        print(
            f"{name:7s} median {np.median(values):.3f} s  min {min(values):.3f}  max {max(values):.3f}  "
            f"{sizes[0]:,} parameters, {sizes[1]:,} in the encoder"
        )
    print(f"largest difference of a logit: {np.abs(logits['before'] - logits['after']).max():.1e}")
    print(f"ratio of medians, after / before: {np.median(seconds['after']) / np.median(seconds['before']):.2f}")
