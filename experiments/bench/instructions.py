"""Fine-tune a decoder in turn with Hugging Face PEFT on PyTorch: `python -m experiments.bench instructions`.

LoRA of one rank on all linear layers, the same rows in the same order, the same learning rates, AdamW, clipping, no dropout; a
step of each side after the other, so that a machine whose speed drifts slows all. Tokens a second count text, not padding: what
a person waits for. Here rows are packed; the peer pads a batch to its longest row, as its usual collator does. In the end both
sides compute the loss of the held-out rows.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.data.tokens import Encoded
from experiments.run.cli import parse
from experiments.run.flags import parse_run
from experiments.run.stopping import before_end
from jaxprune.checks import Range, whole
from jaxprune.errors import UsageError


@dataclass(frozen=True)
class InstructionsConfig:
    """Fine-tune a decoder on instructions, beside PEFT on PyTorch."""

    train_file: Path
    """rows to train on, as experiments.alpaca takes them"""
    rows: int = 2000
    """so many of them"""
    held_out: int = 200
    """rows to evaluate on, of those held out"""
    model: str = "HuggingFaceTB/SmolLM2-135M-Instruct"
    """hub id, folder or GGUF file"""
    rank: int = 8
    """components at every site"""
    learning_rate: float = 1e-3
    """its peak"""
    batch: int = 16
    """rows a step"""
    max_steps: int | None = None
    """stop after so many steps [one epoch]"""
    peer_python: str | None = None
    """interpreter that has torch, transformers, peft and gguf"""
    peer_dtypes: tuple[str, ...] = ("float32", "bfloat16")
    """types of the peer's base model, each a side of its own"""
    seed: int = 42
    """of the order of the rows and of initial values"""


class Side(NamedTuple):
    """One way to train: a step on rows at a learning rate, and an evaluation, each -> (seconds, summed loss, tokens)."""

    params: int
    step: Callable[[np.ndarray, float], tuple[float, float, int]]
    evaluate: Callable[[np.ndarray], tuple[float, float, int]]


