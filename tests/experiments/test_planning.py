"""What a method does before training is said and timed apart: measuring on data, and what it works out of that."""

import time

import jax
import pytest

import jaxprune as jp
from experiments.run import planning
from experiments.run.clock import Clock

SITES = [jp.Site("a/fc1", 4, 4, 0, "fc1"), jp.Site("b/fc1", 4, 4, 1, "fc1")]
PLAIN = jp.lora(rank=2)


def method(measuring, solving):
    def start(context):
        for _ in context.batches:
            time.sleep(measuring)
        time.sleep(solving)
        return PLAIN.start(context)

    return PLAIN._replace(start=start)


def planned(method, batches):
    context = jp.Context(jax.random.key(0), {}, SITES, lambda: None, lambda: None, batches)
    PLAIN.start(context)  # what it compiles is not to be timed
    clock = Clock()
    planning.planned(method, context, clock, "some")
    return clock.seconds


@pytest.mark.parametrize("long", [False, True])
def test_seconds_and_words(long, capsys, monkeypatch):
    monkeypatch.setattr(planning, "_SECONDS", 1.0)
    seconds = planned(method(0.1, 1.5 if long else 0.05), [1, 2])
    said = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert said == ["planning", "scoring", *(["solving"] if long else [])]
    assert 0.2 <= seconds["score"] < 1.0 and seconds["allocate"] >= (1.5 if long else 0.05)


def test_without_data_nothing_is_scored(capsys):
    assert planned(PLAIN, [1])["score"] == 0.0 and "scoring" not in capsys.readouterr().out
