"""Sites: the kernels of a parameter tree that an adapter can attach to, found from shapes alone."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax.tree_util import all_leaves, keystr, tree_map_with_path

from jaxprune.errors import UsageError, nearest, shown

# Output heads and poolers are small, task-specific and trained whole: `all-linear` leaves them out, as PEFT does.
DEFAULT_EXCLUDE = r"(^|/)(head|classifier|pre_classifier|pooler|lm_head|score)(/|$)"

# The order in which a transformer layer runs its kernels, so that tables and pictures read in that order; others follow.
_ORDER = "query q_proj key k_proj value v_proj out o_proj out_proj fc1 gate_proj up_proj wi fc2 down_proj wo".split()


@dataclass(frozen=True)
class Site:
    """A kernel an adapter can attach to.

    Attributes:
      path: the module's path in the parameter tree, joined by `/`, without the trailing `kernel`.
      d_in: input features of the kernel.
      d_out: output features of the kernel.
      layer: index of the layer it belongs to (the first number among its parents' names), 0 where there is none.
      type: its role, shared by the same kernel of every layer: the last part of the path (`query`, `fc1`, ...).
      stack: leading axes of a kernel stacked by `nn.scan`, `()` for an ordinary one.
    """

    path: str
    d_in: int
    d_out: int
    layer: int
    type: str
    stack: tuple[int, ...] = ()

    def cost(self, rank: int = 1) -> int:
        """Count the LoRA parameters at this site: rank * (d_in + d_out), times the stacked layers."""
        return rank * (self.d_in + self.d_out) * math.prod(self.stack)


def flatten(params: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten a parameter tree into {path joined by '/': leaf}; sub-trees without a leaf are left out.

    Raises:
      UsageError: this is no tree of nested dicts whose keys are texts without '/' and whose leaves are arrays.
    """
    if not _is_tree(params):
        raise UsageError(
            f"the parameters are {_kind(params)}; expected nested dicts of arrays: model.init(...)['params'], or of an nnx state "
            f"nnx.to_pure_dict(state)"
        )
    if _is_tree(params.get("params")):
        raise UsageError(
            "the parameters have the key 'params' at their top, as all variables of a model have; pass variables['params']"
        )
    return _flatten(params, "")


def _flatten(tree: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if not isinstance(key, str) or not key or "/" in key:
            at = f" below {shown(prefix[:-1])}" if prefix else ""
            raise UsageError(f"the parameters have the key {shown(key)}{at}; expected text, not empty and without '/'")
        path = prefix + key
        if _is_tree(value):
            flat.update(_flatten(value, path + "/"))
        elif hasattr(value, "shape") and hasattr(value, "dtype"):
            flat[path] = value
        else:
            raise UsageError(
                f"the parameters hold {_kind(value)} at {shown(path)}; expected an array or a dict of arrays"
            )
    return flat


def _is_tree(value: Any) -> bool:
    # Only mappings that JAX looks into: any other is one leaf to it. The leaves of an nnx state are no arrays.
    return isinstance(value, Mapping) and not all_leaves([value]) and not hasattr(value, "to_pure_dict")


def _kind(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


def with_leaves(params: Mapping[str, Any], flat: Mapping[str, Any]) -> Any:
    """Return the parameter tree with the leaves of `flat`; its structure stays, empty sub-trees and kinds of dicts too."""
    return tree_map_with_path(lambda path, _: flat[keystr(path, simple=True, separator="/")], params)


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Nest {path joined by '/': leaf} into a tree of dicts."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
        node[name] = leaf
    return tree


def _natural(path: str) -> list[Any]:
    # Numbers compare by length, then by digits: as integers do, of whatever length.
    parts = ((t.lstrip("0"), t) for t in re.split(r"([0-9]+)", path))
    return [(1, len(n), n) if t[:1].isdecimal() and t.isascii() else (0, 0, t) for n, t in parts]


def find_sites(
    params: Mapping[str, Any],
    targets: str | Sequence[str] = "all-linear",
    *,
    exclude: str = DEFAULT_EXCLUDE,
) -> tuple[Site, ...]:
    """Find the sites that `targets` selects, ordered by layer.

    Args:
      params: nested dict of arrays or `ShapeDtypeStruct`s; every leaf named `kernel` with two axes (d_in, d_out), or
        more when layers are stacked on leading axes by `nn.scan`, is a candidate.
      targets: `"all-linear"`, a sequence of path suffixes (`["query", "mlp/fc1"]`), or one regular expression that
        must match a whole path.
      exclude: regular expression of paths that `all-linear` leaves out.

    Raises:
      UsageError: a pattern matches no kernel; the message lists the nearest site names.

    Returns:
      The sites in layer order, within a layer in the order of a forward pass where the names tell it.
    """
    kernels = {p.removesuffix("/kernel"): v for p, v in flatten(params).items() if p.endswith("/kernel")}
    kernels = {p: v for p, v in kernels.items() if len(v.shape) >= 2}
    if not kernels:
        raise UsageError("the parameter tree has no leaf named 'kernel' with two or more axes, so nothing to adapt")
    if isinstance(targets, str) and targets == "all-linear":
        excluded = expression("exclude", exclude)
        chosen = {p for p in kernels if not excluded.search(p)}
        if not chosen:
            raise UsageError(f"all-linear leaves out every kernel, such as {next(iter(kernels))!r}; name the targets")
    elif isinstance(targets, str):
        pattern = expression("target", targets)
        chosen = {p for p in kernels if pattern.fullmatch(p)}
        _require_match(targets, chosen, kernels)
    else:
        suffixes = list(targets) if isinstance(targets, Iterable) else []
        if not suffixes or not all(isinstance(suffix, str) for suffix in suffixes):
            raise UsageError(
                f"targets {shown(targets)} cannot be used: expected 'all-linear', a list of path suffixes such as ['query'], or "
                f"a regular expression"
            )
        chosen = set()
        for suffix in suffixes:
            matched = {p for p in kernels if p == suffix or p.endswith("/" + suffix)}
            _require_match(suffix, matched, kernels)
            chosen |= matched
    wrong = [p for p in chosen if 0 in kernels[p].shape or not jnp.issubdtype(kernels[p].dtype, jnp.floating)]
    if wrong:
        kernel = kernels[min(wrong)]
        raise UsageError(
            f"kernel {shown(min(wrong))} is {kernel.dtype} of shape {tuple(kernel.shape)}, and adapters need floating-point "
            f"numbers and no empty axis; leave it out of the targets"
        )
    sites = []
    for path in chosen:
        *stack, d_in, d_out = kernels[path].shape
        sites.append(site_at(path, d_in, d_out, tuple(stack)))
    place = {name: i for i, name in enumerate(_ORDER)}
    return tuple(sorted(sites, key=lambda s: (s.layer, place.get(s.type, len(place)), _natural(s.path))))


def site_at(path: str, d_in: int, d_out: int, stack: tuple[int, ...] = ()) -> Site:
    """Make the site of a kernel, its layer and type read from its path."""
    parents, _, name = path.rpartition("/")
    number = re.search(r"(?<![0-9])[0-9]{1,9}(?![0-9])", parents)  # no model has 10^9 layers
    return Site(path, d_in, d_out, int(number[0]) if number else 0, name, stack)


def expression(what: str, pattern: str) -> re.Pattern[str]:
    """Compile a regular expression that a user gave; what is none is a UsageError."""
    if not isinstance(pattern, str):
        raise UsageError(f"{what} {shown(pattern)} is not a regular expression: expected text")
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise UsageError(f"{what} {shown(pattern)} is not a regular expression: {error}") from None


def _require_match(pattern: str, matched: set[str], kernels: Mapping[str, Any]) -> None:
    if not matched:
        names = set(kernels) | {p.rsplit("/", 1)[-1] for p in kernels}
        raise UsageError(
            f"target {shown(pattern)} matches no kernel; expected 'all-linear', path suffixes or a regular expression "
            f"matching a whole path; nearest names: {nearest(pattern, names)}"
        )
