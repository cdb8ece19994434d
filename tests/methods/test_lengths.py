"""Defaults fit the length of the run: every factory, from a run of one step to one of twenty thousand."""

import inspect
import math
import time

import pytest

import jaxprune as jp
from jaxprune.methods import METHODS

FACTORIES = (
    "adalora", "bitfit", "channelmask", "dora", "dplora", "dylora", "full", "g2r2", "houlsby", "lora", "loradrop", "lorafa",
    "oplora", "pfeiffer", "pissa", "prunedlora", "rslora", "sora", "squeeze", "uniformmask", "vera",
)  # fmt: skip
# What has an event: its steps in runs of 1, 2, 20, 600 and 20,000 steps, or what it says where it cannot run.
EVENTS = {
    "adalora": ("leave none of the 1 steps", "leave none of the 2 steps", (10,), (300,), (10_000,)),
    "channelmask": ((1,), (1,), (10,), (300,), (10_000,)),
    "dplora": (
        "at most 0 events",
        "after step 1, and nothing can be measured before step 2",
        tuple(20 * n // 10 for n in range(1, 10)),
        tuple(600 * n // 11 for n in range(1, 11)),
        tuple(20_000 * n // 11 for n in range(1, 11)),
    ),
    "g2r2": (
        "take 2 steps, and the run has 1",
        (2,),
        (3, 4),
        (*range(61, 120, 6), 120),
        (*range(2001, 4000, 10), 4000),
    ),
    "loradrop": ((1,), (1,), (2,), (60,), (2000,)),
    "prunedlora": (
        "takes 2 steps, and the run has 1",
        (2,),
        tuple(range(2, 10)),
        tuple(range(9, 289, 9)),
        tuple(range(312, 9985, 312)),
    ),
    "sora": ((1,), (2,), (20,), (600,), (20_000,)),
    "squeeze": (
        "at most 0 events",
        "at most 0 events",
        tuple(2 * n for n in range(1, 7)),
        tuple(420 * n // 11 for n in range(1, 11)),
        tuple(14_000 * n // 11 for n in range(1, 11)),
    ),
    "uniformmask": ((1,), (1,), (10,), (300,), (10_000,)),
}  # fmt: skip


def made(name, total, **settings):
    factory = getattr(jp, name)
    known = inspect.signature(factory).parameters
    return factory(**({"total_steps": total} if "total_steps" in known else {}), **settings)


def test_no_factory_is_forgotten():
    assert set(METHODS) == set(FACTORIES) and all(getattr(jp, name) is METHODS[name].factory for name in METHODS)


@pytest.mark.parametrize("name", FACTORIES)
@pytest.mark.parametrize("number, total", list(enumerate((1, 2, 20, 600, 20_000))))
def test_events(name, number, total):
    expected = EVENTS.get(name, ((),) * 5)[number]
    if isinstance(expected, str):
        with pytest.raises(jp.UsageError, match=expected) as caught:
            made(name, total)
        assert len(str(caught.value).splitlines()) == 1
        return
    method = made(name, total)
    assert method.events == expected
    assert (method.decide is None) == (expected == ()) and all(1 <= step <= total for step in method.events)
    assert [n for n in range(total + 1) if method.triggers(n)] == list(expected)


@pytest.mark.parametrize("total", [20, 600, 20_000])
def test_prunedlora_gets_to_its_target_in_half_the_run(total):
    *_, last = made("prunedlora", total).events
    assert 0.4 * total <= last <= 0.5 * total
    removed = {20: 8, 600: 2, 20_000: 2}[total]
    assert len(made("prunedlora", total).events) == math.ceil(64 / removed)
    # What is set stays.
    assert made("prunedlora", 20_000, interval=10).events == tuple(range(10, 321, 10))


def test_the_longest_run_has_no_more_events_than_something_to_remove():
    began, longest = time.perf_counter(), 2**31 - 1
    assert all(len(made(name, longest).events) <= 1025 for name in FACTORIES)
    assert len(made("g2r2", longest, interval=1).events) <= 1025
    assert len(jp.dplora(total_steps=longest, events=65_536).events) == 65_536
    with pytest.raises(jp.UsageError, match="events 65537 is out of range"):
        jp.dplora(total_steps=longest, events=65_537)
    assert time.perf_counter() - began < 10


@pytest.mark.parametrize("wrong, said", [
    (dict(measure_at=21), "expected a step from 1 to 20"),
    (dict(measure_at=0), "expected a step from 1 to 20"),
    (dict(measure_at=2.5), "expected a whole number of steps"),
])  # fmt: skip
def test_loradrop_measures_within_the_run(wrong, said):
    with pytest.raises(jp.UsageError, match=said):
        jp.loradrop(total_steps=20, **wrong)
    with pytest.raises(jp.UsageError, match="give total_steps"):
        jp.loradrop()
