"""What every kind of adapter is: a small pytree that knows its own forward, merge and count.

Adapters of a model are one flat dict, {site path: adapter}; masks lie beside them, {site path: (r,)}. A kind is a frozen
dataclass registered as a pytree: arrays are its leaves and are trained, settings (the scale, the dropout rate) are
static and are not.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from jaxprune.errors import UsageError, nearest, shown
from jaxprune.sites import Index, leaf_at, stacked_axes

Array = jax.Array


class Adapter(Protocol):
    """The adapter of one site; `x_NxI` are flattened tokens, `mask` is (r,) or None, `key` is None outside training.

    A kind may further have
    - `rank_axes`: {leaf: its axis of rank components, -1 or -2}, which pruning needs;
    - `frozen`: names of leaves that are not trained; its forward pass stops their gradients;
    - `finish(y_NxO, mask) -> y_NxO`: what comes after the bias;
    - `merge_bias(bias, mask) -> bias`: the bias that goes with a merged kernel, where it changes too;
    - `undecayed`: names of leaves that take no weight decay, and `rate`: {leaf: factor on the learning rate};
    - `on_kernel`: true where it changes the kernel itself, once for all uses of it in a forward pass;
    - `as_lora(mask) -> Lora`: the same product as plain LoRA, where there is one, for export.
    """

    def linear(self, x_NxI: Array, kernel_IxO: Array, mask: Array | None, key: Array | None) -> Array:
        """Return the adapted product (N, d_out), without the bias."""
        ...

    def merge(self, kernel: Array, mask: Array | None) -> Array:
        """Return the kernel that does the same without the adapter, in the kernel's dtype, added up in float32."""
        ...

    def count(self, mask: Array | None) -> int:
        """Count the live trainable parameters."""
        ...


Adapters = Mapping[str, Any]
Masks = Mapping[str, Array]


def leaves_of(adapter: Any) -> dict[str, Any]:
    """Return the leaves of one adapter by field name, without its settings (which may be NumPy scalars)."""
    fields = {field.name: getattr(adapter, field.name) for field in dataclasses.fields(adapter)}
    return {name: leaf for name, leaf in fields.items() if hasattr(leaf, "shape") and not isinstance(leaf, np.generic)}


def key_for(key: Array, path: str) -> Array:
    """Derive a site's random key from its path, so that adding or removing a site leaves every other one unchanged."""
    return jax.random.fold_in(check_key(key), zlib.crc32(path.encode(errors="surrogatepass")))


def check_key(key: Array) -> Array:
    """Return a random key; anything else is a UsageError."""
    typed = isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.ndim == 0
    if not typed and not (isinstance(key, jax.Array) and key.dtype == jnp.uint32 and key.shape == (2,)):
        raise UsageError(f"key {shown(key)} is no random key; pass jax.random.key(seed)")
    return key


def place(flat: Mapping[str, Any], path: str, adapter: Any, mask: Any) -> tuple[str, Index]:
    """Return the path of the leaf that an adapter belongs to, and the index into it, after checking that both fit.

    Args:
      flat: the parameters, {path: leaf}.
      path: the adapter's.
      adapter: of any kind.
      mask: of the adapter, or None.

    Raises:
      UsageError: there is no such leaf, or a shape differs.
    """
    found = leaf_at(flat, path) if isinstance(path, str) else None
    if found is None:
        near = nearest(f"{path}/kernel", flat)
        raise UsageError(f"adapter path {shown(path)} is not in the parameters; nearest names: {near}")
    if not (hasattr(adapter, "merge") or hasattr(adapter, "linear")):
        raise UsageError(
            f"the adapter at {shown(path)} is {shown(adapter)}; expected one that init_lora or a method made"
        )
    leaf, index = found
    axes = getattr(adapter, "rank_axes", {})
    if axes.keys() >= {"a", "b"}:
        d_in, d_out, indexed = adapter.a.shape[0], adapter.b.shape[-1], stacked_axes(index)
        shape = tuple(size for axis, size in enumerate(flat[leaf].shape) if axis not in indexed)
        splits = [(math.prod(shape[:i]), math.prod(shape[i:])) for i in range(1, len(shape))]
        pair = adapter.a.ndim == adapter.b.ndim == 2 and adapter.a.shape[1] == adapter.b.shape[0]
        if not pair or (d_in, d_out) not in splits:
            raise UsageError(
                f"the adapter at {shown(path)} has factors of shapes {adapter.a.shape} and {adapter.b.shape}, which do not fit "
                f"the kernel of shape {flat[leaf].shape}; make it from the sites of these parameters"
            )
    check_mask(path, adapter, mask)
    return leaf, index


