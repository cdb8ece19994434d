"""The settings of a GLUE run: what the command line offers, and what stands where a flag and a preset are silent."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from experiments.presets import preset
from experiments.run.settings import check_once, further
from jaxprune.allocation import SOLVERS
from jaxprune.checks import MOST_RANK, MOST_STEPS, HostOnly, OneOf, Range, check
from jaxprune.errors import UsageError, shown

DEFAULT_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
DEFAULT_TASK = "grammar"

# Stands where neither a flag nor a preset decides.
DEFAULTS: dict[str, Any] = dict(
    rank=8,
    learning_rate=1e-3,
    final_learning_rate=0.0,
    schedule="linear",
    batch_size=32,
    epochs=5,
    weight_decay=0.01,
    max_grad_norm=1.0,
    max_length=128,
    warmup=0.06,
    budget=None,
    score="absolute",
    prune_ratio=0.6,
    events=None,
    recovery_steps=None,
    budget_schedule="bezier",
    ema_decay=0.9,
    momentum=0.1,
    stability=0.05,
    importance="training",
    scaling="constant",
    targets="all-linear",
)

# Where a method needs another. Full fine-tuning takes the largest rate of BERT's grid, as 1e-3 wrecks a pretrained model; VeRA
# that of its paper, as its two vectors are small; PiSSA's factors are what a kernel does most, and 1e-3 unlearns it.
_OWN: dict[str, dict[str, Any]] = dict(
    oplora=dict(rank=16),
    dplora=dict(rank=16),
    prunedlora=dict(rank=16),
    vera=dict(rank=256, learning_rate=1e-2),
    pissa=dict(learning_rate=2e-4),
    full=dict(learning_rate=5e-5),
)

# Flags that only some methods read; given with another, the run says that they have no effect.
_RANKED = (
    "lora", "oplora", "dplora", "rslora", "lorafa", "vera", "dora", "pissa", "adalora", "sora", "dylora", "loradrop", "g2r2",
    "prunedlora", "channelmask", "uniformmask",
)  # fmt: skip
_PLANNED = ("oplora", "dplora")
USES: dict[str, tuple[str, ...]] = {
    "rank": _RANKED,
    "alpha": tuple(name for name in _RANKED if name != "vera"),
    "budget": _PLANNED,
    "time_budget": _PLANNED,
    "score": _PLANNED,
    **dict.fromkeys(
        (
            "prune_ratio",
            "events",
            "recovery_steps",
            "budget_schedule",
            "ema_decay",
            "momentum",
            "stability",
            "importance",
        ),
        ("dplora",),
    ),
    "scaling": ("dplora",),
}

# Methods with two stages, which prune the model itself.
STAGED = ("channelmask", "uniformmask")

# Settings that a resumed run may change without becoming another run.
FREE = ("output_dir", "overwrite", "resume", "save_steps", "keep", "tensorboard")

# What may be left open: its docstring says in brackets what then stands, so that help need not add "None".
Whole = Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="")]
Number = Annotated[float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint="")]
Text = Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="")]
T = TypeVar("T")
Choice = Annotated[T | None, tyro.conf.arg(help_behavior_hint="")]


def _path(words: list[str]) -> Path:
    if not words[0]:
        raise ValueError("an empty text is no folder")  # Path("") would be the working folder
    return Path(words[0])


Folder = Annotated[
    Path | None,
    tyro.conf.arg(help_behavior_hint=""),
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="DIR",
        instance_from_str=_path,
        is_instance=lambda value: value is None or isinstance(value, Path),
        str_from_instance=lambda value: [str(value)],
    ),
]

# Shares and numbers above 0, as flags that may be left open.
Share = Annotated[Number, Range(0, below=1)]
Positive = Annotated[Number, Range(above=0)]
NotNegative = Annotated[Number, Range(0)]
Some = Annotated[Whole, Range(1)]


@dataclass(frozen=True)
class GlueConfig:
    """Fine-tune an encoder on a GLUE task and let the method decide where rank is worth its cost.

    A flag wins over --config and --preset, and a preset over the default in brackets.
    """

    method: Literal[
        "oplora",
        "dplora",
        "g2r2",
        "prunedlora",
        "channelmask",
        "uniformmask",
        "lora",
        "rslora",
        "lorafa",
        "vera",
        "dora",
        "pissa",
        "adalora",
        "sora",
        "dylora",
        "loradrop",
        "houlsby",
        "pfeiffer",
        "bitfit",
        "full",
    ] = "oplora"
    """how to fine-tune"""
    model: Text = None
    """hub id or local folder of a BERT, RoBERTa or DistilBERT [sentence-transformers/all-MiniLM-L6-v2]"""
    task: Text = None
    """cola, mnli, mrpc, qnli, qqp, rte, sst2, stsb, or grammar, which is built in [grammar]"""
    data_dir: Folder = None
    """folder with DIR/TASK/SPLIT.parquet (or jsonl, tsv); without it the task comes from the hub"""
    preset: Text = None
    """the papers' settings for method and task: paper (tables 9 to 11), efficiency (tables 12 to 14) or released (of DPLoRA's
    released code)"""
    config: Annotated[Folder, tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = None
    """YAML file of settings, such as config.yaml in the folder of a run; flags beside it win"""
    rank: Annotated[Whole, Range(1, MOST_RANK)] = None
    """components at every site [8]; oplora, dplora: the most that a site may get [16]; adalora: the target, of 1.5 times as
    many [8]; prunedlora: before pruning to half as many [16]; vera: of the shared pair [256]"""
    alpha: Positive = None
    """the scale of an adapter is alpha / its rank [twice its rank, a scale of 2]"""
    targets: Text = None
    """which kernels get adapters: all-linear, a comma-separated list of path suffixes, or re:EXPRESSION [all-linear]"""
    budget: Some = None
    """adapter parameters oplora and dplora may start with [half of uniform rank 16]"""
    time_budget: Annotated[Number, Range(above=0, high=1)] = None
    """oplora, dplora: longest predicted training step, relative to LoRA of rank 16 everywhere, such as 0.5 [no limit]"""
    score: Choice[Literal["absolute", "squared", "top10", "activation", "weight"]] = None
    """what oplora and dplora score sites by before training [absolute]"""
    score_batches: Annotated[int, Range(1)] = 5
    """batches, of at most 500 samples together, that sites are scored on"""
    solver: Annotated[str, OneOf(SOLVERS, fold=True)] = "auto"
    """auto, CBC, GLPK_MI, HIGHS or DP"""
    time_limit: Annotated[float, Range(above=0), HostOnly()] = 60.0
    """seconds the solver may take; then its best plan so far is used, and said to be so"""
    prune_ratio: Share = None
    """dplora: share of the adapter parameters to prune while training [0.6]"""
    events: Annotated[Whole, Range(1, MOST_STEPS)] = None
    """dplora: pruning events, spread evenly after warm-up [10, fewer in a run of few steps]"""
    recovery_steps: Annotated[Whole, Range(0, MOST_STEPS)] = None
    """dplora: steps without an event after one [half the steps between events, at most 100]"""
    budget_schedule: Choice[Literal["bezier", "linear", "early"]] = None
    """dplora: how the budget falls [bezier]"""
    ema_decay: Share = None
    """dplora: weight of the importance measured at earlier events; 0 for the latest alone [0.9]"""
    momentum: NotNegative = None
    """dplora: price of a lost rank beside the loss of importance; 0 for none [0.1]"""
    stability: NotNegative = None
    """dplora: reward for leaving a site as it is [0.05]"""
    importance: Choice[Literal["training", "samples"]] = None
    """dplora: measure on the gradients of training, or on single samples at every event as the released code [training]"""
    scaling: Choice[Literal["constant", "grow"]] = None
    """dplora: keep the scale of a site as it loses ranks, or alpha, so that the scale grows [constant]"""
    set: tuple[str, ...] = ()
    """further settings of the method, as NAME=VALUE; a wrong NAME lists them"""
    compact: Literal["auto", "always", "never"] = "auto"
    """remove pruned components for good: when the steps left pay for the compilation, after every event, or never"""
    epochs: Some = None
    """passes over the training data [5]"""
    max_steps: Some = None
    """stop after so many optimiser steps; the learning-rate schedule ends there too"""
    learning_rate: Positive = None
    """peak learning rate of AdamW [0.001; vera: 0.01; pissa: 0.0002; full: 0.00005]"""
    final_learning_rate: NotNegative = None
    """learning rate at the end [0]"""
    schedule: Choice[Literal["linear", "cosine", "stages"]] = None
    """how the learning rate falls after warm-up; stages: the first of the two of channelmask and uniformmask has the peak, the
    second the final one [linear]"""
    warmup: Annotated[Number, Range(0), HostOnly()] = None
    """warm-up: a share of all steps if below 1, else a number of steps [0.06]"""
    weight_decay: NotNegative = None
    """decoupled weight decay [0.01]"""
    max_grad_norm: NotNegative = None
    """clip gradients to this global norm; 0 clips nothing [1.0]"""
    batch_size: Annotated[Whole, Range(1, 2**16)] = None
    """examples a step [32]"""
    accumulate: Annotated[int, Range(1, 2**16)] = 1
    """split each batch into so many microbatches to save memory"""
    max_length: Annotated[Whole, Range(3)] = None
    """truncate examples to so many tokens [128]"""
    max_train_samples: Some = None
    """train on the first so many examples only"""
    train_head: bool = True
    """train the classification head too; with --no-train-head it stays at its random start"""
    lora_dropout: Annotated[float, Range(0, below=1)] = 0.0
    """dropout on the adapters' inputs"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """what the model computes in; parameters stay float32"""
    eval_steps: Some = None
    """evaluate every so many steps [once an epoch]"""
    save_steps: Some = None
    """save a checkpoint every so many steps, and at the end [at every evaluation]"""
    keep: Annotated[int, Range(1)] = 2
    """checkpoints to keep, besides the one with the best score"""
    resume: bool = False
    """go on with the run in the output folder from its last checkpoint; without one, start"""
    log_steps: Annotated[int, Range(1)] = 10
    """write a line to metrics.jsonl every so many steps"""
    seed: Annotated[int, Range(0, 2**32 - 1)] = 42
    """decides initial values, the order of the data and dropout"""
    output_dir: Folder = None
    """where the run's files go [runs/TASK-METHOD-SEED]"""
    overwrite: bool = False
    """replace a finished run in the output folder"""
    tensorboard: bool = False
    """also write TensorBoard event files (pip install tensorboardX)"""

    def resolve(self) -> GlueConfig:
        """Fill every open setting from the preset or the defaults, and check the values.

        Raises:
          UsageError: a value is out of range, or the preset does not fit.
        """
        if self.config is not None:
            raise UsageError(
                f"config {shown(str(self.config))} is for the command line; experiments.run.cli.parse reads it"
            )
        for name, kind in _kinds().items():
            _check_flag(name, getattr(self, name), kind)
        self.target_patterns()
        check_once(self.set)
        task = DEFAULT_TASK if self.task is None else self.task
        model = _home("model", DEFAULT_MODEL if self.model is None else self.model)
        known = {} if self.preset is None else preset(self.preset, self.method, task)
        # Of two values for one setting the later counts.
        items = (*known.get("set", ()), *self.set)
        further(self.method, items)
        silent = {**DEFAULTS, **_OWN.get(self.method, {}), **known}
        open_ = {name: silent[name] for name in DEFAULTS if getattr(self, name) is None}
        folder = Path("runs") / f"{task}-{self.method}-{self.seed}" if self.output_dir is None else self.output_dir
        data = None if self.data_dir is None else Path(_home("data_dir", self.data_dir))
        folder = Path(_home("output_dir", folder))
        config = replace(self, task=task, model=model, output_dir=folder, data_dir=data, set=items, **open_)
        config._check()
        return config

    def _check(self) -> None:
        assert (
            self.learning_rate and self.final_learning_rate is not None and self.warmup is not None and self.batch_size
        )
        if self.final_learning_rate > self.learning_rate:
            raise UsageError(
                f"--final-learning-rate {self.final_learning_rate} is out of range; expected 0 up to --learning-rate "
                f"{self.learning_rate}"
            )
        if self.warmup > 1 and self.warmup != int(self.warmup):
            raise UsageError(
                f"--warmup {self.warmup} is out of range; expected a share below 1, or a whole number of steps"
            )
        if self.schedule == "stages" and self.method not in STAGED:
            raise UsageError(
                f"--schedule stages is for {' and '.join(STAGED)}, which have stages; --method is {self.method}"
            )
        if self.tensorboard and find_spec("tensorboardX") is None:
            raise UsageError("--tensorboard needs tensorboardX, which is not installed: pip install tensorboardX")
        if self.batch_size % self.accumulate:
            raise UsageError(
                f"--batch-size {self.batch_size} cannot be split into --accumulate {self.accumulate} equal parts"
            )

    def plain(self) -> dict[str, Any]:
        """Return the settings as JSON gives them back."""
        known = {
            name: value for name, value in vars(self).items() if name != "config"
        }  # which is no setting but a source
        return json.loads(json.dumps(known, default=str))

    def differences(self, other: Mapping[str, Any]) -> str:
        """Name the settings in which a run with the plain settings `other` is another run; nothing where it is this one.

        A setting that a run of an earlier version did not have had its default.
        """
        own, there = self.plain(), {**replace(GlueConfig(), **DEFAULTS).plain(), **other}
        differ = [name for name in own if name not in FREE and own[name] != there[name]]
        return "; ".join(f"--{name.replace('_', '-')} was {there[name]!r}, is {own[name]!r}" for name in differ)

    def idle(self) -> list[str]:
        """Name the flags that were given and that the method does not use."""
        given = (name for name in USES if getattr(self, name) is not None)
        return [name.replace("_", "-") for name in given if self.method not in USES[name]]

    def target_patterns(self) -> str | list[str]:
        """Return `targets` as `find_sites` takes it.

        Raises:
          UsageError: `targets` names nothing, or is not a regular expression.
        """
        targets = "all-linear" if self.targets is None else self.targets
        if targets == "all-linear":
            return targets
        if targets.startswith("re:"):
            expression = targets.removeprefix("re:")
            try:
                re.compile(expression)
            except (re.error, RecursionError, OverflowError) as error:
                raise UsageError(f"--targets {shown(targets)} is not a regular expression: {error}") from None
            if expression:
                return expression
        elif names := [part.strip() for part in targets.split(",") if part.strip()]:
            return names
        raise UsageError(
            f"--targets {targets!r} names no kernel; expected all-linear, path suffixes such as query,value, or "
            f"re:EXPRESSION"
        )


