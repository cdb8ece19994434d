"""Scores of sites: how much each kernel matters to the loss, measured before any adapter exists."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.errors import UsageError, nearest, shown
from jaxprune.inputs import check_sites
from jaxprune.scores.tap import mean_absolute, mean_squared, mean_top10, taps
from jaxprune.sites import Site, flatten, layer_of, leaf_at

SCORES = ("absolute", "squared", "weight", "activation", "top10")
_REDUCE = {"absolute": mean_absolute, "squared": mean_squared, "top10": mean_top10, "activation": None}


def site_scores(
    kind: str,
    forward: Callable[..., Any],
    loss_fn: Callable[..., Any],
    params: Mapping[str, Any],
    sites: Sequence[Site],
    batches: Iterable[Any],
    *,
    per_sample: bool = False,
) -> dict[str, float]:
    """Score every site on a few batches, in one jitted backward pass a batch.

    With G the gradient of the mean loss with respect to the site's kernel W and mean(.) over its entries:

    | kind | score |
    | --- | --- |
    | `absolute` | mean \\|G\\| (DPLoRA eq. 1) |
    | `squared` | mean G^2 (with `per_sample`, the diagonal Fisher information of DPLoRA's released code) |
    | `top10` | mean of the largest tenth of \\|G\\| |
    | `activation` | mean \\|x W\\| over the tokens computed |
    | `weight` | mean \\|W\\|; needs no batches |

    Memory: no dense gradient outlives its site's turn in the backward pass. Where a kernel is used more than once in a
    forward pass (tied layers, recurrent cells), G is the whole gradient, summed over its uses.

    Args:
      kind: one of the table's.
      forward: `forward(params, adapters, masks, *inputs, ...)` from `attach` or `attach_function`.
      loss_fn: `loss_fn(apply, batch, key) -> loss` or `(loss, aux)`, with `apply(*inputs, ...)` the adapted model and
        key None: nothing is dropped while measuring.
      params: nested dict of arrays.
      sites: the sites to score.
      batches: pytrees as `loss_fn` takes them; with `per_sample`, each leaf has one more leading axis, over samples.
      per_sample: average the scores of single samples' gradients instead of scoring a batch's mean gradient.

    Raises:
      UsageError: unknown kind, no batches, or a site that is not in the parameters.

    Returns:
      {site path: score}, averaged over batches.

    Source: DPLoRA, section 3.1 and Tables 16 and 17.
    """
    if not isinstance(kind, str) or kind not in SCORES:
        raise UsageError(
            f"score {shown(kind)} is not known; expected one of {', '.join(SCORES)}; nearest: {nearest(str(kind), SCORES, 1)}"
        )
    sites, kernels = kernels_of(params, sites)
    if kind == "weight":
        mean = lambda kernel: float(jnp.mean(jnp.abs(kernel.astype(jnp.float32))))  # noqa: E731
        return {path: mean(layer_of(leaf, index)) for path, (leaf, index) in kernels.items()}
    probes, loss = taps(sites, _REDUCE[kind]), loss_of(forward, loss_fn)

    @jax.jit
    def measure(params, batch):
        one = lambda sample: jax.grad(loss)(probes, params, sample)  # noqa: E731
        measured = jax.tree.map(lambda v: v.mean(0), jax.lax.map(one, batch)) if per_sample else one(batch)
        return {path: tap.read().mean() for path, tap in measured.items()}

    table = jax.device_get([measure(params, batch) for batch in batches_for(f"score {kind!r}", batches)])
    return {site.path: float(np.mean([row[site.path] for row in table], dtype=np.float64)) for site in sites}


def kernels_of(params: Mapping[str, Any], sites: Sequence[Site]) -> tuple[tuple[Site, ...], dict[str, Any]]:
    """Return the sites, checked, and the leaf of each with the index into it, by its path; one without is a UsageError."""
    sites, flat = check_sites(sites), flatten(params)
    places = {s.path: leaf_at(flat, s.path) for s in sites}
    if lost := [path for path, place in places.items() if place is None]:
        raise UsageError(f"site {lost[0]!r} is not in the parameters; take the sites from find_sites(params)")
    return sites, {path: (flat[place[0]], place[1]) for path, place in places.items() if place}


def loss_of(forward: Callable[..., Any], loss_fn: Callable[..., Any]) -> Callable[..., Any]:
    """Return `loss(taps, params, batch)`, the loss of a model with taps, to be differentiated by them."""

    def loss(taps, params, batch):
        value = loss_fn(lambda *inputs, **kw: forward(params, taps, {}, *inputs, **kw), batch, None)
        return value[0] if isinstance(value, tuple) else value

    return loss


def batches_for(what: str, batches: Iterable[Any]) -> Iterator[Any]:
    """Go through batches once; none is a UsageError that says what needs one."""
    if not isinstance(batches, Iterable) or isinstance(batches, Mapping):
        raise UsageError(f"batches {shown(batches)} cannot be used: expected a list of batches")
    empty = True
    for batch in batches:
        empty = False
        yield batch
    if empty:
        raise UsageError(f"{what} needs at least one batch and got none")
