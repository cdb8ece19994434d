"""Time PrunedLoRA's pruning event at rank 512: `python -m experiments.bench prunedlora`.

One transformer layer with the seven kernels of Llama 3 8B, adapters and gradients of random numbers, no model: what is timed
is what an event adds to training. `observe` is what the method does within each training step, `decide` the event itself
(inverses, scores, the adjustment of the survivors), `apply` masking values and both moments of Adam.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from experiments.run.cli import parse

KERNELS = {
    "q_proj": (4096, 4096),
    "k_proj": (4096, 1024),
    "v_proj": (4096, 1024),
    "o_proj": (4096, 4096),
    "gate_proj": (4096, 14336),
    "up_proj": (4096, 14336),
    "down_proj": (14336, 4096),
}


@dataclass(frozen=True)
class PrunedLoraConfig:
    """Time PrunedLoRA's pruning event on one layer of Llama 3 8B."""

    rank: int = 512
    """components at every site"""
    remove: int = 2
    """components an event takes from every site"""
    score: Literal["obs", "paper_score", "element1"] = "obs"
    """how components are ranked"""
    events: int = 3
    """timed events, after one that compiles"""
    layers: int = 32
    """layers of the whole model, for the estimate"""


def main(arguments: list[str]) -> None:
    """Time the events and print seconds and memory."""
    import jax
    import jax.numpy as jnp
    import optax

    import jaxprune as jp
    from jaxprune.surgery import apply

    config = parse(PrunedLoraConfig, arguments, "experiments.bench prunedlora")
    method = jp.prunedlora(
        rank=config.rank, target=1, interval=1, start_step=1, remove=config.remove, score=config.score
    )
    optimizer, key = optax.adam(1e-4), jax.random.key(0)
    adapters = {}
    for number, (name, (d_in, d_out)) in enumerate(KERNELS.items()):
        one, two = jax.random.split(jax.random.fold_in(key, number))
        a = jax.random.normal(one, (d_in, config.rank)) / 64
        adapters[name] = jp.Lora(a, jax.random.normal(two, (config.rank, d_out)) / 64, 1.0)
    masks = {name: jnp.ones(config.rank) for name in adapters}
    opt_state, state = optimizer.init(adapters), method.init(adapters, masks)
    grads = jax.tree.map(lambda leaf: 1e-3 * leaf[::-1, ::-1], adapters)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves((adapters, opt_state, grads))) / 2**20
    own = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) / 2**20
    observe = jax.jit(method.observe)
    seconds: dict[str, list[float]] = {"observe": [], "decide": [], "apply": []}
    jax.block_until_ready((adapters, opt_state, grads))
    before = _reset_peak()
    assert method.decide
    decide = method.decide

    def timed(name: str, run: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = run()
        jax.block_until_ready([leaf for leaf in jax.tree.leaves(result) if isinstance(leaf, jax.Array)])
        seconds[name].append(time.perf_counter() - start)
        return result

    for number in range(1, config.events + 2):
        state = timed("observe", lambda: observe(state, adapters, masks, grads, number, None))  # noqa: B023
        decision = timed("decide", lambda: decide(state, adapters, masks, number, None)[1])  # noqa: B023
        after = timed("apply", lambda: apply(decision, adapters, masks, opt_state, optimizer))  # noqa: B023
        adapters, masks, opt_state = after
    print(
        f"one layer of Llama 3 8B, rank {config.rank}, {config.remove} components a site and event, score {config.score}; "
        f"adapters, gradients and moments take {held:,.0f} MiB, the method's state {own:,.0f} MiB"
    )
    for name, values in seconds.items():
        median = float(np.median(values[1:]))
        print(
            f"{name:8s} median {median:.3f} s a layer ({config.layers * median:.1f} s for {config.layers}), first with "
            f"compilation {values[0]:.1f} s"
        )
    print(f"peak memory {_status('VmHWM') - before:,.0f} MiB above that before the first event, compilers included")


def _status(name: str) -> float:
    """Read a field of this process's memory status in MiB; NaN where the system is not Linux."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(name + ":")), float("nan"))


def _reset_peak() -> float:
    """Set the peak of resident memory back to what is resident now, and return that in MiB."""
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")
    return _status("VmRSS")
