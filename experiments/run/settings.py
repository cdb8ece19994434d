"""Settings of a method beyond the flags: `--set NAME=VALUE`."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_origin, get_type_hints

from jaxprune import methods
from jaxprune.checks import check
from jaxprune.errors import UsageError, nearest, shown

# What is so because of the run and the model, whatever anyone wants.
_FIXED = ("total_steps", "heads")


@functools.cache
def kinds(method: str) -> Mapping[str, Any]:
    """Return {name: annotation} of the settings that a method's factory takes."""
    found = get_type_hints(getattr(methods, method), include_extras=True)
    return {name: kind for name, kind in found.items() if name != "return"}


def further(method: str, items: Sequence[str]) -> dict[str, Any]:
    """Read NAME=VALUE texts for a method; a value is JSON where it can be, else text. Of two for one name the later counts.

    Raises:
      UsageError: a text is not NAME=VALUE, the method has no such setting, or its value is of another type or out of range.
    """
    known = {name: kind for name, kind in kinds(method).items() if name not in _FIXED and not _is_function(kind)}
    found = {}
    for item in items:
        name, equals, text = item.partition("=")
        if not equals or name not in known:
            why = "is set by the run itself" if name in kinds(method) and equals else "is not understood"
            raise UsageError(
                f"--set {shown(item)} {why}; expected NAME=VALUE with a setting of {method}: "
                f"{', '.join(known) or 'it has none'}; nearest: {nearest(name[:100], known, 1)}"
            )
        found[name] = check(f"--set {name}:", _value(text), known[name])
    return found


def check_once(items: Sequence[str]) -> None:
    """Refuse two values for one setting."""
    names = [item.partition("=")[0] for item in items]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise UsageError(f"--set gives {shown(twice[0])} {names.count(twice[0])} times; give each setting once")


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # no JSON, or too long or too deep for any setting
        return text


def _is_function(kind: Any) -> bool:
    return get_origin(kind) is Callable
