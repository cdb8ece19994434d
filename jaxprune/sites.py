"""Sites: the matrices of a model that an adapter can attach to."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.tree_util import all_leaves, keystr, tree_map_with_path

from jaxprune.errors import UsageError, nearest, shown
from jaxprune.kernels import LEAVES, Kernel, traced

# Output heads and poolers are small, task-specific and trained whole: `all-linear` leaves them out, as PEFT does.
DEFAULT_EXCLUDE = r"(^|/)(head|classifier|pre_classifier|pooler|lm_head|score)(/|$)"

# The order in which a transformer layer runs its kernels, so that tables and pictures read in that order; others follow.
_ORDER = "query q_proj key k_proj value v_proj out o_proj out_proj fc1 gate_proj up_proj wi fc2 down_proj wo".split()


Index = tuple[int | None, ...]

# Layers 4 to 11 of a stack, where it is stored in several parts.
_GROUP = re.compile(r"\[([0-9]{1,9}):([0-9]{1,9})\](?=/|$)")


@dataclass(frozen=True)
class Site:
    """A matrix an adapter can attach to.

    Attributes:
      path: the module's path in the parameter tree, joined by `/`, without the trailing `kernel`; of a layer that a scan
        stacks with others, the index into the stacked kernel comes after it, as NumPy writes it: `layers/fc1[3]`, or
        `layers/fc1[:,3]` where the scan runs over axis 1.
      d_in: input features of the kernel.
      d_out: output features of the kernel.
      layer: depth of the layer it belongs to, in the order of the forward pass; 0 where it belongs to none.
      type: its role, shared by the same kernel of every layer: the end of the path (`query`, `fc1`, ...).
    """

    path: str
    d_in: int
    d_out: int
    layer: int
    type: str

    def __repr__(self) -> str:
        return f"Site({shown(self.path)}, {self.d_in} -> {self.d_out}, layer {self.layer}, type {shown(self.type)})"

    @property
    def module(self) -> str:
        """The path without an index."""
        return split(self.path)[0]

    @property
    def index(self) -> Index:
        """The index into a stacked kernel, `()` for a kernel by itself; None stands for a whole axis."""
        return split(self.path)[1]

    def cost(self, rank: int = 1) -> int:
        """Count the LoRA parameters at this site: rank * (d_in + d_out)."""
        return rank * (self.d_in + self.d_out)


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
    call: Callable[[Any], Any] | None = None,
    scan_axis: int | None = None,
) -> tuple[Site, ...]:
    """Find the sites that `targets` selects, ordered by depth.

        find_sites(params, call=lambda params: model.apply({"params": params}, x))

    With a call, which is traced and not run, the sites are the matrices that the model multiplies by (see
    `jaxprune.kernels.kernel_of`), and only those that `attach` reaches. Without one they are read from shapes and names: a
    kernel of two axes is a matrix (d_in, d_out).

    Args:
      params: nested dict of arrays or `ShapeDtypeStruct`s; every leaf named `kernel` with two axes or more is a candidate,
        and one named `embedding` for targets that name it.
      targets: `"all-linear"`, a sequence of path suffixes (`["query", "mlp/fc1"]`), or one regular expression that
        must match a whole path.
      exclude: regular expression of paths that `all-linear` leaves out.
      call: `call(params)` calls the Linen model; needed where a kernel has more than two axes, as under `nn.scan`, in attention,
        convolutions and `nn.DenseGeneral`.
      scan_axis: for a model that cannot be traced so, such as a plain function: the axis along which kernels of three axes are
        layers of a scan.

    Raises:
      UsageError: a pattern matches no kernel; the message lists the nearest site names; or what it matches cannot be reached,
        or is no matrix.

    Returns:
      The sites by depth, within a layer in the order of a forward pass where the names tell it.
    """
    flat = flatten(params)
    leaves = {path: _leaf_of(flat, path) for path in dict.fromkeys(p.rpartition("/")[0] for p in flat)}
    kernels = {p: flat[leaf] for p, leaf in leaves.items() if leaf is not None and len(flat[leaf].shape) >= 2}
    linear = [p for p in kernels if str(leaves[p]).endswith("kernel")]
    if not kernels:
        raise UsageError("the parameter tree has no leaf named 'kernel' with two or more axes, so nothing to adapt")
    seen = None if call is None else traced(call, params, flat)
    # {site: its module}: one for every layer where a scan stacks them.
    owners = {
        _site(p, index): p
        for p, kernel in kernels.items()
        for index in indices(kernel.shape, _axes(p, kernel.shape, seen, scan_axis))
    }
    if isinstance(targets, str) and targets == "all-linear":
        excluded = expression("exclude", exclude)
        chosen = {site for site, p in owners.items() if p in linear and not excluded.search(p)}
        if seen is not None:  # what nobody named and attaching does not reach is left out
            chosen = {site for site in chosen if owners[site] in seen and not seen[owners[site]].fault}
        if not chosen:
            raise UsageError(f"all-linear leaves out every kernel, such as {next(iter(kernels))!r}; name the targets")
    elif isinstance(targets, str):
        pattern = expression("target", targets)
        chosen = {site for site in owners if pattern.fullmatch(split(site)[0]) or pattern.fullmatch(site)}
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
            matched = {s for s in owners if s == suffix or f"/{split(s)[0]}".endswith("/" + suffix)}
            _require_match(suffix, matched, kernels)
            chosen |= matched
    wrong = [
        p
        for p in {owners[site] for site in chosen}
        if 0 in kernels[p].shape or not jnp.issubdtype(kernels[p].dtype, jnp.floating)
    ]
    if wrong:
        kernel = kernels[min(wrong)]
        raise UsageError(
            f"kernel {shown(min(wrong))} is {kernel.dtype} of shape {tuple(kernel.shape)}, and adapters need floating-point "
            f"numbers and no empty axis; leave it out of the targets"
        )
    sizes = {site: _matrix(p, site, tuple(kernels[p].shape), seen) for site, p in owners.items() if site in chosen}
    place = {name: i for i, name in enumerate(_ORDER)}
    depths = _depths(owners, [ungrouped(path)[0] for path in seen or ()])
    sites = (Site(path, d_in, d_out, depths[path], _Name.of(path).type) for path, (d_in, d_out) in sizes.items())
    return tuple(sorted(sites, key=lambda s: (s.layer, place.get(s.type, len(place)), _natural(s.path))))


def split(path: str) -> tuple[str, Index]:
    """Split a site's path into its module's and the index into a stacked kernel: `a/b[:,3]` into `a/b` and (None, 3)."""
    if not (found := re.fullmatch(r"(.+)\[((?:(?::|[0-9]+),)*[0-9]+)\]", path, re.DOTALL)):
        return path, ()
    return found[1], tuple(None if part == ":" else int(part) for part in found[2].split(","))


def joined(module: str, index: Index) -> str:
    """Write a site's path: what `split` splits."""
    return f"{module}[{','.join(':' if i is None else str(i) for i in index)}]" if index else module


