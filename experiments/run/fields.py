"""The settings that every run has, whatever its method, and in which group of `--help` they stand."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from experiments.data.prompts import TEMPLATES
from jaxprune.checks import HostOnly, OneOf, Range
from jaxprune.methods import DEFAULT
from jaxprune.models.decoder_config import REMAT

# What these stand for is decided late, so that a preset can set every one: None means that nothing was said.
Whole = Annotated[int | None, Range(1)]
Positive = Annotated[float | None, Range(above=0)]
NotNegative = Annotated[float | None, Range(0)]
Text = str | None


def _flag(group: str, text: str, default: Any = None, *, metavar: str = "", of_task: bool = False) -> Any:
    """Describe a flag; `of_task` where it is one only of tasks that have a field of its name."""
    about = {"group": group, "help": text, "metavar": metavar, "of_task": of_task}
    return dataclasses.field(default=default, metadata=about)


@dataclass(frozen=True)
class Common:
    """The settings that every run has. What stands where nothing was said is in brackets, and in `DEFAULTS`."""

    method: str = _flag("run", "how to fine-tune", DEFAULT, metavar="NAME")
    model: Text = _flag("run", "hub id or local folder", metavar="NAME")
    task: Text = _flag("run", "what to learn", metavar="NAME")
    preset: Text = _flag("run", "the papers' settings for method and task", metavar="NAME")
    config: Path | None = _flag(
        "run", "YAML file of settings, such as config.yaml in the folder of a run; flags beside it win", metavar="FILE"
    )
    set: tuple[str, ...] = _flag(
        "run", "settings of the method as NAME=VALUE; they have flags of their own now", (), metavar="NAME=VALUE"
    )

    data_dir: Path | None = _flag(
        "data",
        "folder with DIR/TASK/SPLIT.parquet (or jsonl, tsv); without it the task comes from the hub",
        metavar="DIR",
    )
    train_file: Path | None = _flag(
        "data", "rows to train on: JSON, JSON lines or parquet with instruction, input and output", metavar="FILE",
        of_task=True,
    )  # fmt: skip
    validation_file: Path | None = _flag(
        "data", "rows to score on [a part held out of those to train on]", metavar="FILE", of_task=True
    )
    template: Annotated[str, OneOf(tuple(TEMPLATES))] | None = _flag(
        "data", "how an instruction is put: Stanford's prompt, or the tokenizer's own for chats", of_task=True
    )
    max_length: Annotated[int | None, Range(3)] = _flag("data", "truncate examples to so many tokens")
    max_train_samples: Whole = _flag("data", "train on the first so many examples only [all]")
    score_batches: Whole = _flag("data", "batches, of at most 500 samples together, that methods may measure on first")

    targets: Text = _flag(
        "training", "which kernels get adapters: all-linear, a comma-separated list of path suffixes, or re:EXPRESSION",
        metavar="NAMES",
    )  # fmt: skip
    train_head: bool | None = _flag("training", "train the task's head too, or leave it at its start")
    epochs: Whole = _flag("training", "passes over the training data")
    max_steps: Whole = _flag(
        "training", "stop after so many steps; the learning-rate schedule ends there too [no limit]"
    )
    learning_rate: Positive = _flag("training", "peak learning rate of AdamW")
    final_learning_rate: NotNegative = _flag("training", "learning rate at the end")
    schedule: Literal["linear", "cosine", "stages"] | None = _flag(
        "training", "how the learning rate falls after warm-up; stages: the first stage of a method that has two gets the peak, "
        "the second the final one",
    )  # fmt: skip
    warmup: Annotated[float | None, Range(0), HostOnly()] = _flag(
        "training", "warm-up: a share of all steps if below 1, else a number of steps"
    )
    weight_decay: NotNegative = _flag("training", "decoupled weight decay")
    max_grad_norm: NotNegative = _flag("training", "clip gradients to this global norm; 0 clips nothing")
    batch_size: Annotated[int | None, Range(1, 2**16)] = _flag("training", "examples a step")
    accumulate: Annotated[int | None, Range(1, 2**16)] = _flag(
        "training", "split each batch into so many microbatches to save memory"
    )
    dtype: Literal["float32", "bfloat16"] | None = _flag(
        "training", "what the model computes in; a decoder keeps its kernels so too, an encoder in float32"
    )
    remat: Annotated[str, OneOf(REMAT)] | None = _flag(
        "training", "what is computed again in the backward pass to save memory", of_task=True
    )
    chunk: Whole = _flag("training", "tokens of a row whose logits are made at once", of_task=True)
    compact: Literal["auto", "always", "never"] | None = _flag(
        "training",
        "remove pruned components for good: when the steps left pay for the compilation, after every event, or never",
    )
    seed: Annotated[int, Range(0, 2**32 - 1)] = _flag(
        "training", "decides initial values, the order of the data and dropout", 42
    )

    output_dir: Path | None = _flag("files", "where the run's files go [runs/TASK-METHOD-SEED]", metavar="DIR")
    overwrite: bool = _flag("files", "replace a finished run in the output folder", False)
    resume: bool = _flag("files", "go on with the run in the output folder from its last checkpoint, or start", False)
    eval_steps: Annotated[int | None, Range(1)] = _flag("files", "evaluate every so many steps [once an epoch]")
    save_steps: Annotated[int | None, Range(1)] = _flag(
        "files", "save a checkpoint every so many steps, and at the end [at every evaluation]"
    )
    keep: Whole = _flag("files", "checkpoints to keep, besides the one with the best score")
    log_steps: Whole = _flag("files", "write a line to metrics.jsonl every so many steps")
    event_losses: bool = _flag(
        "files",
        "also measure the loss, on the scoring batches, right before and right after every pruning event",
        False,
    )
    tensorboard: bool = _flag("files", "also write TensorBoard event files (pip install tensorboardX)", False)


# Stands where neither a flag, nor a preset, nor the method itself decides.
DEFAULTS: dict[str, Any] = dict(
    max_length=128,
    max_train_samples=None,
    score_batches=5,
    targets="all-linear",
    train_head=True,
    epochs=5,
    max_steps=None,
    learning_rate=1e-3,
    final_learning_rate=0.0,
    schedule="linear",
    warmup=0.06,
    weight_decay=0.01,
    max_grad_norm=1.0,
    batch_size=32,
    accumulate=1,
    dtype="float32",
    compact="auto",
    eval_steps=None,
    save_steps=None,
    keep=2,
    log_steps=10,
)

# Where the files go, and where settings come from, is a matter of one run alone.
OF_ONE_RUN = ("config", "output_dir", "overwrite", "resume")
# Settings that a resumed run may change without becoming another run.
FREE = ("output_dir", "overwrite", "resume", "save_steps", "keep", "event_losses", "tensorboard")

COMMON = {field.name: field for field in dataclasses.fields(Common)}