def merged(adapter: Any, kernel: Array, mask: Array | None) -> Array:
    """Return the kernel with an adapter folded into the matrix that it is, in the kernel's shape."""
    own = getattr(adapter, "lora", adapter)
    if hasattr(own, "d_in"):
        shape = (own.d_in, own.b.shape[-1])
    elif hasattr(own, "a"):
        shape = (own.a.shape[0], own.b.shape[-1])
    else:  # it changes every entry for itself
        shape = kernel.shape
    return adapter.merge(kernel.reshape(shape), mask).reshape(kernel.shape)


def by_leaf(
    flat: Mapping[str, Any], adapters: Adapters, masks: Masks
) -> dict[str, dict[Index, tuple[str, Any, Array | None]]]:
    """Group the adapters of sites by the leaf they belong to: {leaf: {index: (path, adapter, mask)}}.

    Every adapter is checked to fit.

    Raises:
      UsageError: as `place`, or the paths count the layers of one kernel along different axes.
    """
    check_mappings(adapters, masks)
    grouped: dict[str, dict[Index, tuple[str, Any, Array | None]]] = {}
    for path, adapter in adapters.items():
        leaf, index = place(flat, path, adapter, masks.get(path))
        own = grouped.setdefault(leaf, {})
        if own and stacked_axes(index) != stacked_axes(next(iter(own))):
            raise UsageError(
                f"the adapters at {shown(path)} and {shown(next(iter(own.values()))[0])} take one kernel apart along different "
                f"axes; make them from the sites of one find_sites"
            )
        own[index] = (path, adapter, masks.get(path))
    return grouped


def check_mask(path: str, adapter: Any, mask: Any) -> None:
    """Raise where a mask is no array with one entry for every component of an adapter."""
    axes = getattr(adapter, "rank_axes", {})
    if not axes or mask is None:
        return
    name, axis = next(iter(axes.items()))
    leaf = getattr(adapter, name)
    expected, given = (leaf.shape[axis],), getattr(mask, "shape", None)
    if given != expected:
        what = shown(mask) if given is None else f"of shape {given}"
        raise UsageError(f"the mask at {shown(path)} is {what}, expected shape {expected}: one entry a component")


def check_mappings(adapters: Any, masks: Any) -> None:
    """Raise where adapters or masks are no mappings."""
    for name, value in (("adapters", adapters), ("masks", masks)):
        if not isinstance(value, Mapping):
            raise UsageError(f"{name} {shown(value)} cannot be used: expected {{site path: {name.rstrip('s')}}}")


def matmul(x_NxI: Array, kernel_IxO: Array) -> Array:
    """Multiply flattened tokens by a kernel in the dtype of `x`."""
    return jnp.dot(x_NxI, kernel_IxO.astype(x_NxI.dtype))


def base(x_NxI: Array, kernel_IxO: Array) -> Array:
    """Return `matmul` of a frozen kernel, under the name by which rematerialisation may keep it."""
    return checkpoint_name(matmul(x_NxI, kernel_IxO), "base")


def drop(x_NxI: Array, rate: float, key: Array | None) -> Array:
    """Zero entries with probability `rate` and scale the rest by 1 / (1 - rate); without a key, return `x` itself."""
    if key is None or rate == 0.0:
        return x_NxI
    keep = jax.random.bernoulli(key, 1.0 - rate, x_NxI.shape)
    return jnp.where(keep, x_NxI / (1.0 - rate), 0).astype(x_NxI.dtype)
