"""Attach adapters to any function of parameters, by merging them into the weights inside the step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jaxprune.adapters import Adapters, Masks, merge
from jaxprune.errors import UsageError, shown


def attach_function(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `forward(params, adapters, masks, *inputs, **kwargs)` = `function(merge(params, ...), *inputs, **kwargs)`.

    Universal (any function, any transformation) and exact, but forming W + s (A * m) B costs up to 1.5 times the FLOPs
    of `attach` when every linear layer is adapted, and adapter dropout does not apply.

    Args:
      function: `function(params, *inputs, **kwargs)`; kernels are leaves named `kernel`.
    """
    if not callable(function):
        raise UsageError(f"function {shown(function)} cannot be called; expected function(params, *inputs)")

    def forward(params: Mapping[str, Any], adapters: Adapters, masks: Masks, *inputs, **kwargs):
        return function(merge(params, adapters, masks), *inputs, **kwargs)

    return forward
