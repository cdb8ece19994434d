"""Which matrix the kernel of a Linen module is, and what a call of a model shows of every kernel."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import flax.linen as nn
import jax

from jaxprune.errors import UsageError, reason, shown

# Leaves that hold a matrix, by the modules' own names for them.
LEAVES = ("kernel", "embedding")


@dataclass(frozen=True)
class Kernel:
    """A kernel as one call of its module sees it: without the axes over which a scan stacks it.

    Attributes:
      shape: as the module sees it.
      d_in: input features of its matrix, the product of its first axes.
      d_out: output features, the product of the others; 0 for both where `fault` is set.
      fault: why no adapter can be attached, empty where one can.
      axes: those along which a scan stacks it in the parameters.
    """

    shape: tuple[int, ...]
    d_in: int
    d_out: int
    fault: str = ""
    axes: tuple[int, ...] = ()


def leaf_name(module: nn.Module) -> str | None:
    """Return the name of the leaf that holds a bound module's matrix, None where it has none."""
    held = (name for name in LEAVES if module.has_variable("params", name))
    return next((name for name in held if hasattr(module.get_variable("params", name), "shape")), None)


def kernel_of(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Kernel:
    """Read the kernel of a bound module that is called with `args` and `kwargs`; it has one.

    | module | kernel | matrix |
    | --- | --- | --- |
    | `nn.Dense` | (in, out) | itself |
    | `nn.DenseGeneral`, also within attention | (in..., out...) | (prod in, prod out) |
    | `nn.Conv` | (window..., in, out) | (prod window * in, out) |
    | `nn.Einsum` | (in..., out...) | (prod in, prod out) |
    | `nn.Embed` | (entries, features) | itself |
    """
    shape = tuple(module.get_variable("params", str(leaf_name(module))).shape)
    outputs, fault = 1, ""
    if isinstance(module, nn.DenseGeneral):
        outputs = len(module.features) if isinstance(module.features, tuple | list) else 1
        if module.batch_dims:
            fault = "an nn.DenseGeneral with batch_dims holds several matrices"
    elif isinstance(module, nn.Einsum):
        outputs, fault = _einsum(module.einsum_str or (args[1] if len(args) > 1 else kwargs["einsum_str"]))
    elif not isinstance(module, nn.Dense | nn.Conv | nn.Embed):
        fault = f"it belongs to a {type(module).__name__}, and adapters reach nn.Dense, DenseGeneral, Conv, Einsum and Embed"
    if fault:
        return Kernel(shape, 0, 0, fault)
    return Kernel(shape, math.prod(shape[:-outputs]), math.prod(shape[-outputs:]))


def _einsum(equation: str) -> tuple[int, str]:
    """Return how many axes of the kernel are outputs, and what is wrong with the equation."""
    left, _, result = equation.replace(" ", "").partition("->")
    inputs, kernel = left.split(",")
    outputs = sum(axis in result for axis in kernel)
    ordered = not any(axis in result for axis in kernel[: len(kernel) - outputs])
    if any(axis in result and axis in inputs for axis in kernel):
        return 0, f"{shown(equation)} multiplies by several matrices, one for each entry of an axis"
    if not ordered or not outputs or any(axis not in inputs and axis not in result for axis in kernel):
        return 0, f"the kernel of {shown(equation)} is no matrix: expected its summed axes first and its new axes last"
    return outputs, ""


def traced(call: Callable[[Any], Any], params: Mapping[str, Any], flat: Mapping[str, Any]) -> dict[str, Kernel]:
    """Return the kernels that `call(params)` uses, {module path: Kernel}, in the order of their first use.

    Nothing is computed: the call is traced with shapes alone.

    Args:
      call: calls the model.
      params: what it is called with.
      flat: the same, {path: leaf}.

    Raises:
      UsageError: `call` is no function, fails, or runs nothing that has a kernel; or shapes do not tell which axis of a
        kernel a scan runs over.
    """
    if not callable(call):
        raise UsageError(
            f"call {shown(call)} cannot be used: expected a function such as lambda params: model.apply({{'params': params}}, x)"
        )
    found: dict[str, Kernel] = {}
    inner: dict[str, tuple[int, ...]] = {}

    def intercept(next_fun, args, kwargs, context):
        module = context.module
        outputs = next_fun(*args, **kwargs)
        if module.scope is not None:
            path = "/".join(module.path)
            own = module.variables.get("params", {}).items()
            inner.update(
                {f"{path}/{name}".lstrip("/"): tuple(leaf.shape) for name, leaf in own if hasattr(leaf, "shape")}
            )
            if leaf_name(module):
                found.setdefault(path, kernel_of(module, args, kwargs))
        return outputs

    with nn.intercept_methods(intercept):
        try:
            jax.eval_shape(lambda params: call(params), params)  # a function of its own, so that no old trace is used
        except UsageError:
            raise
        except Exception as error:
            raise UsageError(f"the model cannot be called to find its sites: {reason(error)}") from error
    if not found:
        raise UsageError("the call ran no Linen module with a kernel; pass a plain function, not a jitted one")
    shapes = {path: (tuple(flat[path].shape), shape) for path, shape in inner.items() if path in flat}
    return {
        path: replace(kernel, axes=_stacked(leaf, shapes))
        for path, kernel in found.items()
        if (leaf := next((leaf for name in LEAVES if (leaf := f"{path}/{name}") in shapes), None))
    }


def _stacked(leaf: str, shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]) -> tuple[int, ...]:
    """Return the axes over which scans slice a leaf.

    Where its shape leaves several, because the layers are as many as a kernel has rows, the other leaves of its module decide,
    then those of the modules around it: a scan has one axis for all.

    Args:
      leaf: its path.
      shapes: {leaf: (shape as stored, shape within the call)}.
    """
    stored, within = shapes[leaf]
    extra = len(stored) - len(within)
    counted = lambda signed: {tuple(sorted(a % len(stored) for a in axes)) for axes in signed}  # noqa: E731
    possible = _possible(stored, within)
    folder = leaf
    while len(counted(possible)) > 1 and folder:
        folder = folder.rpartition("/")[0]
        for path, (outer, inner) in shapes.items():
            if path.startswith(f"{folder}/" if folder else "") and len(outer) - len(inner) == extra:
                possible = (possible & _possible(outer, inner)) or possible
    # An axis is usually counted from the front. If this is wrong, the scan itself refuses the adapters: their sizes differ.
    axes = counted({axes for axes in possible if min(axes, default=0) >= 0} or possible)
    if len(axes) != 1:
        raise UsageError(
            f"{shown(leaf)} of shape {stored} is {within} within a layer, which does not tell the axis of the scan; give the "
            f"scan a length that is no width of the model"
        )
    return axes.pop()


def _possible(stored: tuple[int, ...], within: tuple[int, ...]) -> set[tuple[int, ...]]:
    """Return all sets of axes without which a shape is another; each axis counted from the front, and from the back."""
    axes, count = range(len(stored)), len(stored) - len(within)
    left = [c for c in combinations(axes, max(count, 0)) if tuple(stored[a] for a in axes if a not in c) == within]
    return {signed for c in left for signed in (c, tuple(a - len(stored) for a in c))}
