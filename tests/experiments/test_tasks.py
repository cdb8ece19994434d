"""The tasks are what the GLUE paper and the Hub say they are."""

import pytest

from experiments.tasks import PROGRAMS, TASKS, get_task
from experiments.tasks.classification import TASKS as CLASSES
from jaxprune.errors import UsageError


def test_score_of_each_task():
    scores = {name: task.metrics[0] for name, task in TASKS.items()}
    assert scores == {
        "cola": "matthews",
        "sst2": "accuracy",
        "mrpc": "accuracy",
        "qqp": "accuracy",
        "stsb": "pearson",
        "mnli": "accuracy",
        "qnli": "accuracy",
        "rte": "accuracy",
        "grammar": "accuracy",
        "alpaca": "loss",
        "instructions": "exact_match",
    }
    assert {name for name, task in TASKS.items() if name not in CLASSES and task.lower_is_better} == {"alpaca"}


def test_each_program_has_a_task_that_needs_no_files():
    programs = {task.program for task in TASKS.values()}
    assert programs == set(PROGRAMS)
    for name, program in PROGRAMS.items():
        assert get_task(program.task).program == name
        assert set(get_task(program.task).rows(None, 20)["train"].labels) <= set(range(13))


def test_shapes_of_the_tasks():
    assert {name for name, task in CLASSES.items() if task.regression} == {"stsb"}
    assert {name: task.num_labels for name, task in CLASSES.items() if task.num_labels != 2} == {"stsb": 1, "mnli": 3}
    assert {name for name, task in CLASSES.items() if len(task.texts) == 1} == {"cola", "sst2", "grammar"}
    assert get_task("mnli").splits == ("train", "validation_matched", "validation_mismatched")
    assert {name for name, task in CLASSES.items() if task.hub is None} == {"grammar"}


def test_unknown_task_names_the_nearest():
    with pytest.raises(UsageError, match=r"unknown task 'sst-2'.*nearest: sst2"):
        get_task("sst-2")
