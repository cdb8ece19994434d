"""What a PEFT folder calls its files and tensors, and which modules of the PyTorch model its names mean."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from jaxprune.errors import UsageError, nearest, shown
from jaxprune.sites import split

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."

TorchPaths = Mapping[str, str | Sequence[str]]


def torch_name(path: str, torch_paths: TorchPaths | None) -> str:
    """Return the PyTorch module of a site."""
    if torch_paths is not None and not isinstance(torch_paths, Mapping):
        raise UsageError(
            f"torch_paths {shown(torch_paths)} cannot be used: expected {{module path: module path in PyTorch}}"
        )
    module, index = split(path)
    if index and path not in (torch_paths or ()):
        return _of_layer(path, module, tuple(i for i in index if i is not None), torch_paths or {})
    name = path.replace("/", ".") if torch_paths is None else torch_paths.get(path)
    if name is None:
        raise UsageError(f"torch_paths has no entry for {path!r}; nearest names: {nearest(path, torch_paths or ())}")
    if not isinstance(name, str):
        raise UsageError(f"torch_paths has {shown(name)} for {path!r}; expected one module path")
    return name


def _of_layer(path: str, module: str, place: tuple[int, ...], torch_paths: TorchPaths) -> str:
    """Return the PyTorch module of a layer of a scan, from the entry for all its layers."""
    entry = torch_paths.get(module)
    try:
        if isinstance(entry, str) and entry.format(*place) != entry.format(*(i + 1 for i in place)):
            return entry.format(*place)
        if isinstance(entry, Sequence) and not isinstance(entry, str) and len(place) == 1:
            name = entry[place[0]]
            if isinstance(name, str) and list(entry).count(name) == 1:
                return name
    except (LookupError, TypeError, ValueError):  # a pattern with other braces, or too short a list
        pass
    raise UsageError(
        f"site {shown(path)} is a layer of a scan, and torch_paths has {shown(entry)} for {shown(module)}; give a path of its "
        f"own for every layer, or a pattern with {{}} for the layer's number"
    )


def selects(patterns: str | Sequence[str] | None, name: str) -> bool:
    """Say whether `target_modules` or `exclude_modules` names a module: by an expression, or by the ends of its path."""
    if isinstance(patterns, str):
        return patterns != "all-linear" and re.fullmatch(patterns, name) is not None
    return any(name == pattern or name.endswith("." + pattern) for pattern in patterns or ())


def saved_whole(modules: Iterable[str], name: str) -> bool:
    """Say whether `modules_to_save` holds a module; PEFT compares the ends of names, whatever comes before."""
    return any(path.endswith(tuple(modules)) for path in ancestors(name))


def ancestors(name: str) -> list[str]:
    """Return the modules a module lies in, outermost first, and itself."""
    parts = name.split(".")
    return [".".join(parts[: i + 1]) for i in range(len(parts))]
