"""The protocol every method follows: a NamedTuple of pure functions, made by a factory with keyword-only settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from jaxprune.adapters import Adapters, Masks, Weights
from jaxprune.allocation import Plan
from jaxprune.reprs import fields_line
from jaxprune.sites import Site


class Context(NamedTuple):
    """What a method may look at before training, and at every event.

    Attributes:
      key: random key.
      params: the model's parameters; at an event with the trained weights in them.
      sites: the sites that adapters may attach to.
      forward: `forward(params, adapters, masks, *inputs)` from `attach`.
      loss_fn: `loss_fn(apply, batch, key)`, the mean loss of a batch.
      batches: a few batches of the training data, for scores.
      samples: the same data with one more leading axis over single samples, for per-sample scores.
    """

    key: jax.Array
    params: Mapping[str, Any]
    sites: Sequence[Site]
    forward: Callable[..., Any]
    loss_fn: Callable[..., Any]
    batches: Sequence[Any] = ()
    samples: Sequence[Any] = ()

    __repr__ = fields_line


class Start(NamedTuple):
    """What a method starts training with.

    Attributes:
      adapters: {site path: adapter}, trained.
      weights: {leaf path: array}: leaves of the model that are trained as they are.
      masks: {site path: mask}.
      plan: the ranks; None for methods that have none.
      params: the frozen parameters that the step must use: the context's own, but for a method that changes them (PiSSA takes
        its factors out of the kernels). Must be a deterministic function of the context: a resumed run makes them again.
    """

    adapters: Adapters
    weights: Weights
    masks: Masks
    plan: Plan | None
    params: Mapping[str, Any]

    __repr__ = fields_line


class Probes(NamedTuple):
    """Quantities that exist only inside the forward or backward pass, and are reduced there to a number or two.

    A probe is a dummy zero whose gradient is the measurement (see `jaxprune.scores.tap`). On the steps that do not measure
    nothing of it is computed, by a second program within the step's.

    Attributes:
      zeros: `zeros(adapters) -> pytree of zeros`, shaped as the measurements.
      wrap: `wrap(adapters, zeros) -> adapters` that compute the same and whose gradient with respect to the zeros is the
        measurement.
      when: `when(step) -> bool`, traced: does this step measure? None for every step, and no second program.
    """

    zeros: Callable[..., Any]
    wrap: Callable[..., Any]
    when: Callable[..., Any] | None = None


class Method(NamedTuple):
    """A fine-tuning method. Only `start` is needed; every other part does nothing unless given.

    Within a training step, in this order: `view`, forward and backward pass, `observe`, the optimizer, `project`. Between
    steps, on the host: `decide`. Steps count from 1 everywhere; `state` is the method's own.

    Attributes:
      start: `start(context) -> Start`: plans ranks and makes the adapters; runs once, on the host.
      init: `init(adapters, masks) -> state`: the method's own state, a pytree of arrays.
      observe: `observe(state, adapters, masks, grads, step, measured) -> state`: jitted inside the training step; sees the
        gradients before clipping and weight decay, and what `probes` measured (None on steps that do not measure).
      decide: `decide(state, adapters, masks, step, context) -> (state, Decision | None)`: runs on the host after the steps
        that `events` names; `context` is what `start` got.
      events: the steps (1, 2, ...) after which `decide` runs: few, and known before training, so that a run too short for them is
        refused when the method is made.
      penalty: `penalty(state, adapters, masks) -> scalar` added to the loss.
      project: `project(state, adapters, masks, grads, step) -> (state, adapters)`, jitted, after every update.
      view: `view(state, adapters, masks, key, step) -> (adapters, masks)`: what the forward pass sees of them; differentiated
        through, and free to draw from `key`. Outside training `key` and `step` are None, and the view is deterministic.
      probes: what else to measure in the backward pass.
      compact: `compact(state, kept) -> state` where the method's state has rank axes of its own; `kept` is from
        `jaxprune.surgery.survivors`, and `jaxprune.surgery.gather` does it for trees shaped like the adapters.
      removes: what its decisions mask: `"components"`, `"sites"` where they are whole ones always, `"nothing"` where they change
        adapters alone. The less it is, the more optimizers can follow.
      name: what a checkpoint remembers it by, and refuses another method by; an empty name goes with any.
    """

    start: Callable[[Context], Start]
    init: Callable[..., Any] = lambda adapters, masks: ()
    observe: Callable[..., Any] = lambda state, adapters, masks, grads, step, measured: state
    decide: Callable[..., Any] | None = None
    events: tuple[int, ...] = ()
    penalty: Callable[..., Any] | None = None
    project: Callable[..., Any] | None = None
    view: Callable[..., Any] | None = None
    probes: Probes | None = None
    compact: Callable[..., Any] = lambda state, kept: state
    removes: str = "components"
    name: str = ""

    __repr__ = fields_line

    def triggers(self, number: int) -> bool:
        """Tell whether there is an event after step `number`."""
        return number in self.events

    def seen(self, state: Any, adapters: Adapters, masks: Masks) -> tuple[Adapters, Masks]:
        """Return what a forward pass outside training sees: to evaluate, merge and export."""
        return self.view(state, adapters, masks, None, None) if self.view else (adapters, masks)
