"""Attach adapters to a Flax Linen model by interception.

The adapters are put into the parameter tree, each into the subtree of the module it belongs to, and the interceptor reads
them there. Because they travel as variables of their module, `nn.remat`, `nn.scan` and both together carry and slice
them like any other parameter; a lookup by path in a closure would see the wrong layer under `nn.scan`.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import DenyList
from flax.linen.dtypes import promote_dtype

from jaxprune.adapters import Adapters, Masks
from jaxprune.adapters.base import Array, by_leaf, drop, merged
from jaxprune.attaching.stacking import one_layer, stack
from jaxprune.errors import UsageError, shown
from jaxprune.kernels import Kernel, kernel_of
from jaxprune.sites import flatten, unflatten

_KEY = "jaxprune_adapter"


def attach(model: nn.Module, *, method: str | Callable | None = None) -> Callable[..., Any]:
    """Return `forward(params, adapters, masks, *inputs, rngs=None, variables=None, **kwargs)`: the model with its adapters.

    Every `nn.Dense` and `nn.DenseGeneral` at an adapter's path, those of attention and of recurrent cells too, computes over
    flattened tokens what the adapter's `linear` says; every `nn.Conv`, `nn.Einsum` and `nn.Embed` runs with the merged kernel;
    every other module is left alone. Exact under `nn.remat`, `nn.scan` and both together.

    A model with other collections takes them beside `params`, and returns as Linen does `(outputs, updated)` where some are
    mutable:

        y, updated = forward(params, adapters, masks, x, variables={"batch_stats": stats}, mutable=["batch_stats"])

    Args:
      model: any Linen module; it is not changed.
      method: the method to call, `__call__` by default.

    Raises:
      UsageError: the model is no instance of a Linen module or lacks the method; by the returned function, when it is traced:
        an adapter's path is not in the parameters, an adapter or a mask does not fit there, or its module is none of the
        above that the call reached; an adapter that would silently do nothing is an error. So is dropout of an adapter that
        is being trained without `rngs={"dropout": key}`.
    """
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"model {shown(model)} cannot be used: expected an instance of a flax.linen.Module; adapters reach any other model "
            f"through attach_function"
        )
    if isinstance(method, str) and not callable(getattr(model, method, None)):
        raise UsageError(f"method {shown(method)} is none of the model's, a {type(model).__name__}")

    def forward(
        params: Mapping[str, Any], adapters: Adapters, masks: Masks, *inputs, rngs=None, variables=None, **kwargs
    ):
        reached: set[str] = set()

        def intercept(next_fun, args, kwargs, context):
            module, path = context.module, "/".join(context.module.path)
            if path in replaced:
                reached.add(path)
            if context.method_name not in ("__call__", "attend") or not module.has_variable("params", _KEY):
                return next_fun(*args, **kwargs)
            kernel = kernel_of(module, args, kwargs)
            if kernel.fault:
                return next_fun(*args, **kwargs)
            reached.add(path)
            pair = module.get_variable("params", _KEY)
            adapter, mask = one_layer(pair, stacked[path]) if path in stacked else pair
            _check_one_matrix(path, getattr(adapter, "lora", adapter), kernel)
            key = None
            if getattr(adapter, "dropout", 0.0):
                if module.has_rng("dropout"):
                    key = module.make_rng("dropout")
                else:
                    adapter = jax.tree.map(functools.partial(_untrained, path), adapter)
            if isinstance(module, nn.Dense | nn.DenseGeneral):
                return _linear(module, args[0] if args else kwargs["inputs"], adapter, mask, key)
            return _merged(module, context.method_name, args, kwargs, adapter, mask, key)

        tree, replaced, stacked, modules = _insert(params, adapters, masks)
        collections = {"params": tree, **_others(variables)}
        if kwargs.get("mutable") is True:  # whatever the model updates, it does not update its parameters
            kwargs["mutable"] = DenyList("params")
        with nn.intercept_methods(intercept):
            outputs = model.apply(collections, *inputs, rngs=rngs, method=method, **kwargs)
        missed = [path for path, module in modules.items() if module not in reached]
        if missed:
            raise UsageError(
                f"{len(missed)} adapters were never reached, first {missed[0]!r}: its module is no nn.Dense, DenseGeneral, "
                f"Conv, Einsum or Embed that this call runs; leave the site out of the targets, or use attach_function"
            )
        return outputs

    forward.takes_rngs = True  # pyright: ignore[reportFunctionMemberAccess]
    return forward


def _check_one_matrix(path: str, adapter: Any, kernel: Kernel) -> None:
    expected = (kernel.d_in, kernel.d_out)
    if hasattr(adapter, "a") and (adapter.a.shape[0], adapter.b.shape[-1]) != expected:
        raise UsageError(
            f"the adapter at {shown(path)} has factors of shapes {adapter.a.shape} and {adapter.b.shape}, but its "
            f"module multiplies by one matrix of {expected}; make it from find_sites(params, call=...)"
        )


def _others(variables: Any) -> Mapping[str, Any]:
    if variables is not None and (not isinstance(variables, Mapping) or "params" in variables):
        raise UsageError(
            f"variables {shown(variables)} cannot be used: expected the collections beside 'params', such as "
            f"{{'batch_stats': stats}}"
        )
    return variables or {}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _untrained(path: str, leaf: Array) -> Array:
    """Return a leaf of an adapter with dropout that got no random key, which is right as long as nobody trains it."""
    return leaf


def _refuse(path: str, leaf: Array):
    raise UsageError(
        f"the adapter at {shown(path)} has dropout and is trained without a random key; let the loss call "
        f"apply(..., rngs={{'dropout': key}}) with the key it gets; an nn.scan or nn.RNN needs split_rngs={{'dropout': True}} too"
    )


_untrained.defvjp(_refuse, lambda path, _, gradient: (gradient,))


def _linear(module: nn.Dense | nn.DenseGeneral, x: Array, adapter, mask, key) -> Array:
    """Compute the matrix product of a module over flattened tokens."""
    kernel = module.get_variable("params", "kernel")
    bias = module.get_variable("params", "bias") if module.use_bias else None
    x, kernel, bias = promote_dtype(x, kernel, bias, dtype=module.dtype)
    axis = getattr(module, "axis", -1)
    axes = sorted(a % x.ndim for a in (axis if isinstance(axis, tuple | list) else (axis,)))  # as Flax takes them
    features, d_in = kernel.shape[len(axes) :], math.prod(kernel.shape[: len(axes)])
    batch = [a for a in range(x.ndim) if a not in axes]
    rows = [x.shape[a] for a in batch]
    # One token axis: with (B, T, d) operands the backward pass of the thin factors is a contraction over two axes, which
    # XLA does badly on CPUs (twice the time of a whole step).
    x_NxI = jnp.transpose(x, (*batch, *axes)).reshape(-1, d_in)
    y_NxO = adapter.linear(x_NxI, kernel.reshape(d_in, -1), mask, key)
    if bias is not None:
        y_NxO = y_NxO + jnp.reshape(bias, (1, -1))
    if hasattr(adapter, "finish"):
        y_NxO = adapter.finish(y_NxO, mask)
    return y_NxO.reshape(*rows, *features)


def _merged(module: nn.Module, name: str, args, kwargs, adapter, mask, key) -> Any:
    """Run a module whose output is linear in its kernel W with the merged kernel W'.

    With dropout that is f(x, W) + f(dropout(x), W' - W), which equals what `linear` does for a matrix product.
    """
    own = {leaf: value for leaf, value in module.variables["params"].items() if leaf != _KEY}
    held = "kernel" if "kernel" in own else "embedding"
    bare = module.clone(parent=None)
    run: Callable[..., Any] = lambda params, *args: bare.apply({"params": params}, *args, method=name, **kwargs)  # noqa: E731
    if not hasattr(adapter, "merge"):
        raise UsageError(
            f"the adapter at {shown('/'.join(module.path))}, a {type(adapter).__name__}, needs a matrix product, and the module "
            f"is a {type(module).__name__}; leave the site out of the targets"
        )
    if key is None:
        changed = {**own, held: merged(adapter, own[held], mask)}
        if hasattr(adapter, "merge_bias") and "bias" in own:
            changed["bias"] = adapter.merge_bias(own["bias"], mask)
        return run(changed, *args)
    if held == "embedding" or not args or hasattr(adapter, "merge_bias"):
        raise UsageError(
            f"the adapter at {shown('/'.join(module.path))}, a {type(adapter).__name__}, cannot drop inputs of a "
            f"{type(module).__name__}; set its dropout to 0"
        )
    kernel = own[held].astype(jnp.float32)
    change = {**jax.tree.map(jnp.zeros_like, own), held: merged(adapter, kernel, mask) - kernel}
    y, x = run(own, *args), drop(args[0], adapter.dropout, key)
    return y + run(change, x, *args[1:]).astype(y.dtype)


def _insert(
    params: Mapping[str, Any], adapters: Adapters, masks: Masks
) -> tuple[dict[str, Any], set[str], dict[str, Any], dict[str, str]]:
    """Put every adapter into the subtree of its module.

    Returns:
      (parameters, the modules whose kernels were replaced, {module of a scan: what `one_layer` needs}, {site: its module}).
    """
    flat, replaced, stacked, modules = flatten(params), set(), {}, {}
    grouped = by_leaf(flat, adapters, masks)
    for leaf, own in grouped.items():
        module = leaf.rpartition("/")[0]
        modules |= {path: module for path, _, _ in own.values()}
        if () not in own:
            pairs = {index: (adapter, mask) for index, (_, adapter, mask) in own.items()}
            flat[f"{module}/{_KEY}"], stacked[module] = stack(module, flat[leaf].shape, pairs)
            continue
        _, adapter, mask = own[()]
        if getattr(adapter, "on_kernel", False):
            flat[leaf] = merged(adapter, flat[leaf], mask)
            replaced.add(module)
        else:
            flat[f"{module}/{_KEY}"] = (adapter, mask)
    return unflatten(flat), replaced, stacked, modules
