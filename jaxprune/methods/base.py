"""The protocol every method follows: a NamedTuple of pure functions, made by a factory with keyword-only settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from jaxprune.adapters import Adapters, Masks
from jaxprune.allocate import Plan
from jaxprune.sites import Site


class Context(NamedTuple):
    """What a method may look at before training starts.

    Attributes:
      key: random key.
      params: the model's parameters.
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


class Start(NamedTuple):
    """What a method starts training with; `plan` is None for methods that have no ranks."""

    adapters: Adapters
    masks: Masks
    plan: Plan | None


class Method(NamedTuple):
    """A fine-tuning method.

    Attributes:
      start: `start(context) -> Start`: plans ranks and makes the adapters; runs once, on the host.
      init: `init(adapters, masks, sites) -> state`: the method's own state, a pytree of arrays.
      observe: `observe(state, adapters, masks, grads, step) -> state`: jitted inside the training step; sees the
        gradients before clipping and weight decay.
      penalty: `penalty(adapters) -> scalar` added to the loss, or None.
      project: `project(adapters) -> adapters` after every update, or None.
    """

    start: Callable[[Context], Start]
    init: Callable[..., Any] = lambda adapters, masks, sites: ()
    observe: Callable[..., Any] = lambda state, adapters, masks, grads, step: state
    penalty: Callable[..., Any] | None = None
    project: Callable[..., Any] | None = None