def leaf_at(flat: Mapping[str, Any], path: str) -> tuple[str, Index] | None:
    """Return the path of the leaf that holds a site's matrix, and the index into it; None where there is none."""
    module, index = split(path)
    if not (leaf := _leaf_of(flat, module)) and len(index) == 1:
        module, start = _group(flat, module, index[0] or 0)
        leaf, index = _leaf_of(flat, module), ((index[0] or 0) - start,)
    inside = (
        leaf is not None
        and len(index) <= len(shape := flat[leaf].shape)
        and all(i is None or i < size for i, size in zip(index, shape, strict=False))
    )
    return (leaf, index) if leaf and inside else None


def _leaf_of(flat: Mapping[str, Any], module: str) -> str | None:
    return next((leaf for name in LEAVES if (leaf := f"{module}/{name}") in flat), None)


def _group(flat: Mapping[str, Any], module: str, layer: int) -> tuple[str, int]:
    """Return the module that stores a layer of a stack that lies in several groups, and the group's first layer."""
    for path in flat:
        stored = path.rpartition("/")[0]
        whole, start = ungrouped(stored)
        if whole == module and (stop := _GROUP.search(stored)) and start <= layer < int(stop[2]):
            return stored, start
    return module, 0


def ungrouped(module: str) -> tuple[str, int]:
    """Return the name that a module has where its layers lie in one stack, and the first layer of its own.

    `layers[4:12]/fc1` is `layers/fc1` from layer 4 on: how layers are stored changes no site's name.
    """
    found = _GROUP.search(module)
    return (module[: found.start()] + module[found.end() :], int(found[1])) if found else (module, 0)


def layer_of(kernel: Any, index: Index) -> Any:
    """Return the kernel at an index of a stacked one."""
    return kernel[tuple(slice(None) if i is None else i for i in index)] if index else kernel


def with_layers(kernel: Any, layers: Mapping[Index, Any]) -> Any:
    """Return a stacked kernel with the kernels of some of its layers replaced."""
    if () in layers:
        return layers[()]
    axes = stacked_axes(next(iter(layers)))
    every = [layers[i] if i in layers else layer_of(kernel, i) for i in indices(kernel.shape, axes)]
    stack = jnp.stack(every).reshape(*(kernel.shape[axis] for axis in axes), *every[0].shape)
    return jnp.moveaxis(stack, range(len(axes)), axes).astype(kernel.dtype)


def stacked_axes(index: Index) -> tuple[int, ...]:
    """Return the axes of a stacked kernel that an index counts along."""
    return tuple(axis for axis, i in enumerate(index) if i is not None)


