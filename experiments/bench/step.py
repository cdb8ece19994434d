"""Time training steps of methods in turn, and beside Hugging Face PEFT on PyTorch: `python -m experiments.bench step`.

All train the same architecture with random weights, float32, AdamW, no dropout, on the same batch of full rows, and the head.
They run in turn in one session, one step each, so that a machine whose speed drifts slows all. The peer trains LoRA on all
six kinds of linear layers in its own interpreter (`--peer-python`, with torch and peft installed).
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from experiments.run.cli import parse
from experiments.run.config import RunConfig
from experiments.run.flags import parse_run
from experiments.run.stopping import before_end
from jaxprune.errors import UsageError

# vocabulary, width, layers, heads, MLP width
SIZES = {"roberta-base": (50265, 768, 12, 12, 3072), "minilm": (30522, 384, 6, 12, 1536)}


@dataclass(frozen=True)
class StepConfig:
    """Time training steps of methods in turn, and PEFT's on PyTorch."""

    size: Literal["roberta-base", "minilm"] = "roberta-base"
    """architecture"""
    batch: int = 32
    """rows a step"""
    length: int = 64
    """tokens a row"""
    methods: tuple[str, ...] = ("lora",)
    """what to time; ratios are to the first"""
    rank: int | None = None
    """components at every site [each method's own of experiments.glue; lora: 8]"""
    steps: int = 10
    """timed steps of each, after two that are not counted"""
    peer_python: str | None = None
    """interpreter that has torch, transformers and peft"""


def main(arguments: list[str]) -> None:
    """Time the steps and print seconds, tokens a second and ratios of medians."""
    config = parse(StepConfig, arguments, "experiments.bench step")
    if min(config.batch, config.length, config.steps) < 1 or not config.methods:
        raise UsageError("--batch, --length and --steps must be 1 or more, and --methods name one at least")
    settings = [
        parse_run(["--method", name, *([] if config.rank is None else ["--rank", str(config.rank)])], "bench").resolve()
        for name in config.methods
    ]
    with peer_step(config) if config.peer_python else contextlib.nullcontext() as peer:
        _time(config, settings, peer)


def _time(config: StepConfig, settings: Sequence[RunConfig], peer: Callable[[], float] | None) -> None:
    world = setting(config.size, config.batch, config.length)
    sides = {each.method: our_step(world, each) for each in settings}
    if peer:
        sides["PEFT"] = peer
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(config.steps + 2):
        for name, step in sides.items():
            taken = step()
            if number >= 2:
                seconds[name].append(taken)
    tokens = config.batch * config.length
    ranks = "the methods' own ranks" if config.rank is None else f"rank {config.rank}"
    print(f"{config.size}, {config.batch} x {config.length} tokens, {ranks}, float32, {config.steps} steps each")
    print(f"{'':11s} median, s      min      max   tokens/s  ratio to {config.methods[0]}")
    first = np.median(seconds[config.methods[0]])
    for name, values in seconds.items():
        median = np.median(values)
        print(
            f"{name:11s} {median:9.3f} {min(values):8.3f} {max(values):8.3f} {tokens / median:10,.0f} {median / first:9.2f}"
        )


class Setting(NamedTuple):
    """An encoder with random weights and one batch of full rows."""

    encoder: Any
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
    return Setting(encoder, params, jp.find_sites(params), jp.attach(model), loss_fn, data)


def our_step(world: Setting, config: RunConfig) -> Callable[[], float]:
    """Return a function that runs one whole training step, waits for it and returns its seconds."""
    import jax
    import optax

    import jaxprune as jp
    from experiments.run.build import make_method

    # Of so long a run only the beginning is seen: nothing is pruned yet.
    method, optimizer = make_method(config, 10_000, world.encoder.num_heads), optax.adamw(1e-3)
    start = method.start(
        jp.Context(jax.random.key(0), world.params, world.sites, world.forward, world.loss_fn, [world.batch])
    )
    params = start.params
    adapters = {**jp.init_weights(params, "^head/"), **start.adapters}
    step = jp.make_step(world.forward, world.loss_fn, optimizer, method)
    state = jp.init_state(jax.random.key(1), adapters, start.masks, optimizer, method, world.sites)

    def run() -> float:
        nonlocal state
        begin = time.perf_counter()
        state, metrics = step(params, state, world.batch)
        jax.block_until_ready((state.adapters, metrics))
        return time.perf_counter() - begin

    return run


@contextlib.contextmanager
def peer_step(config: StepConfig) -> Iterator[Callable[[], float]]:
    """Start the other side, a process that trains one step for every line it reads; give a function that has it do so."""
    vocab, width, layers, heads, mlp = SIZES[config.size]
    settings = dict(
        family=config.size, vocab_size=vocab, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=mlp, batch=config.batch, length=config.length,
        rank=8 if config.rank is None else config.rank,
    )  # fmt: skip
    # By its text: run as a file, the names of its neighbours would stand before those of installed packages.
    script = Path(__file__).with_name("_peer_step.py").read_text()
    assert config.peer_python
    try:
        process = subprocess.Popen(
            [config.peer_python, "-c", script, json.dumps(settings)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
    except OSError as error:
        raise UsageError(f"--peer-python {config.peer_python!r} cannot be run ({error.strerror})") from None

    def step() -> float:
        assert process.stdin and process.stdout
        try:
            process.stdin.write("\n")
            process.stdin.flush()
            return float(process.stdout.readline())
        except (BrokenPipeError, ValueError):
            raise UsageError("the interpreter of --peer-python has no working torch, transformers and peft") from None

    with before_end(process.kill):
        try:
            yield step
        finally:
            process.kill()
            process.wait()
