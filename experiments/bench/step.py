"""Time training steps of methods in turn, and beside Hugging Face PEFT on PyTorch: `python -m experiments.bench step`.

All train the same architecture with random weights, float32, AdamW, no dropout, on the same batch of full rows, and the head.
They run in turn in one session, one step each, so that a machine whose speed drifts slows all. The peer trains LoRA on all
six kinds of linear layers in its own interpreter (`--peer-python`, with torch and peft installed).

After every round each side times plain products of the step's sizes. A second table has what a step of LoRA computes, by
arithmetic, and which share of the rate of its own products a side reaches.
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
from jaxprune.checks import one_of
from jaxprune.errors import UsageError
from jaxprune.methods import METHODS

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
    for name in config.methods:
        one_of("--methods", name, METHODS)
    # A method without components has no such flag.
    rank = [] if config.rank is None else ["--rank", str(config.rank)]
    settings = [
        parse_run(["--method", name, *(rank if METHODS[name].components else [])], "bench").resolve()
        for name in config.methods
    ]
    with peer_step(config) if config.peer_python else contextlib.nullcontext() as peer:
        _time(config, settings, peer)


def _time(config: StepConfig, settings: Sequence[RunConfig], peer: Callable[[str], float] | None) -> None:
    world = setting(config.size, config.batch, config.length)
    sides = {each.method: our_step(world, each) for each in settings}
    products = {"jaxprune": our_products(config)}
    if peer:
        sides["PEFT"] = lambda: peer("step")
        products["PEFT"] = lambda: peer("products")
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    plain: dict[str, list[float]] = {name: [] for name in products}
    for number in range(config.steps + 2):
        for times, timed in (seconds, sides), (plain, products):
            for name, once in timed.items():
                taken = once()
                if number >= 2:
                    times[name].append(taken)
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
    if "lora" not in seconds:
        return
    print(f"\n{'':11s} GFLOP a step: forward  backward  adapters  GFLOP/s  of plain products  share")
    for name, side in (("lora", "jaxprune"), ("PEFT", "PEFT")):
        if side not in plain:
            continue
        rank = 8 if config.rank is None else config.rank
        _, width, layers, _, mlp = SIZES[config.size]
        work = step_flops(width, layers, mlp, config.batch, config.length, rank, last_row=side == "jaxprune")
        rate = sum(work) / np.median(seconds[name]) / 1e9
        own = product_flops(config) / np.median(plain[side]) / 1e9
        forward, backward, adapters = (part / 1e9 for part in work)
        print(
            f"{name:11s} {forward:21.2f} {backward:9.2f} {adapters:9.2f} {rate:8.1f} {own:18.1f} {100 * rate / own:5.0f} %"
        )


class Flops(NamedTuple):
    """Floating-point operations of one training step: products of the frozen model, and those that adapters add."""

    forward: float
    backward: float
    adapters: float


def step_flops(
    width: int, layers: int, mlp: int, batch: int, length: int, rank: int, *, last_row: bool, classes: int = 2
) -> Flops:
    """Count the products of a training step of LoRA on all six linears of every layer of a BERT encoder.

    A product of (n, i) and (i, o) is 2 n i o. Backward goes through every product for its input, but for the lowest layer's
    queries, keys and values, whose input is not trained; no gradient of a frozen kernel is formed. Attention has two products
    forward and four backward. An adapter has three times 2 n r (i + o), less where its input needs no gradient. The head's
    trained kernel of `width` to `width` and that to the classes are with the frozen model.

    Args:
      width: of the model.
      layers: how many.
      mlp: width of the MLP.
      batch: rows.
      length: tokens of a row.
      rank: of every adapter.
      last_row: whether the last layer computes queries, outputs and MLP of the first tokens alone, as here, but not in
        `transformers`.
      classes: outputs of the head.
    """
    tokens = batch * length
    forward = backward = adapters = 0.0
    for layer in range(layers):
        first = last_row and layer == layers - 1
        rows = batch if first else tokens
        sites = [  # rows, d_in, d_out, whether it reads the input of the layer
            (rows, width, width, True), (tokens, width, width, True), (tokens, width, width, True),
            (rows, width, width, False), (rows, width, mlp, False), (rows, mlp, width, False),
        ]  # fmt: skip
        for n, d_in, d_out, reads_input in sites:
            needed = layer > 0 or not reads_input
            forward += 2 * n * d_in * d_out
            backward += 2 * n * d_in * d_out * needed
            adapters += 2 * n * rank * (3 * (d_in + d_out) - d_in * (not needed))
        attention = 2 * rows * length * width
        forward += 2 * attention
        backward += 4 * attention
    head = 2 * batch * width * (width + classes)
    return Flops(forward + head, backward + 2 * head, adapters)


def _products(config: StepConfig) -> list[tuple[int, int, int]]:
    """Return the sizes (n, i, o) of the products that most of a step is."""
    _, width, _, _, mlp = SIZES[config.size]
    tokens = config.batch * config.length
    return [(tokens, width, width), (tokens, width, mlp), (tokens, mlp, width)]


def product_flops(config: StepConfig) -> int:
    """Count the operations of the plain products that both sides time."""
    return sum(2 * n * i * o for n, i, o in _products(config))


def our_products(config: StepConfig) -> Callable[[], float]:
    """Return a function that computes the plain products, one after the other, and returns their seconds."""
    import jax
    import jax.numpy as jnp

    pairs = [(jnp.ones((n, i)), jnp.ones((i, o))) for n, i, o in _products(config)]
    multiply = jax.jit(jnp.matmul)

    def run() -> float:
        begin = time.perf_counter()
        for x, kernel in pairs:
            jax.block_until_ready(multiply(x, kernel))
        return time.perf_counter() - begin

    return run


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
    step = jp.make_step(world.forward, world.loss_fn, optimizer, method)
    weights = {**start.weights, **jp.init_weights(params, "^head/")}
    state = jp.init_state(jax.random.key(1), start.adapters, start.masks, optimizer, method, weights=weights)

    def run() -> float:
        nonlocal state
        begin = time.perf_counter()
        state, metrics = step(params, state, world.batch)
        jax.block_until_ready((state.adapters, metrics))
        return time.perf_counter() - begin

    return run


@contextlib.contextmanager
def peer_step(config: StepConfig) -> Iterator[Callable[[str], float]]:
    """Start the other side, a process that does what each line it reads says; give a function that has it do so."""
    vocab, width, layers, heads, mlp = SIZES[config.size]
    settings = dict(
        family=config.size, vocab_size=vocab, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=mlp, batch=config.batch, length=config.length,
        rank=8 if config.rank is None else config.rank, products=_products(config),
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

    def step(what: str) -> float:
        assert process.stdin and process.stdout
        try:
            process.stdin.write(f"{what}\n")
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