def main(arguments: list[str]) -> None:
    """Train all sides in turn and print parameters, losses and tokens a second."""
    config = parse(InstructionsConfig, arguments, "experiments.bench instructions")
    for flag, value in (("--rows", config.rows), ("--held-out", config.held_out), ("--batch", config.batch)):
        whole(flag, value, Range(1))
    flags = [
        "--method", "lora", "--rank", str(config.rank), "--task", "alpaca", "--train-file", str(config.train_file),
        "--model", config.model, "--max-train-samples", str(config.rows), "--learning-rate", str(config.learning_rate),
        "--batch-size", str(config.batch), "--seed", str(config.seed),
    ]  # fmt: skip
    with contextlib.ExitStack() as stack:
        ours, train, validation, order, rates, about = _ours(parse_run(flags, "experiments.alpaca").resolve(), config)
        sides = {"jaxprune, float32": ours}
        for dtype in config.peer_dtypes if config.peer_python else ():
            sides[f"PEFT, {dtype}"] = stack.enter_context(_peer(config, dtype, train, validation, about))
        steps = order[: config.max_steps]
        spent: dict[str, list[tuple[float, float, int]]] = {name: [] for name in sides}
        for number, rows in enumerate(steps):
            for name, side in sides.items():
                spent[name].append(side.step(rows, rates(number)))
            if number % 10 == 9 or number + 1 == len(steps):
                last = ", ".join(f"{name} {found[-1][1] / found[-1][2]:.3f}" for name, found in spent.items())
                print(f"step {number + 1} of {len(steps)}: loss {last}", flush=True)
        real = sum(len(rows) for rows in steps), sum(int(np.diff(train.offsets)[rows].sum()) for rows in steps)
        print(f"\n{real[0]:,} rows of {real[1]:,} tokens in {len(steps)} steps, rank {config.rank}, {config.model}")
        print(f"{'':20s} parameters  held-out loss  median step, s  tokens/s   ratio")
        first = None
        for name, side in sides.items():
            seconds = [s for s, _, _ in spent[name][2:]] or [spent[name][-1][0]]
            tokens = sum(int(np.diff(train.offsets)[rows].sum()) for rows in steps[2:]) or real[1]
            parts = [
                side.evaluate(part) for part in np.array_split(np.arange(len(validation)), -(-len(validation) // 16))
            ]
            loss = sum(total for _, total, _ in parts) / sum(count for _, _, count in parts)
            rate = tokens / sum(seconds)
            first = first or rate
            print(
                f"{name:20s} {side.params:10,} {loss:14.4f} {np.median(seconds):15.3f} {rate:9,.0f} {rate / first:7.2f}"
            )


def _ours(settings: Any, config: InstructionsConfig) -> tuple[Side, Encoded, Encoded, list[np.ndarray], Any, Any]:
    import jax

    import jaxprune as jp
    from experiments.data.packing import Batches, evaluation_batches
    from experiments.run.build import make_method, make_optimizer, make_schedule
    from experiments.run.config import total_steps

    task = settings.chosen()
    loaded: Any = task.load(settings.model, settings.dtype, settings.seed)
    rows = task.rows(None, config.rows)
    train = task.encode(rows["train"], loaded, settings.max_length)
    validation = task.encode(rows["validation"].first(config.held_out), loaded, settings.max_length)
    batches = Batches(train, config.batch, config.seed)
    steps = total_steps(settings, batches.steps_per_epoch)
    method = make_method(settings, steps, loaded.config.num_heads)
    schedule = make_schedule(settings, steps, method)
    optimizer, forward = make_optimizer(settings, schedule), jp.attach(loaded.model)
    context = jp.Context(jax.random.key(config.seed), loaded.params, loaded.sites(), forward, task.loss)
    start = method.start(context)
    state = jp.init_state(jax.random.key(1), start.adapters, start.masks, optimizer, method)
    step, predict = jp.make_step(forward, task.loss, optimizer, method), jp.make_predict(forward, task.outputs)
    done = 0

    def train_on(rows: np.ndarray, rate: float) -> tuple[float, float, int]:
        nonlocal state, done
        begin = time.perf_counter()
        batch = task.finish(batches.batch(0, done))
        state, metrics = step(start.params, state, batch)
        loss, done = float(metrics["loss"]), done + 1
        tokens = int((batch["weights"] > 0).sum())
        return time.perf_counter() - begin, loss * tokens, tokens

    def evaluate(rows: np.ndarray) -> tuple[float, float, int]:
        if rows[0]:
            return 0.0, 0.0, 0  # all at once, with the first
        held = evaluation_batches({"validation": validation}, config.batch)["validation"]
        outputs = [predict(start.params, state.adapters, state.masks, task.finish(batch)) for batch in held.all()]
        nll, tokens, _ = held.restore(jax.device_get(outputs)).T
        return 0.0, float(nll.sum()), int(tokens.sum())

    order = [batches.indices(0, number) for number in range(batches.steps_per_epoch)]
    order = [rows[rows >= 0] for rows in order]
    side = Side(jp.count(start.adapters, start.masks), train_on, evaluate)
    return side, train, validation, order, lambda number: float(np.asarray(schedule(number))), (settings, loaded.source)


@contextlib.contextmanager
def _peer(config: InstructionsConfig, dtype: str, train: Encoded, validation: Encoded, about: Any) -> Iterator[Side]:
    """Start the other side."""
    settings, source = about
    said = dict(
        folder=str(source.folder), gguf=source.gguf and source.gguf.name, dtype=dtype, rank=config.rank, seed=config.seed,
        weight_decay=settings.weight_decay, max_grad_norm=settings.max_grad_norm,
    )  # fmt: skip
    script = Path(__file__).with_name("_peer_instructions.py").read_text()
    assert config.peer_python
    try:
        process = subprocess.Popen(
            [config.peer_python, "-c", script, json.dumps(said)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
    except OSError as error:
        raise UsageError(f"--peer-python {config.peer_python!r} cannot be run ({error.strerror})") from None
    assert process.stdin and process.stdout

    def heard() -> dict[str, Any]:
        try:
            return json.loads(process.stdout.readline())  # type: ignore[union-attr]
        except ValueError:
            raise UsageError(
                "the interpreter of --peer-python has no working torch, transformers, peft and gguf"
            ) from None

    def ask(encoded: Encoded, rows: np.ndarray, rate: float | None) -> tuple[float, float, int]:
        spans = [slice(encoded.offsets[i], encoded.offsets[i + 1]) for i in rows]
        batch = {
            "ids": [encoded.ids[s].tolist() for s in spans],
            "types": [encoded.type_ids[s].tolist() for s in spans],
        }
        process.stdin.write(json.dumps({**batch, "rate": rate}) + "\n")  # type: ignore[union-attr]
        process.stdin.flush()  # type: ignore[union-attr]
        found = heard()
        return found["seconds"], found["loss"], found["tokens"]

    with before_end(process.kill):
        try:
            yield Side(
                heard()["params"], lambda rows, rate: ask(train, rows, rate), lambda rows: ask(validation, rows, None)
            )
        finally:
            process.kill()
            process.wait()
