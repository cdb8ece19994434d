"""Attach adapters to a Flax Linen model by interception.

The adapters are put into the parameter tree, each into the subtree of the module it belongs to, and the interceptor reads
them there. Because they travel as variables of their module, `nn.remat`, `nn.scan` and both together carry and slice
them like any other parameter; a lookup by path in a closure would see the wrong layer under `nn.scan`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype

from jaxprune.adapters import Adapters, Masks, Weight
from jaxprune.adapters.base import Array, check_mappings, place
from jaxprune.errors import UsageError, shown
from jaxprune.sites import flatten, unflatten

_KEY = "jaxprune_adapter"


def attach(model: nn.Module, *, method: str | Callable | None = None) -> Callable[..., Any]:
    """Return `forward(params, adapters, masks, *inputs, rngs=None, **kwargs)`: the model with its adapters.

    Every `nn.Dense` at an adapter's path computes over flattened tokens what the adapter's `linear` says; every other
    module is left alone. Exact under `nn.remat`, `nn.scan` and both together.

    Args:
      model: any Linen module; it is not changed.
      method: the method to call, `__call__` by default.

    Raises:
      UsageError: the model is no instance of a Linen module or lacks the method; by the returned function, when it is traced:
        an adapter's path is not in the parameters, an adapter or a mask does not fit there, or its module is not an
        `nn.Dense` that the call reached; an adapter that would silently do nothing is an error.
    """
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"model {shown(model)} cannot be used: expected an instance of a flax.linen.Module; adapters reach any other model "
            f"through attach_function"
        )
    if isinstance(method, str) and not callable(getattr(model, method, None)):
        raise UsageError(f"method {shown(method)} is none of the model's, a {type(model).__name__}")

    def forward(params: Mapping[str, Any], adapters: Adapters, masks: Masks, *inputs, rngs=None, **kwargs):
        reached: set[str] = set()

        def intercept(next_fun, args, kwargs, context):
            module = context.module
            called = isinstance(module, nn.Dense) and context.method_name == "__call__"
            if not (called and module.has_variable("params", _KEY)):
                return next_fun(*args, **kwargs)
            adapter, mask = module.get_variable("params", _KEY)
            reached.add("/".join(module.path))
            key = module.make_rng("dropout") if getattr(adapter, "dropout", 0.0) and module.has_rng("dropout") else None
            kernel = module.get_variable("params", "kernel")
            bias = module.get_variable("params", "bias") if module.use_bias else None
            return _dense(args[0] if args else kwargs["inputs"], kernel, bias, adapter, mask, key, module.dtype)

        tree = _insert(params, adapters, masks)
        with nn.intercept_methods(intercept):
            outputs = model.apply({"params": tree}, *inputs, rngs=rngs, method=method, **kwargs)
        missed = [p for p, adapter in adapters.items() if not isinstance(adapter, Weight) and p not in reached]
        if missed:
            raise UsageError(
                f"{len(missed)} adapters were never reached, first {missed[0]!r}: its module is not an nn.Dense that "
                f"this call runs; leave the site out of the targets, or use attach_function"
            )
        return outputs

    return forward


def _dense(x: Array, kernel: Array, bias: Array | None, adapter, mask, key, dtype) -> Array:
    x, kernel, bias = promote_dtype(x, kernel, bias, dtype=dtype)
    # One token axis: with (B, T, d) operands the backward pass of the thin factors is a contraction over two axes, which
    # XLA does badly on CPUs (twice the time of a whole step).
    y_NxO = adapter.linear(x.reshape(-1, x.shape[-1]), kernel, mask, key)
    if bias is not None:
        y_NxO = y_NxO + jnp.reshape(bias, (1, -1))
    if hasattr(adapter, "finish"):
        y_NxO = adapter.finish(y_NxO, mask)
    return y_NxO.reshape(*x.shape[:-1], y_NxO.shape[-1])


def _insert(params: Mapping[str, Any], adapters: Adapters, masks: Masks) -> dict[str, Any]:
    check_mappings(adapters, masks)
    flat = flatten(params)
    for path, adapter in adapters.items():
        leaf = place(flat, path, adapter, masks.get(path))
        if isinstance(adapter, Weight):
            flat[leaf] = adapter.merge(flat[leaf], None)
        else:
            flat[f"{path}/{_KEY}"] = (adapter, masks.get(path))
    return unflatten(flat)