def total_steps(config: GlueConfig, steps_per_epoch: int) -> int:
    """Return the optimiser steps of a run: its epochs, or --max-steps where those are fewer.

    Raises:
      UsageError: there are more than can be counted.
    """
    assert config.epochs
    steps = config.epochs * steps_per_epoch
    steps = steps if config.max_steps is None else min(steps, config.max_steps)
    if steps > MOST_STEPS:
        raise UsageError(
            f"--epochs {shown(config.epochs)} of {steps_per_epoch:,} steps are more than the {MOST_STEPS:,} steps that a run "
            f"can have; lower --epochs or set --max-steps"
        )
    return steps


@functools.cache
def _kinds() -> dict[str, Any]:
    return get_type_hints(GlueConfig, include_extras=True)


def _check_flag(name: str, value: Any, kind: Any) -> None:
    """Check the value of one flag against what its field says."""
    flag = f"--{name.replace('_', '-')}"
    if name == "set":
        if not isinstance(value, tuple | list) or not all(isinstance(item, str) for item in value):
            raise UsageError(f"--set {shown(value)} cannot be used; expected NAME=VALUE texts")
    elif name in ("output_dir", "data_dir", "config"):
        if value is not None:
            _check_path(flag, value)
    else:
        check(flag, value, kind)
        if name == "model" and value is not None:
            _check_path(flag, value)


def _check_path(flag: str, value: str | Path) -> None:
    """Refuse what no file system has as a name."""
    if not isinstance(value, str | Path):
        raise UsageError(f"{flag} {shown(value)} cannot be used; expected a folder")
    check(flag, str(value), str)
    if any(len(part.encode()) > 255 for part in Path(value).parts) or len(str(value).encode()) > 4000:
        raise UsageError(f"{flag} {shown(str(value))} is too long; expected names of at most 255 bytes each")


def _home(name: str, value: Any) -> str:
    """Replace `~` or `~USER` at the start of a path by the home folder."""
    if not str(value).startswith("~"):
        return str(value)
    try:
        return str(Path(value).expanduser())
    except RuntimeError as error:
        flag = name.replace("_", "-")
        raise UsageError(f"--{flag} {shown(str(value))} cannot be used: {str(error).rstrip('.').lower()}") from None
