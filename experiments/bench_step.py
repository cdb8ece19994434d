"""Time one LoRA training step beside Hugging Face PEFT on PyTorch: `python -m experiments.bench step`.

Both train the same architecture with random weights, LoRA on all six kinds of linear layers and the head, float32, AdamW,
no dropout, the same batch of full rows. They run in turn in one session, one step each, so that a machine whose speed drifts
slows both. The peer runs in its own interpreter (`--peer-python`, with torch and peft installed); without it only ours
is timed.
"""

from __future__ import annotations

import json
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from experiments.cli import parse
from jaxprune.errors import UsageError

# vocabulary, width, layers, heads, MLP width
SIZES = {"roberta-base": (50265, 768, 12, 12, 3072), "minilm": (30522, 384, 6, 12, 1536)}


@dataclass(frozen=True)
class StepConfig:
    """Time a LoRA training step, in turn with PEFT on PyTorch."""

    size: Literal["roberta-base", "minilm"] = "roberta-base"
    """architecture"""
    batch: int = 32
    """rows a step"""
    length: int = 64
    """tokens a row"""
    rank: int = 16
    """components at every site"""
    steps: int = 10
    """timed steps of each side, after two that are not counted"""
    peer_python: str | None = None
    """interpreter that has torch, transformers and peft"""


def main(arguments: list[str]) -> None:
    """Time the steps and print seconds, tokens a second and the ratio of medians."""
    config = parse(StepConfig, arguments, "experiments.bench step")
    peer = Peer(config) if config.peer_python else None
    ours = our_step(config)
    seconds: dict[str, list[float]] = {"jaxprune": [], "peft": []}
    for number in range(config.steps + 2):
        start = time.perf_counter()
        ours()
        taken = time.perf_counter() - start
        theirs = peer.step() if peer else None
        if number >= 2:
            seconds["jaxprune"].append(taken)
            if theirs is not None:
                seconds["peft"].append(theirs)
    tokens = config.batch * config.length
    print(
        f"{config.size}, {config.batch} x {config.length} tokens, rank {config.rank}, float32, {config.steps} steps each"
    )
    for name, values in seconds.items():
        if values:
            median = float(np.median(values))
            print(
                f"{name:9s} median {median:.3f} s  min {min(values):.3f}  max {max(values):.3f}  {tokens / median:,.0f} tokens/s"
            )
    if peer:
        peer.close()
        print(f"ratio of medians, peft / jaxprune: {np.median(seconds['peft']) / np.median(seconds['jaxprune']):.2f}")


class Setting(NamedTuple):
    """An encoder with random weights and one batch of full rows."""

    params: Any
    sites: Any
    forward: Any
    loss_fn: Any
    batch: dict[str, np.ndarray]


def setting(size: str, batch: int, length: int) -> Setting:
    """Make an encoder of a size, without dropout, and a batch for it."""
    import optax

    import jaxprune as jp
    from jaxprune.models import EncoderConfig, init_classifier

    vocab, width, layers, heads, mlp = SIZES[size]
    still = dict.fromkeys(
        ("embedding_dropout", "attention_dropout", "attention_output_dropout", "mlp_dropout", "classifier_dropout"), 0.0
    )
    roberta: dict[str, Any] = dict(
        family="roberta", type_vocab_size=1, max_positions=514, position_offset=2, pad_token_id=1
    )
    family = roberta if size == "roberta-base" else {}
    encoder = EncoderConfig(
        vocab_size=vocab,
        hidden_size=width,
        num_layers=layers,
        num_heads=heads,
        intermediate_size=mlp,
        **still,
        **family,
    )
    model, params = init_classifier(encoder)

    def loss_fn(apply, batch, key):
        return optax.softmax_cross_entropy_with_integer_labels(apply(batch["ids"]), batch["labels"]).mean()

    rng = np.random.default_rng(0)
    data = {
        "ids": rng.integers(5, vocab, (batch, length), np.int32),
        "labels": rng.integers(0, 2, batch, np.int32),
    }
    return Setting(params, jp.find_sites(params), jp.attach(model), loss_fn, data)


def our_step(config: StepConfig) -> Any:
    """Return a function that runs one whole training step and waits for it."""
    import jax
    import optax

    import jaxprune as jp

    params, sites, forward, loss_fn, batch = setting(config.size, config.batch, config.length)
    adapters, masks = jp.init_lora(jax.random.key(0), sites, jp.uniform_plan(sites, config.rank).ranks)
    optimizer = optax.adamw(1e-3)
    step = jp.make_step(forward, loss_fn, optimizer)
    state = jp.init_state(jax.random.key(1), {**adapters, **jp.init_weights(params, "^head/")}, masks, optimizer)

    def run() -> None:
        nonlocal state
        state, metrics = step(params, state, batch)
        jax.block_until_ready((state.adapters, metrics))

    return run


class Peer:
    """The other side: a process that trains one step whenever it reads a line, and answers with its seconds."""

    def __init__(self, config: StepConfig) -> None:
        vocab, width, layers, heads, mlp = SIZES[config.size]
        settings = dict(
            family=config.size, vocab_size=vocab, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
            intermediate_size=mlp, batch=config.batch, length=config.length, rank=config.rank,
        )  # fmt: skip
        script = Path(__file__).with_name("peer_step.py")
        assert config.peer_python
        try:
            self._process = subprocess.Popen(
                [config.peer_python, str(script), json.dumps(settings)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL, text=True,
            )  # fmt: skip
        except OSError as error:
            raise UsageError(f"--peer-python {config.peer_python!r} cannot be run ({error.strerror})") from None

    def step(self) -> float:
        """Have one step trained and return its seconds."""
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write("\n")
            self._process.stdin.flush()
            return float(self._process.stdout.readline())
        except (BrokenPipeError, ValueError):
            raise UsageError("the interpreter of --peer-python has no working torch, transformers and peft") from None

    def close(self) -> None:
        """End the process."""
        self._process.terminate()
        self._process.wait()
