"""When to prune and how much: budget schedules, and the steps of the pruning events.

A budget schedule maps progress t in [0, 1] to the share of the whole pruning done by then: 0 at 0, 1 at 1, never falling.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

from jaxprune.checks import MOST_STEPS, Range
from jaxprune.errors import UsageError, nearest

Schedule = Callable[[float], float]
# Part of a run: a whole number of steps, or below 1 a share of the run.
Stage = Annotated[float, Range(0, MOST_STEPS)]
# No model has more modules that could go one at a time.
_MOST_EVENTS = 1024


def bezier(p1: float = 0.2, p2: float = 0.8) -> Schedule:
    """Return the cubic Bézier curve over the control values 0, p1, p2, 1: slow, fast, slow.

        share(t) = 3 p1 t (1 - t)^2 + 3 p2 t^2 (1 - t) + t^3

    Source: DPLoRA, eq. 11, with p1 = 0.2 and p2 = 0.8.
    """
    if not 0 <= p1 <= p2 <= 1:
        raise UsageError(f"control values {p1}, {p2} are out of range; expected 0 <= p1 <= p2 <= 1")
    return lambda t: 3 * p1 * t * (1 - t) ** 2 + 3 * p2 * t**2 * (1 - t) + t**3


def linear(t: float) -> float:
    """Return t: the same at every event."""
    return t


def early(t: float) -> float:
    """Return 1 - (1 - t)^3: the most at the first events, least at the last.

    The DPLoRA paper compares with an early schedule without giving its formula; this is the usual cubic one.
    """
    return 1 - (1 - t) ** 3


def cubic(number: float, start: float, stop: float, first: float, last: float) -> float:
    """Fall from `first` to `last` between the steps `start` and `stop`, fast at first.

        p(t) = last + (first - last) (1 - (t - start) / (stop - start))^3,  `first` before and `last` after

    Source: the schedule of PLATON and AdaLoRA; G2R2's eq. 12 with its numerator corrected.
    """
    left = 1 - (min(max(number, start), stop) - start) / (stop - start) if stop > start else float(number < stop)
    return last + (first - last) * left**3


BUDGETS: dict[str, Schedule] = {"bezier": bezier(), "linear": linear, "early": early}


def budget_schedule(name: str) -> Schedule:
    """Look a budget schedule up: `bezier`, `linear` or `early`."""
    if name not in BUDGETS:
        raise UsageError(
            f"schedule {name!r} is not known; expected one of {', '.join(BUDGETS)}; nearest: {nearest(name, BUDGETS, 1)}"
        )
    return BUDGETS[name]


def stage_steps(name: str, value: float, total_steps: int | None) -> int:
    """Return the steps of a stage: `value` itself, or its share of the run where it is below 1, at least one step unless it is 0.

    Raises:
      UsageError: the value is above 1 and not whole, or a share where `total_steps` is None.
    """
    if value >= 1 and value != round(value):
        raise UsageError(
            f"{name} {value} is out of range; expected a whole number of steps, or a fraction of the run below 1"
        )
    if value >= 1 or value == 0:
        return round(value)
    if total_steps is None:
        raise UsageError(f"{name} {value} is a fraction of the run: give total_steps, or {name} as a number of steps")
    return max(1, round(value * total_steps))


def thinned(numbers: range) -> tuple[int, ...]:
    """Return the numbers, or every k-th where a long run would have more than a thousand."""
    return tuple(numbers[:: max(1, -(-len(numbers) // _MOST_EVENTS))])


def event_steps(events: int, total_steps: int, delay: int = 0) -> tuple[int, ...]:
    """Return the optimiser steps after which the events 1 to N happen: int(delay + tau (total - delay) / (N + 1)).

    The last interval is free of events. Source: DPLoRA, eq. 12.

    Args:
      events: N, at least 1.
      total_steps: optimiser steps of the whole run.
      delay: steps before pruning may start; the learning rate's warm-up in the paper.

    Raises:
      UsageError: the events would be less than a step apart.
    """
    if events < 1:
        raise UsageError(f"{events} pruning events are out of range; expected at least 1")
    if (total_steps - delay) / (events + 1) < 1:
        raise UsageError(
            f"{events} pruning events do not fit between step {delay} (warm-up) and step {total_steps}, the last: they "
            f"would be less than a step apart; train longer or ask for at most {max(total_steps - delay - 1, 0)} events"
        )
    return tuple(int(delay + tau * (total_steps - delay) / (events + 1)) for tau in range(1, events + 1))
