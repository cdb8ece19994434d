"""From the command line to the settings of a run: common flags in groups, and those of the method that it names."""

from __future__ import annotations

import dataclasses
import shutil
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from experiments.presets import PRESETS
from experiments.run import settings_file
from experiments.run.cli import parse_into
from experiments.run.config import RunConfig, offered, owner
from experiments.run.fields import COMMON, DEFAULTS, Common
from experiments.run.settings import Flag, flag_text, flags, named, not_its_own, owners, parts, words
from experiments.tasks import PROGRAMS, TASKS
from jaxprune.checks import one_of
from jaxprune.errors import UsageError, shown
from jaxprune.methods import DEFAULT, METHODS, Entry


def parse_run(arguments: Sequence[str], program: str) -> RunConfig:
    """Read the flags of a run, those of the YAML file that `--config` names too.

    Raises:
      UsageError: a flag is not known, or not of this method, or its value cannot be read; one line.
    """
    path = _value(arguments, "config")
    from_file = {} if path is None else settings_file.read(path)
    method = _value(arguments, "method")
    method = one_of("--method", from_file.get("method", DEFAULT) if method is None else method, sorted(METHODS))
    entry = METHODS[method]
    added = [] if path is None else settings_file.flags(path, from_file, entry, given(arguments))
    for name in dict.fromkeys(given(arguments)):
        if name not in COMMON and name not in named(entry) and owners(name):
            raise UsageError(not_its_own(entry, name))
    whole = [*added, *arguments]
    for name in given(whole):
        if name in COMMON and name not in offered(program):
            raise UsageError(f"{flag_text(name)} is a flag of {owner(name)}, not of {program}")
    about = _description(list_methods="method" not in given(whole))
    try:
        parsed = parse_into(_flags_type(entry, program), whole, program, description=about)
    except UsageError as error:
        if not added:
            raise
        raise UsageError(f"{error}; with {shown(path)} these flags were added: {shown(' '.join(added))}") from None
    return _config(entry, parsed, set(given(whole)), program if program in PROGRAMS else None)


def given(arguments: Sequence[str]) -> list[str]:
    """Name the flags that a command line has, as settings are named."""
    return [_name(argument) for argument in arguments if argument.startswith("--") and len(argument) > 2]


def chunks(arguments: Sequence[str]) -> list[list[str]]:
    """Cut a command line into flags with their values."""
    found: list[list[str]] = []
    for argument in arguments:
        if argument.startswith("--") or not found:
            found.append([])
        found[-1].append(argument)
    return found


def name_of(chunk: Sequence[str]) -> str:
    """Return the setting that a flag with its values is of."""
    return _name(chunk[0])


def _name(flag: str) -> str:
    name = flag.removeprefix("--").partition("=")[0].replace("-", "_")
    off = name.removeprefix("no_")
    return off if off != name and (off in COMMON or owners(off)) else name


def _value(arguments: Sequence[str], name: str) -> str | None:
    """Return what stands behind a flag; of several the last."""
    found = None
    for argument, after in zip(arguments, [*arguments, None][1:], strict=True):
        if argument.startswith("--") and _name(argument) == name:
            found = argument.partition("=")[2] if "=" in argument else after
    return None if found is None or (found.startswith("--") and name != "config") else found


# The type that tyro parses into


def _flags_type(entry: Entry, program: str) -> type:
    """Make a dataclass of dataclasses, one a group of flags; a program that runs those of others has all of them."""
    groups: dict[str, list[tuple[str, Any, Any]]] = {}
    kinds = get_type_hints(Common, include_extras=True)
    for name in offered(program):
        field = COMMON[name]
        default = field.default if isinstance(field.default, bool) else None
        if name == "train_head":
            default = True
        kind = _parsed_as(kinds[name], default, _common_help(name, entry, program), field.metadata["metavar"])
        empty = () if name == "set" else field.default if name in ("method", "seed") else default
        groups.setdefault(field.metadata["group"], []).append((name, kind, empty))
    for flag in flags(entry).values():
        default = bool(flag.default) if bool in parts(flag.kind) else None
        kind = _parsed_as(flag.kind, default, flag.help, "", flag.aliases)
        groups.setdefault(entry.name, []).append((flag.name, kind, default))
    made = []
    for group, fields in groups.items():
        inner = dataclasses.make_dataclass(
            group, [(n, kind, dataclasses.field(default=d)) for n, kind, d in fields], frozen=True
        )
        inner.__doc__ = f"{entry.summary} ({entry.paper})." if group == entry.name else ""
        made.append((group, inner, dataclasses.field(default_factory=inner)))
    return dataclasses.make_dataclass("Flags", made, frozen=True)


