"""What a pruning event does, and doing it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import optax

from jaxprune.adapters import Adapters, Masks
from jaxprune.errors import UsageError
from jaxprune.reprs import fields_line
from jaxprune.surgery.components import Place, host, like, map_adapters, map_moments, rebuild
from jaxprune.surgery.mask import zero_components
from jaxprune.surgery.rotation import Basis, rotate

_NOTHING: Mapping[str, Any] = MappingProxyType({})


class Decision(NamedTuple):
    """What a pruning event does.

    Attributes:
      masks: {site path: mask} of the sites that lose components; a component once dead never comes back.
      adapters: {site path: adapter} whose surviving values were compensated for what goes; usually none.
      scales: {site path: factor} on the adapter's `scale`, for methods whose paper rescales. `scale` is part of the compiled
        program, so this costs a compilation.
      report: what a run should say of the event: `solver`, `status`, `gap`, `seconds`, ...
      bases: {site path: basis} that sites are brought into first, with their moments; masks and adapters are of the new basis.
    """

    masks: Mapping[str, Any]
    adapters: Adapters = _NOTHING
    scales: Mapping[str, float] = _NOTHING
    report: Mapping[str, Any] = _NOTHING
    bases: Mapping[str, Basis] = _NOTHING

    __repr__ = fields_line


def apply(
    decision: Decision, adapters: Adapters, masks: Masks, opt_state: Any, optimizer: optax.GradientTransformation
) -> tuple[dict[str, Any], dict[str, Any], Any]:
    """Carry a decision out: change bases, mask what dies, and zero its values and moments.

    Everything stays in its shape and where it is, so no training step is compiled again; the host sees masks alone.

    Args:
      decision: from a method's `decide`.
      adapters: {path: adapter}.
      masks: {path: mask}.
      opt_state: the state of `optimizer`.
      optimizer: the chain that made it; moments of a site that loses some components must have the shape of its leaves.

    Raises:
      UsageError: the decision names an unknown site, has a mask of another shape, or revives a dead component.

    Returns:
      (adapters, masks, opt_state).
    """
    before = host(masks)
    after = dict(before)
    for path, mask in decision.masks.items():
        mask = np.asarray(mask)
        old = before.get(path)
        if old is None or mask.shape != old.shape:
            raise UsageError(
                f"the decision gives {path!r} a mask of shape {mask.shape}; expected {None if old is None else old.shape}"
            )
        if ((mask > 0) & (old <= 0)).any():
            raise UsageError(f"the decision revives a dead component of {path!r}; masks may only lose components")
        after[path] = (mask > 0).astype(old.dtype)
    changed = {path for path in after if not np.array_equal(after[path], before[path])}
    if decision.bases:
        adapters, opt_state = rotate(decision.bases, adapters, opt_state, optimizer)

    def zero(leaf: Any, place: Place) -> Any:
        if place.axis is None or place.path not in changed:
            return leaf
        return zero_components(leaf, new_masks[place.path], place.axis)

    new_masks = {path: like(after[path], mask) if path in changed else mask for path, mask in masks.items()}
    moments = map_moments(zero, opt_state, adapters, {path for path in changed if after[path].any()})
    rescaled = {
        path: dataclasses.replace(adapter, scale=adapter.scale * decision.scales[path])
        if path in decision.scales
        else adapter
        for path, adapter in {**adapters, **decision.adapters}.items()
    }
    return map_adapters(zero, rescaled), new_masks, rebuild(moments, rescaled, optimizer)
