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
        num_labels: number of classes; 1 for regression.
        metrics: everything `metrics.compute` reports; the first is the score.
        validation: validation splits; the score is taken on the first.
        regression: whether the label is a real number.
        hub: dataset on the Hugging Face Hub, or None for a built-in task.
    """

    name: str
    texts: tuple[str, ...]
    num_labels: int = 2
    metrics: tuple[str, ...] = ("accuracy",)
    validation: tuple[str, ...] = ("validation",)
    regression: bool = False
    hub: str | None = "nyu-mll/glue"

    @property
    def metric(self) -> str:
        """Return the name of the figure reported as the score."""
        return self.metrics[0]

    @property
    def splits(self) -> tuple[str, ...]:
        """Return every split that a run reads."""
        return ("train", *self.validation)


_SENTENCE_PAIR = ("sentence1", "sentence2")

# MRPC and QQP are scored by accuracy and STS-B by Pearson, as the DPLoRA and OPLoRA tables do; the rest is logged too.
TASKS = {
    task.name: task
    for task in (
        Task("cola", ("sentence",), metrics=("matthews", "accuracy")),
        Task("sst2", ("sentence",)),
        Task("mrpc", _SENTENCE_PAIR, metrics=("accuracy", "f1")),
        Task("qqp", ("question1", "question2"), metrics=("accuracy", "f1")),
        Task("stsb", _SENTENCE_PAIR, num_labels=1, metrics=("pearson", "spearman"), regression=True),
        Task(
            "mnli",
            ("premise", "hypothesis"),
            num_labels=3,
            validation=("validation_matched", "validation_mismatched"),
        ),
        Task("qnli", ("question", "sentence")),
        Task("rte", _SENTENCE_PAIR),
        Task("grammar", ("sentence",), metrics=("accuracy", "matthews"), hub=None),
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
