"""Time DPLoRA's pruning events, scores, program and surgery: `python -m experiments.bench event`.

The sites of RoBERTa-base (72) and of Llama 3 8B (224) with adapters, gradients and moments of random numbers, no model: what
is timed is what an event adds to training. The scores of the steps are summed within the training step (`observe`); an event
blends them, solves the program, chooses components by their norms, and masks values and both moments of Adam. With `--basis svd`
every site and its moments are brought into another basis first.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from typing import Literal

import numpy as np

from experiments.bench.allocate import llama_3_8b, roberta_base
from experiments.run.cli import parse
from jaxprune.errors import UsageError

SHAPES = {"roberta-base": roberta_base, "llama-3-8b": llama_3_8b}


@dataclass(frozen=True)
class EventConfig:
    """Time DPLoRA's pruning events."""

    shapes: tuple[Literal["roberta-base", "llama-3-8b"], ...] = ("roberta-base", "llama-3-8b")
    """whose sites"""
    rank: int = 16
    """components at every site at the start"""
    events: int = 10
    """events of a run; the first compiles, the others are timed"""
    ratio: float = 0.6
    """share of the adapter parameters to prune"""
    basis: Literal["trained", "svd"] = "trained"
    """basis in which components are judged"""
    loss: Literal["importance", "components"] = "importance"
    """what ranks are worth"""


def main(arguments: list[str]) -> None:
    """Time the events and print seconds."""
    import jax
    import jax.numpy as jnp
    import optax

    import jaxprune as jp

    config = parse(EventConfig, arguments, "experiments.bench event")
    if config.events < 2:
        raise UsageError(f"--events {config.events} is out of range; expected 2 or more, of which the first compiles")
    for shape in config.shapes:
        sites = SHAPES[shape]()
        method = jp.dplora(
            total_steps=config.events + 2, events=config.events, recovery_steps=0, target=config.ratio, basis=config.basis,
            loss=config.loss,
        )  # fmt: skip
        adapters, masks = jp.init_lora(jax.random.key(0), sites, {site.path: config.rank for site in sites})
        keys = iter(jax.random.split(jax.random.key(2), len(adapters)))
        adapters = {p: dataclasses.replace(x, b=jax.random.normal(next(keys), x.b.shape)) for p, x in adapters.items()}
        optimizer = optax.adamw(1e-4)
        context = jp.Context(jax.random.key(0), {}, sites, lambda *_: None, lambda *_: None)
        state = jp.init_state(jax.random.key(1), adapters, masks, optimizer, method)
        size = np.random.default_rng(0).lognormal(0, 1, len(sites))
        grads = {
            path: jax.tree.map(lambda leaf, s=s: jnp.float32(s) * jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape), x)
            for (path, x), s in zip(state.adapters.items(), size, strict=True)
        }
        observe = jax.jit(method.observe)
        whole, solving = [], []
        for number in method.events:
            own = observe(state.method_state, state.adapters, state.masks, grads, jnp.int32(number), None)
            state = jax.block_until_ready(state._replace(step=jnp.int32(number), method_state=own))
            start = time.perf_counter()
            state, decision = jp.prune(state, method, optimizer, context)
            jax.block_until_ready((state.adapters, state.opt_state, state.masks))
            if decision is None:
                continue
            whole.append(time.perf_counter() - start)
            solving.append(decision.report["solve_seconds"])
        left = jp.count(state.adapters, state.masks) / jp.count(adapters, masks)
        start = time.perf_counter()
        state = jp.compacted(state, method, optimizer)
        jax.block_until_ready((state.adapters, state.opt_state))
        print(
            f"{shape}, {len(sites)} sites of rank {config.rank}, {len(whole)} events to {left:.0%} of the parameters: an event "
            f"takes {np.median(whole[1:]):.3f} s (median; longest {max(whole[1:]):.3f}), {np.median(solving[1:]):.3f} s of "
            f"it the program; the first, with compilation, {whole[0]:.2f} s; compacting afterwards "
            f"{time.perf_counter() - start:.2f} s"
        )
