"""Sites: the kernels of a parameter tree that an adapter can attach to, found from shapes alone."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxprune.errors import UsageError, nearest

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


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten a nested mapping into {path joined by '/': leaf}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat.update(flatten(value, path + "/"))
        else:
            flat[path] = value
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Nest {path joined by '/': leaf} back into a tree of dicts."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
        node[name] = leaf
    return tree


def _natural(path: str) -> list[Any]:
    return [(1, int(t), "") if t.isdigit() else (0, 0, t) for t in re.split(r"(\d+)", path)]


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
    if targets == "all-linear":
        chosen = {p for p in kernels if not re.search(exclude, p)}
    elif isinstance(targets, str):
        try:
            pattern = re.compile(targets)
        except re.error as error:
            raise UsageError(f"target {targets!r} is not a regular expression: {error}") from None
        chosen = {p for p in kernels if pattern.fullmatch(p)}
        _require_match(targets, chosen, kernels)
    else:
        chosen = set()
        for suffix in targets:
            matched = {p for p in kernels if p == suffix or p.endswith("/" + suffix)}
            _require_match(suffix, matched, kernels)
            chosen |= matched
    sites = []
    for path in chosen:
        *stack, d_in, d_out = kernels[path].shape
        sites.append(site_at(path, d_in, d_out, tuple(stack)))
    place = {name: i for i, name in enumerate(_ORDER)}
    return tuple(sorted(sites, key=lambda s: (s.layer, place.get(s.type, len(place)), _natural(s.path))))


def site_at(path: str, d_in: int, d_out: int, stack: tuple[int, ...] = ()) -> Site:
    """Make the site of a kernel, its layer and type read from its path."""
    parents, _, name = path.rpartition("/")
    number = re.search(r"\d+", parents)
    return Site(path, d_in, d_out, int(number[0]) if number else 0, name, stack)


def _require_match(pattern: str, matched: set[str], kernels: Mapping[str, Any]) -> None:
    if not matched:
        names = set(kernels) | {p.rsplit("/", 1)[-1] for p in kernels}
        raise UsageError(
            f"target {pattern!r} matches no kernel; expected 'all-linear', path suffixes or a regular expression "
            f"matching a whole path; nearest names: {nearest(pattern, names)}"
        )