def indices(shape: tuple[int, ...], axes: Sequence[int]) -> Iterator[Index]:
    """Give the index of every layer of a kernel that is stacked along some axes; one empty index without any."""
    for place in np.ndindex(*(shape[axis] for axis in axes)):
        at = dict(zip(axes, place, strict=True))
        yield tuple(at.get(axis) for axis in range(max(axes, default=-1) + 1))


def _axes(
    path: str, shape: tuple[int, ...], seen: Mapping[str, Kernel] | None, scan_axis: int | None
) -> tuple[int, ...]:
    """Return the axes along which a scan stacks a kernel."""
    if seen is not None:
        return seen[path].axes if path in seen else ()
    return () if scan_axis is None or len(shape) != 3 else (scan_axis % 3,)


def _site(module: str, index: Index) -> str:
    """Name a site by the layer's number in the whole stack, however that is stored."""
    whole, start = ungrouped(module)
    return joined(whole, tuple(i if i is None else i + start for i in index))


def _matrix(path: str, site: str, shape: tuple[int, ...], seen: Mapping[str, Kernel] | None) -> tuple[int, int]:
    """Return (d_in, d_out) of a kernel."""
    index = split(site)[1]
    if seen is None:
        own = tuple(size for axis, size in enumerate(shape) if axis not in stacked_axes(index))
        if len(own) != 2:
            raise UsageError(
                f"kernel {shown(path)} has the shape {shape}, which does not tell its matrix; pass "
                f"call=lambda params: model.apply({{'params': params}}, x), or for layers of a scan in a plain function scan_axis"
            )
        return own[0], own[1]
    kernel = seen.get(path)
    fault = "the call does not use it" if kernel is None else kernel.fault
    if kernel is None or fault:
        raise UsageError(f"no adapter reaches {shown(path)}: {fault}; leave it out of the targets")
    return kernel.d_in, kernel.d_out


def site_at(path: str, d_in: int, d_out: int) -> Site:
    """Make the site of a kernel, its layer and type read from its path alone."""
    name = _Name.of(path)
    return Site(path, d_in, d_out, name.number or 0, name.type)


class _Name(NamedTuple):
    """What a path says: the module that holds the layers, the layer's number (the first in the path) and the type.

    `layer_0/fc1` and `layer_0_fc1` say the same. A number at the end of the kernel's own name is no layer's. Layers that a
    scan stacks are numbered by their index, those of a numbered module within it.
    """

    tower: str
    number: int | None
    type: str
    index: Index = ()

    @classmethod
    def of(cls, path: str) -> _Name:
        module, index = split(path)
        named = cls._of(module)
        if not index:
            return named
        if named.number is not None:
            return named._replace(index=index)
        parts = module.split("/")[:-1]
        coder = next((i for i, part in enumerate(parts) if "coder" in part), 0)
        return cls("/".join(parts[: coder + 1]), 0, named.type, index)

    @classmethod
    def _of(cls, path: str) -> _Name:
        parents, _, name = path.rpartition("/")
        if number := re.search(r"(?<![0-9])[0-9]{1,9}(?![0-9])", parents):  # no model has 10^9 layers
            return cls(parents[: number.start()].rpartition("/")[0], int(number[0]), name)
        if own := re.fullmatch(r"[^0-9]*([0-9]{1,9})[_.-]([A-Za-z].*)", name):
            return cls(parents, int(own[1]), own[2])
        return cls(parents, None, name)


def _depths(paths: Iterable[str], order: Sequence[str]) -> dict[str, int]:
    """Return the depth of each site: its layer's number, counted on from the towers of layers that run before its own.

    Args:
      paths: of the sites; one outside any numbered layer lies at 0.
      order: paths of modules in the order in which they run, as far as that is known; otherwise an encoder runs first.
    """
    numbers: dict[str, dict[str, tuple[int, Index]]] = {}
    for path in paths:
        if (name := _Name.of(path)).number is not None:
            places = tuple(
                i for i in name.index if i is not None
            )  # kernels of one scan may be stacked along other axes
            numbers.setdefault(name.tower, {})[path] = (name.number, places)
    ran = {path: i for i, path in enumerate(order)}
    first = {tower: min(ran.get(split(path)[0], len(ran)) for path in own) for tower, own in numbers.items()}
    depths, start = dict.fromkeys(paths, 0), 0
    for tower in sorted(numbers, key=lambda t: (first[t], "decoder" in t, _natural(t))):
        at, extra = {}, 0
        for number, layers in groupby(sorted(set(numbers[tower].values())), key=lambda key: key[0]):
            at.update({key: number + extra + i for i, key in enumerate(layers)})
            extra = max(at.values()) - number
        depths.update({path: start + at[key] for path, key in numbers[tower].items()})
        start += max(at.values()) + 1
    return depths


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
