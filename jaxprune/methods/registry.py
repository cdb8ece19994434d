"""Every method is registered once, by the decorator above its factory; the command line, tables and presets read it here.

A factory takes its settings as keywords. What it says of them is all there is: types and ranges in the annotations, defaults in
the signature, help under `Args:` of the docstring, and a summary in the docstring's first sentence. A factory that continues
another method takes that method as its one positional argument.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, ParamSpec, get_type_hints

from jaxprune.checks import check_all
from jaxprune.errors import UsageError, shown
from jaxprune.methods.base import Method

P = ParamSpec("P")

REQUIRED = inspect.Parameter.empty


class Setting(NamedTuple):
    """One setting of a method.

    Attributes:
      name: the keyword of the factory.
      kind: its annotation, ranges included.
      default: what stands where it is not given; `REQUIRED` where it must be.
      help: what the docstring says of it, in one line.
      alias: another name that a command line takes for it, or an empty text.
    """

    name: str
    kind: Any
    default: Any
    help: str
    alias: str = ""


class Components(NamedTuple):
    """What one number of components, `rank`, means for a method that has no such setting, or for several of its settings.

    Attributes:
      settings: `settings(rank) -> {setting: value}`.
      default: the number whose settings are the method's defaults.
      help: what the number is.
    """

    settings: Callable[[int], dict[str, Any]]
    default: int
    help: str


@dataclass(frozen=True)
class Entry:
    """A registered method.

    Attributes:
      name: as its factory, its file and the command line call it.
      factory: makes the method from settings; checks them first.
      summary: one line.
      paper: where it comes from.
      settings: {name: setting}; of a method that continues another one, those of that one too.
      defaults: what a whole run with this method takes where nothing is said: settings, or names of the run's own settings such
        as `learning_rate`.
      components: what one number `rank` means; None where there is no such number.
      staged: whether training has two stages, which its only event divides.
      first: the method that this one continues by default; a setting that both have goes to both.
      own: names of the settings that its factory takes itself.
    """

    name: str
    factory: Callable[..., Method]
    summary: str
    paper: str
    settings: Mapping[str, Setting]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    components: Components | None = None
    staged: bool = False
    first: Entry | None = None
    own: frozenset[str] = frozenset()

    def make(self, settings: Mapping[str, Any]) -> Method:
        """Make the method; settings of the method that it continues are among `settings`."""
        if self.first is None:
            return self.factory(**settings)
        inner = {name: value for name, value in settings.items() if name in self.first.settings}
        own = {name: value for name, value in settings.items() if name in self.own}
        return self.factory(self.first.make(inner), **own)


METHODS: dict[str, Entry] = {}


def register(
    *,
    paper: str,
    defaults: Mapping[str, Any] | None = None,
    components: Components | None = None,
    aliases: Mapping[str, str] | None = None,
    staged: bool = False,
    first: Callable[..., Method] | None = None,
) -> Callable[[Callable[P, Method]], Callable[P, Method]]:
    """Register a factory under its name, and check every setting that it is given before it sees any.

    Args:
      paper: authors, year and title.
      defaults: see `Entry`.
      components: see `Entry`; a method with a setting `rank` needs none.
      aliases: {setting: another name of it on a command line}.
      staged: see `Entry`.
      first: factory of the method that this one continues where it is given none.

    Raises (by the factory):
      UsageError: a setting is of another type, or out of its range.
    """

    def decorate(factory: Callable[P, Method]) -> Callable[P, Method]:
        name = factory.__name__
        continued = METHODS[first.__name__] if first else None
        inherited = dict(continued.settings) if continued else {}
        wrapped, own = _checked(factory, aliases or {})
        meaning = components or (continued.components if continued else None)
        if meaning is None and "rank" in own:
            meaning = Components(lambda rank: {"rank": rank}, own["rank"].default, own["rank"].help)
        METHODS[name] = Entry(
            name,
            wrapped,
            _first_sentence(factory.__doc__ or ""),
            paper,
            {**own, **{name: setting for name, setting in inherited.items() if name not in own}},
            dict(defaults or {}),
            meaning,
            staged,
            continued,
            frozenset(own),
        )
        return wrapped

    return decorate


def _checked(
    factory: Callable[P, Method], aliases: Mapping[str, str]
) -> tuple[Callable[P, Method], dict[str, Setting]]:
    """Return the factory behind checks, and its settings."""
    signature, kinds = inspect.signature(factory), get_type_hints(factory, include_extras=True)
    keywords = {name: p for name, p in signature.parameters.items() if p.kind is p.KEYWORD_ONLY}

    @functools.wraps(factory)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> Method:
        bound = signature.bind(*args, **kwargs)
        for name, value in bound.arguments.items():
            if name not in keywords and value is not None and not isinstance(value, Method):
                raise UsageError(f"{name} {shown(value)} cannot be used; expected a method that a factory has made")
        given = {name: value for name, value in bound.arguments.items() if name in keywords}
        bound.arguments.update(check_all(given, kinds))
        return factory(*bound.args, **bound.kwargs)

    said = _help(factory.__doc__ or "")
    own = {
        name: Setting(name, kinds[name], p.default, said.get(name, ""), aliases.get(name, ""))
        for name, p in keywords.items()
    }
    return wrapped, own


def _first_sentence(docstring: str) -> str:
    text = _plain(docstring.strip().split("\n\n")[0])
    return re.split(r"(?<=[.:;])\s", text)[0].rstrip(".:;")


def _help(docstring: str) -> dict[str, str]:
    """Read `name: text` under `Args:`; a text goes on in lines that are indented deeper."""
    found: dict[str, str] = {}
    lines = inspect.cleandoc(docstring).splitlines()
    if "Args:" not in lines:
        return found
    name = ""
    for line in lines[lines.index("Args:") + 1 :]:
        if line and not line.startswith(" "):
            break
        if start := re.fullmatch(r" {1,4}(\w+): (.*)", line):
            name = start[1]
            found[name] = start[2]
        elif name and line.strip():
            found[name] += f" {line.strip()}"
    return {name: _plain(text) for name, text in found.items()}


def _plain(text: str) -> str:
    """Return prose without its marks, in one line."""
    return " ".join(text.replace("`", "").split())
