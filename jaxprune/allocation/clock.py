"""What a training step costs: the forward pass always, back-propagation only down to the lowest adapter.

A smaller rank hardly makes a step faster; removing every adapter below a layer does, because nothing below it needs a
gradient. Times are whole numbers, so that every limit is checked exactly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from jaxprune.errors import UsageError, shown
from jaxprune.inputs import check_rank_of_each, check_sites, real, whole
from jaxprune.sites import Site

YARDSTICK = 16  # step times are told relative to this rank at every site


@dataclass(frozen=True)
class TimeModel:
    """Step time per token and parameter, in whole numbers of any unit, for only their ratios matter.

    `FLOPS` counts multiplications and additions. `MEASURED`, the default, was fitted to training steps of BERT encoders at
    RoBERTa-base and MiniLM size on CPUs (`python -m experiments.bench time --only-fit`): an adapter's thin products take
    longer than their FLOPs say, and a forward pass less than half a step.

    A price per adapter that does not depend on its rank has no place here: it would make the time limit more than a smaller
    budget (see `Problem.stages`).

    Attributes:
      forward: time per kernel parameter of the forward pass.
      backward: time per kernel parameter of back-propagation through it.
      own: time per adapter parameter, forward and backward together.
    """

    forward: int
    backward: int
    own: int

    def __post_init__(self):
        for name in ("forward", "backward", "own"):
            value, least = getattr(self, name), int(name == "own")
            count = whole(value)
            if count is None or count < least:
                raise UsageError(f"{name} time {shown(value)} cannot be used: expected a whole number, {least} or more")
            object.__setattr__(self, name, count)


FLOPS = TimeModel(2, 2, 6)
MEASURED = TimeModel(4, 9, 40)


@dataclass(frozen=True, eq=False)
class Clock:
    """Predict the time of a training step from the lowest adapted layer and the adapter parameters, and limit it.

        time = forward + sum_{k >= lowest adapted layer} back_k + own * parameters <= limit

    Attributes:
      layer: (S,) int64, layer index of each site.
      back: layer index -> time of back-propagation through the kernels of that layer.
      forward: time of the forward pass through all kernels.
      own: time per adapter parameter.
      whole: time of uniform rank 16 at every site, which fractions are relative to.
      limit: the longest time a step may take.
    """

    layer: np.ndarray
    back: dict[int, int]
    forward: int
    own: int
    whole: int
    limit: int

    def reaching(self, reach: float) -> int:
        """Return the time without the adapters' own when back-propagation ends at layer `reach`."""
        return self.forward + sum(time for layer, time in self.back.items() if layer >= reach)

    def time(self, ranks: np.ndarray, params: int) -> int:
        """Return the time of a step with ranks (S,) that take `params` adapter parameters."""
        return self.reaching(min(self.layer[ranks > 0].tolist(), default=math.inf)) + self.own * params

    def budget(self, reach: int) -> int:
        """Return the adapter parameters that the limit leaves when back-propagation ends at layer `reach`."""
        return (self.limit - self.reaching(reach)) // self.own

    def check(self, needed: Mapping[int, int]) -> None:
        """Raise where no layer leaves the limit room for the adapter parameters needed when reaching down to it."""
        times = {reach: self.reaching(reach) + self.own * params for reach, params in needed.items()}
        reach = min(times, key=lambda layer: (times[layer], -layer))
        if times[reach] <= self.limit:
            return
        least = math.ceil(Fraction(10**4 * times[reach], self.whole)) / 10**4
        advice = f"raise it to {least} or more" if least <= 1 else "allow smaller ranks, or leave the time budget out"
        raise UsageError(
            f"no plan fits a time budget of {self.limit / self.whole:.4g} of uniform rank {YARDSTICK}: the forward "
            f"pass alone takes {self.forward / self.whole:.4g}, and the fastest plan, with back-propagation down to "
            f"layer {reach}, {least}; {advice}"
        )


def make_clock(sites: Sequence[Site], time_budget: float = 1.0, model: TimeModel | None = None) -> Clock:
    """Count the step time of every layer from kernel shapes, and set the limit.

    Only the kernels of `sites` are counted; attention, norms and the embedding are taken to shrink along with them. A
    site outside any numbered layer counts as layer 0, where back-propagation ends last.

    Args:
      sites: the sites.
      time_budget: longest step time relative to uniform rank 16, above 0 and at most 1.
      model: the times per parameter; `MEASURED` when None.

    Raises:
      UsageError: the time budget is not a number above 0 and at most 1.
    """
    sites, model = check_sites(sites), MEASURED if model is None else model
    if not isinstance(model, TimeModel):
        raise UsageError(f"time model {shown(model)} cannot be used: expected a TimeModel, such as MEASURED or FLOPS")
    number = real(time_budget)
    fraction = Fraction(repr(number)) if number is not None and 0 < number <= 1 else 0  # by its digits: 0.3 means 3/10
    if not fraction:
        raise UsageError(
            f"time budget {shown(time_budget)} cannot be used: expected a step time relative to uniform rank {YARDSTICK}, "
            "above 0 and at most 1"
        )
    kernels: dict[int, int] = {}
    for s in sites:
        kernels[s.layer] = kernels.get(s.layer, 0) + s.d_in * s.d_out
    forward, back = model.forward * sum(kernels.values()), {k: model.backward * n for k, n in kernels.items()}
    total = forward + sum(back.values()) + model.own * sum(s.cost(YARDSTICK) for s in sites)
    layer = np.array([s.layer for s in sites], np.int64)
    return Clock(layer, back, forward, model.own, total, math.floor(fraction * total))


def step_time(
    ranks: Mapping[str, int] | Sequence[int] | np.ndarray, sites: Sequence[Site], model: TimeModel | None = None
) -> float:
    """Predict the time of a training step relative to uniform rank 16 at every site.

        (forward + sum_{k >= lowest adapted layer} back_k + own * parameters) / (the same at uniform rank 16)

    Args:
      ranks: rank of each site: a mapping from path, or a sequence in the order of `sites`.
      sites: the sites, also those whose adapters are gone: their kernels are still run.
      model: the times per parameter; `MEASURED` when None.

    Raises:
      UsageError: a rank is missing, negative or not whole.
    """
    sites = check_sites(sites)
    clock, each = make_clock(sites, model=model), check_rank_of_each(ranks, sites)
    params = sum(s.cost(int(r)) for s, r in zip(sites, each, strict=True))
    return clock.time(each, params) / clock.whole
