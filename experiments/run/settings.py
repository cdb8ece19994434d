"""A method's settings as flags: names, types, help and checks, all read from its entry in the registry."""

from __future__ import annotations

import json
import re
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, NamedTuple, Union, get_args, get_origin

from experiments.run.fields import COMMON
from jaxprune.checks import OneOf, Rank, check
from jaxprune.errors import UsageError, nearest, shown
from jaxprune.methods import METHODS, Entry
from jaxprune.methods.registry import REQUIRED

# What is so because of the run and the model, whatever anyone wants.
OF_THE_RUN = ("total_steps", "delay", "heads")
# Further names of settings that many methods have.
_ALIASES = {"dropout": ("lora_dropout",)}
RANK = "rank"


class Flag(NamedTuple):
    """A setting of a method as a flag.

    Attributes:
      name: of the flag, which differs from the setting's where every run has a setting of that name.
      setting: of the factory; `rank` where one number stands for several settings.
      kind: its type and range.
      default: what stands where it is not given.
      help: for people, with the default in brackets.
      aliases: further names of the flag.
    """

    name: str
    setting: str
    kind: Any
    default: Any
    help: str
    aliases: tuple[str, ...] = ()


def flags(entry: Entry) -> dict[str, Flag]:
    """Return {name: flag} of everything that can be set of a method."""
    found, meant = {}, {}
    meaning = entry.components
    if meaning is not None:
        default = entry.defaults.get(RANK, meaning.default)
        meant = meaning.settings(default)
        found[RANK] = Flag(RANK, RANK, Rank, default, f"{meaning.help.rstrip('.')} [{default}]")
    for name, setting in entry.settings.items():
        if name in OF_THE_RUN or name == RANK or not parts(setting.kind):
            continue
        names = [*([] if name in COMMON else [name]), *filter(None, [setting.alias]), *_ALIASES.get(name, ())]
        flag, *aliases = names or [f"{entry.name}_{name}"]
        default = meant.get(name, None if setting.default is REQUIRED else setting.default)
        found[flag] = Flag(flag, name, setting.kind, default, _with_default(setting.help, default), tuple(aliases))
    return found


def named(entry: Entry) -> dict[str, Flag]:
    """Return {name: flag} with the further names of flags too."""
    return {name: flag for flag in flags(entry).values() for name in (flag.name, *flag.aliases)}


def owners(name: str) -> list[str]:
    """Name the methods that have a flag."""
    return sorted(method for method, entry in METHODS.items() if name in named(entry))


def flag_text(name: str) -> str:
    """Return a flag as it is typed."""
    return f"--{name.replace('_', '-')}"


def not_its_own(entry: Entry, name: str) -> str:
    """Say that a method has no such setting, and who has."""
    known, others = flags(entry), owners(name)
    has = f"{', '.join(others)} {'has' if len(others) == 1 else 'have'} it" if others else "no method has it"
    own = f"nearest of its own: {nearest(name, known)}" if known else "it has none"
    return f"{flag_text(name)} is no setting of {entry.name}; {own}; {has}"


def sort(entry: Entry, values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Part values by the names of their flags into those of every run and those of the method, by setting.

    Raises:
      UsageError: neither has such a setting.
    """
    known, common, settings = named(entry), {}, {}
    for name, value in values.items():
        if name in known:
            settings[known[name].setting] = value
        elif name in COMMON:
            common[name] = value
        else:
            raise UsageError(not_its_own(entry, name))
    return common, settings


def checked(entry: Entry, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Check given settings of a method, by setting, under the names of their flags."""
    known = {flag.setting: flag for flag in flags(entry).values()}
    found = {}
    for name, value in settings.items():
        if name not in known:
            raise UsageError(not_its_own(entry, name))
        found[name] = check(flag_text(known[name].name), value, known[name].kind)
    return found


def layered(entry: Entry, layers: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Put settings over each other, the last on top; a number of components lies over all that it stands for."""
    found: dict[str, Any] = {}
    for layer in layers:
        if RANK in layer and entry.components:
            for name in entry.components.settings(layer[RANK]):
                found.pop(name, None)
        found |= layer
    return found


def complete(entry: Entry, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a value for every setting that has one: defaults, what the number of components stands for, and what is given."""
    defaults = {name: one.default for name, one in entry.settings.items() if one.default is not REQUIRED}
    meant = entry.components.settings(settings[RANK]) if entry.components and RANK in settings else {}
    own = {name: value for name, value in settings.items() if name in entry.settings}
    return {**defaults, **meant, **own}


def by_flag(entry: Entry, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings by the names of their flags."""
    names = {flag.setting: flag.name for flag in flags(entry).values()}
    return {names.get(setting, setting): value for setting, value in settings.items()}


# NAME=VALUE


def further(entry: Entry, items: Sequence[str]) -> dict[str, Any]:
    """Read NAME=VALUE texts; a value is JSON where it can be, else text.

    Raises:
      UsageError: a text is not NAME=VALUE, the method has no such setting, its value is of another type or out of range, or a
        name comes twice.
    """
    known = {flag.setting: flag for flag in flags(entry).values()}
    names = [item.partition("=")[0] for item in items]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UsageError(f"--set gives {shown(twice[0])} {names.count(twice[0])} times; give each setting once")
    found = {}
    for item in items:
        name, equals, text = item.partition("=")
        if not equals or name not in known:
            why = "is set by the run itself" if name in entry.settings and equals else "is not understood"
            raise UsageError(
                f"--set {shown(item)} {why}; expected NAME=VALUE with a setting of {entry.name}: "
                f"{', '.join(known) or 'it has none'}; nearest: {nearest(name[:100], known, 1)}"
            )
        found[name] = check(f"--set {name}:", _value(text), known[name].kind)
    return found


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # no JSON, or too long or too deep for any setting
        return text


# Types


def parts(kind: Any) -> list[Any]:
    """Return the parts of a union that a text can stand for, without their notes: no functions, and not None."""
    kind = get_args(kind)[0] if get_origin(kind) is Annotated else kind
    if get_origin(kind) in (Union, types.UnionType):
        return [one for part in get_args(kind) for one in parts(part)]
    return [] if kind is type(None) or kind is Callable or get_origin(kind) is Callable else [kind]


def words(kind: Any) -> tuple[str, ...]:
    """Return the words that a setting may be, of all parts of its type together."""
    if get_origin(kind) is Annotated:
        inner, *notes = get_args(kind)
        return tuple(word for note in notes if isinstance(note, OneOf) for word in note.known) + words(inner)
    if get_origin(kind) in (Union, types.UnionType):
        return tuple(word for part in get_args(kind) for word in words(part))
    return ()


def _with_default(text: str, default: Any) -> str:
    """Put the default in brackets; where it is none, what the text says of None."""
    text = text.rstrip(".")
    if default is None:
        return re.sub(r"[;.] None for ((?:[^.;]|\.\d)+)", r" [\1]", text)
    if isinstance(default, bool):
        default = "on" if default else "off"
    elif isinstance(default, range):
        default = f"{default[0]} to {default[-1]}"
    elif isinstance(default, tuple | list):
        default = " ".join(map(str, default))
    return f"{text} [{default}]"
