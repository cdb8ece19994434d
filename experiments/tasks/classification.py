"""The tasks as data: which columns hold the text, what the labels are, which figure is called the score."""

from __future__ import annotations

from dataclasses import dataclass

from jaxprune.errors import UsageError, nearest, shown


@dataclass(frozen=True)
class Task:
    """Describe one task.

    Args:
        name: the name on the command line, which is also the Hub's configuration name.
        texts: the one or two text columns, in the order in which the tokenizer takes them.
        labels: the name of each class, as the Hub has them; none for regression.
        metrics: everything `metrics.compute` reports; the first is the score.
        validation: validation splits; the score is taken on the first.
        hub: dataset on the Hugging Face Hub, or None for a built-in task.
    """

    name: str
    texts: tuple[str, ...]
    labels: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)
    validation: tuple[str, ...] = ("validation",)
    hub: str | None = "nyu-mll/glue"

    @property
    def regression(self) -> bool:
        """Say whether the label is a real number."""
        return not self.labels

    @property
    def num_labels(self) -> int:
        """Return the number of classes; 1 for regression."""
        return len(self.labels) or 1

    @property
    def metric(self) -> str:
        """Return the name of the figure reported as the score."""
        return self.metrics[0]

    @property
    def splits(self) -> tuple[str, ...]:
        """Return every split that a run reads."""
        return ("train", *self.validation)


_SENTENCE_PAIR = ("sentence1", "sentence2")

_ENTAILED = ("entailment", "not_entailment")
_ACCEPTABLE = ("unacceptable", "acceptable")

# MRPC and QQP are scored by accuracy and STS-B by Pearson, as the DPLoRA and OPLoRA tables do; the rest is logged too.
TASKS = {
    task.name: task
    for task in (
        Task("cola", ("sentence",), _ACCEPTABLE, metrics=("matthews", "accuracy")),
        Task("sst2", ("sentence",), ("negative", "positive")),
        Task("mrpc", _SENTENCE_PAIR, ("not_equivalent", "equivalent"), metrics=("accuracy", "f1")),
        Task("qqp", ("question1", "question2"), ("not_duplicate", "duplicate"), metrics=("accuracy", "f1")),
        Task("stsb", _SENTENCE_PAIR, (), metrics=("pearson", "spearman")),
        Task(
            "mnli",
            ("premise", "hypothesis"),
            ("entailment", "neutral", "contradiction"),
            validation=("validation_matched", "validation_mismatched"),
        ),
        Task("qnli", ("question", "sentence"), _ENTAILED),
        Task("rte", _SENTENCE_PAIR, _ENTAILED),
        Task("grammar", ("sentence",), _ACCEPTABLE, metrics=("accuracy", "matthews"), hub=None),
    )
}


def get_task(name: str) -> Task:
    """Return the task called `name`.

    Raises:
        UsageError: there is no such task; the message holds the nearest names.
    """
    if name not in TASKS:
        raise UsageError(f"unknown task {shown(name)}; nearest: {nearest(name, TASKS)}; all: {', '.join(TASKS)}")
    return TASKS[name]