def _parsed_as(kind: Any, default: Any, text: str, metavar: str, aliases: Sequence[str] = ()) -> Any:
    """Return a type that tyro can parse: None where nothing is said, checked later against the whole of `kind`."""
    known = parts(kind)
    notes: list[Any] = []
    if default is not None:
        made: Any = bool
    elif Path in known:
        made, notes = Path | None, [FOLDER]
    elif sequence := next(
        (part for part in known if get_origin(part) is not None and part not in _literals(known)), None
    ):
        items = [parts(item)[0] for item in get_args(sequence) if item is not ...]
        one = _METAVARS[items[0]]
        if get_origin(sequence) is tuple and ... not in get_args(sequence):
            made, metavar = tuple[tuple(items)] | None, metavar or " ".join([one] * len(items))
        else:
            made, metavar = tuple[items[0], ...] | None, f"{metavar or one} [{metavar or one} ...]"
    elif literal := _literals(known):
        made, metavar = str | None, f"{{{','.join(get_args(literal[0]))}}}"
    else:
        made = known[0] | None
        metavar = metavar or (f"{{{','.join(words(kind))}}}" if words(kind) else _METAVARS[known[0]])
    about = tyro.conf.arg(
        help=text,
        help_behavior_hint="",
        metavar=None if made is bool else metavar,
        aliases=[flag_text(a) for a in aliases],
    )
    return Annotated[made, about, *notes]


def _literals(known: Sequence[Any]) -> list[Any]:
    return [part for part in known if get_origin(part) is Literal]


_METAVARS = {int: "INT", float: "FLOAT", str: "NAME"}


def _path(texts: list[str]) -> Path:
    if not texts[0]:
        raise ValueError("an empty text is no folder")  # Path("") would be the working folder
    return Path(texts[0])


FOLDER = PrimitiveConstructorSpec(
    nargs=1,
    metavar="DIR",
    instance_from_str=_path,
    is_instance=lambda value: value is None or isinstance(value, Path),
    str_from_instance=lambda value: [str(value)],
)


def _config(entry: Entry, parsed: Any, said: set[str], program: str | None) -> RunConfig:
    """Take what was parsed out of its groups; a flag that is on or off counts where it stands on the command line."""
    values = {name: value for group in vars(parsed).values() for name, value in vars(group).items()}
    known = flags(entry)
    common = {name: values[name] for name in COMMON if name in values}
    if "train_head" not in said:
        common["train_head"] = None
    settings = {}
    for name, flag in known.items():
        value = values[name]
        if value is not None and (not isinstance(value, bool) or said & {name, *flag.aliases}):
            settings[flag.setting] = _as_text_or_list(flag, value)
    return RunConfig(**{**common, "config": None}, settings=settings, program=program)


def _as_text_or_list(flag: Flag, value: Any) -> Any:
    """Return one word for a setting that may be a known word or a list."""
    if isinstance(value, tuple) and len(value) == 1 and value[0] in words(flag.kind):
        return value[0]
    return value


# Help


def _common_help(name: str, entry: Entry, program: str) -> str:
    """Return what `--help` says of a common flag, with what stands where it is not given."""
    text, own = COMMON[name].metadata["help"], PROGRAMS.get(program)
    first = own or next(iter(PROGRAMS.values()))
    default = {**DEFAULTS, **first.defaults, **entry.defaults}.get(name)
    named = {"method": entry.name, "model": first.model, "task": first.task, "seed": COMMON["seed"].default}
    default = named.get(name, default)
    if name == "task":
        text = f"{text}: {', '.join(task for task in TASKS if own is None or TASKS[task].program == program)}"
    if name == "preset":
        text = f"{text}: {', '.join(PRESETS)}"
    if isinstance(default, bool):
        default = "on" if default else "off"
    return text if default is None else f"{text} [{default}]"


def _description(*, list_methods: bool) -> str:
    """Say what the command does, and list the methods where none is named."""
    width = max(40, shutil.get_terminal_size().columns - 2)
    about = [
        "Fine-tune a pretrained model and let the method decide where rank is worth its cost. A flag wins over --config and "
        "--preset, and these over what stands in brackets."
    ]
    methods = []
    if list_methods:
        about.append(f"--method NAME --help shows the settings of a method; those at the end are of {DEFAULT}.")
        methods = [f"{name:<12} {METHODS[name].summary}" for name in sorted(METHODS)]
    text = [textwrap.fill(line, width) for line in about]
    text += [textwrap.fill(line, width, subsequent_indent=" " * 13) for line in methods]
    # Of lines that do not begin with a space tyro makes one.
    return textwrap.indent("\n\n".join(["\n".join(text[: len(about)]), "\n".join(text[len(about) :])]), " ").rstrip()
