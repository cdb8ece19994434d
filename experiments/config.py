"""The settings of a GLUE run: what the command line offers, and what stands where a flag and a preset are silent."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from experiments.presets import preset
from jaxprune.errors import UsageError

DEFAULT_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
DEFAULT_TASK = "grammar"

# Stands where neither a flag nor a preset decides.
DEFAULTS: dict[str, Any] = dict(
    learning_rate=1e-3,
    epochs=5,
    weight_decay=0.01,
    max_grad_norm=1.0,
    max_length=128,
    warmup=0.06,
    budget=None,
)


# What may be left open: its docstring says in brackets what then stands, so that help need not add "None".
Whole = Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="")]
Number = Annotated[float | None, tyro.conf.arg(metavar="FLOAT", help_behavior_hint="")]
Text = Annotated[str | None, tyro.conf.arg(metavar="NAME", help_behavior_hint="")]
Folder = Annotated[Path | None, tyro.conf.arg(metavar="DIR", help_behavior_hint="")]


@dataclass(frozen=True)
class GlueConfig:
    """Fine-tune an encoder on a GLUE task and let the method decide where rank is worth its cost.

    A flag wins over --preset, and a preset over the default in brackets.
    """

    method: Literal["oplora", "lora", "full", "bitfit"] = "oplora"
    """how to fine-tune"""
    model: Text = None
    """hub id or local folder of a BERT, RoBERTa or DistilBERT [sentence-transformers/all-MiniLM-L6-v2]"""
    task: Text = None
    """cola, mnli, mrpc, qnli, qqp, rte, sst2, stsb, or grammar, which is built in [grammar]"""
    data_dir: Folder = None
    """folder with DIR/TASK/SPLIT.parquet (or jsonl, tsv); without it the task comes from the hub"""
    preset: Text = None
    """the papers' settings for method and task: paper (tables 9 to 11) or efficiency (tables 12 to 14)"""
    rank: Whole = None
    """lora: components at every site [8]; oplora: the most that a site may get [16]"""
    alpha: Number = None
    """the scale of an adapter is alpha / its rank [twice its rank, a scale of 2]"""
    targets: str = "all-linear"
    """which kernels get adapters: all-linear, a comma-separated list of path suffixes, or re:EXPRESSION"""
    budget: Whole = None
    """adapter parameters oplora may spend [half of uniform rank 16]"""
    score: Literal["absolute", "squared", "top10", "activation", "weight"] = "absolute"
    """what oplora scores sites by"""
    score_batches: int = 5
    """batches, of at most 500 samples together, that sites are scored on"""
    solver: str = "auto"
    """auto, CBC, GLPK_MI, HIGHS or DP"""
    time_limit: float = 60.0
    """seconds the solver may take; then its best plan so far is used, and said to be so"""
    epochs: Whole = None
    """passes over the training data [5]"""
    max_steps: Whole = None
    """stop after so many optimiser steps; the learning-rate schedule ends there too"""
    learning_rate: Number = None
    """peak learning rate of AdamW [0.001]"""
    schedule: Literal["linear", "cosine"] = "linear"
    """how the learning rate falls to zero after warm-up"""
    warmup: Number = None
    """warm-up: a share of all steps if below 1, else a number of steps [0.06]"""
    weight_decay: Number = None
    """decoupled weight decay [0.01]"""
    max_grad_norm: Number = None
    """clip gradients to this global norm; 0 clips nothing [1.0]"""
    batch_size: int = 32
    """examples a step"""
    accumulate: int = 1
    """split each batch into so many microbatches to save memory"""
    max_length: Whole = None
    """truncate examples to so many tokens [128]"""
    max_train_samples: Whole = None
    """train on the first so many examples only"""
    train_head: bool = True
    """train the classification head too; with --no-train-head it stays at its random start"""
    lora_dropout: float = 0.0
    """dropout on the adapters' inputs"""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """what the model computes in; parameters stay float32"""
    eval_steps: Whole = None
    """evaluate every so many steps [once an epoch]"""
    log_steps: int = 10
    """write a line to metrics.jsonl every so many steps"""
    seed: int = 42
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
        task, model = self.task or DEFAULT_TASK, self.model or DEFAULT_MODEL
        known = preset(self.preset, self.method, task) if self.preset else {}
        open_ = {name: {**DEFAULTS, **known}[name] for name in DEFAULTS if getattr(self, name) is None}
        folder = self.output_dir or Path("runs") / f"{task}-{self.method}-{self.seed}"
        if self.rank is None:
            open_["rank"] = 16 if self.method == "oplora" else 8
        config = replace(self, task=task, model=model, output_dir=folder, **open_)
        config._check()
        return config

    def _check(self) -> None:
        def at_least(low: float, *names: str) -> None:
            for name in names:
                value = getattr(self, name)
                if value is not None and not value >= low:
                    raise UsageError(f"--{name.replace('_', '-')} {value} is out of range; expected {low} or more")

        at_least(1, "rank", "budget", "epochs", "max_steps", "batch_size", "accumulate", "eval_steps")
        at_least(1, "log_steps", "max_train_samples", "score_batches")
        at_least(3, "max_length")
        at_least(0, "warmup", "weight_decay", "max_grad_norm", "lora_dropout", "time_limit", "seed")
        if self.learning_rate is None or not 0 < self.learning_rate < float("inf"):
            raise UsageError(f"--learning-rate {self.learning_rate} is out of range; expected a positive number")
        if self.lora_dropout >= 1:
            raise UsageError(f"--lora-dropout {self.lora_dropout} is out of range; expected 0 or more and below 1")
        if self.tensorboard and find_spec("tensorboardX") is None:
            raise UsageError("--tensorboard needs tensorboardX, which is not installed: pip install tensorboardX")
        if self.batch_size % self.accumulate:
            raise UsageError(
                f"--batch-size {self.batch_size} cannot be split into --accumulate {self.accumulate} equal parts"
            )

    def idle(self) -> list[str]:
        """Name the flags that were given and that the method does not use."""
        uses = {"lora": ("rank", "alpha"), "oplora": ("rank", "alpha", "budget")}.get(self.method, ())
        return [name for name in ("rank", "alpha", "budget") if getattr(self, name) is not None and name not in uses]

    def target_patterns(self) -> str | list[str]:
        """Return `targets` as `find_sites` takes it."""
        if self.targets == "all-linear":
            return self.targets
        if self.targets.startswith("re:"):
            return self.targets.removeprefix("re:")
        return [part.strip() for part in self.targets.split(",") if part.strip()]
