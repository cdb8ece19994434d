"""Settings as YAML: what a run writes into its folder, and what `--config FILE` reads."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from experiments.run.config import RunConfig, offered
from experiments.run.fields import COMMON, OF_ONE_RUN
from experiments.run.settings import by_flag, flag_text, named, not_its_own, owners
from experiments.run.settings import flags as method_flags
from jaxprune.errors import UsageError, nearest, reason, shown
from jaxprune.methods import Entry


def written(given: RunConfig, resolved: RunConfig) -> bytes:
    """Return the content of config.yaml: the settings that were given, and as comments what stood for the others.

    What was left open stays open, so that with another method or task beside the file its own defaults stand.

    Args:
      given: the settings of the command line.
      resolved: the same with nothing left open.
    """
    import yaml

    default, entry = RunConfig(), given.entry
    own, stood = by_flag(entry, given.settings), by_flag(entry, resolved.settings)
    values = {
        name: (getattr(given, name) != getattr(default, name), getattr(given, name), getattr(resolved, name))
        for name in offered(resolved.program or "")
        if name not in OF_ONE_RUN
    }
    for name, flag in method_flags(entry).items():
        values[name] = (name in own, own.get(name), stood.get(name, flag.default))
    lines = [
        "# Settings of a run: --config takes this file, and flags beside it win. Those with # have their defaults."
    ]
    for name, (was_given, value, otherwise) in values.items():
        value = _plain(value if was_given else otherwise)
        flow = None if isinstance(value, list) else False  # a list in one line
        line = yaml.safe_dump({name: value}, allow_unicode=True, width=10**6, default_flow_style=flow).rstrip()
        lines.append(line if was_given else "# " + line.replace("\n", "\n# "))
    return ("\n".join(lines) + "\n").encode()


def read(path: str) -> dict[Any, Any]:
    """Read a file of settings.

    Raises:
      UsageError: it cannot be read, or holds anything but settings by name.
    """
    import yaml

    try:
        said = yaml.safe_load(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UsageError(
            f"--config {shown(path)} cannot be read as YAML ({reason(error)}); name a file such as config.yaml of a run"
        ) from None
    said = {} if said is None else said
    if not isinstance(said, dict):
        raise UsageError(f"--config {shown(path)} holds {shown(said)}; expected lines such as `learning_rate: 0.001`")
    return {key.replace("-", "_") if isinstance(key, str) else key: value for key, value in said.items()}


def flags(path: str, said: Mapping[Any, Any], entry: Entry, beside: Collection[str]) -> list[str]:
    """Return the settings of a file as flags; those that the command line has itself are left out.

    Args:
      path: of the YAML file.
      said: what it holds.
      entry: of the method.
      beside: names of the settings on the command line.

    Raises:
      UsageError: one is no setting, or not of this method.
    """
    known = [name for name in (*COMMON, *named(entry)) if name not in OF_ONE_RUN]
    given = {named(entry)[name].name if name in named(entry) else name for name in beside}
    found = []
    for name, value in said.items():
        if name not in known:
            if isinstance(name, str) and owners(name):
                raise UsageError(f"--config {shown(path)}: {not_its_own(entry, name)}")
            why = "belongs to one run and goes on the command line" if name in OF_ONE_RUN else "is no setting"
            raise UsageError(f"--config {shown(path)}: {shown(name)} {why}; nearest: {nearest(str(name), known)}")
        same = named(entry)[name].name if name in named(entry) else name
        if value is not None and same not in given:
            found += _flag(path, name, value)
    return found


def _flag(path: str, name: str, value: Any) -> list[str]:
    flag = flag_text(name)
    if isinstance(value, bool):
        return [flag if value else f"--no-{flag.removeprefix('--')}"]
    several = value if isinstance(value, list) else [value]
    if any(isinstance(one, bool) or not isinstance(one, str | int | float) for one in several):
        raise UsageError(f"--config {shown(path)}: {name} is {shown(value)}; expected one value, or a list of values")
    try:
        texts = [f"{one}" for one in several]
    except ValueError:  # Python refuses to write integers of thousands of digits
        raise UsageError(f"--config {shown(path)}: {name} is {shown(value)}, which is too large; give less") from None
    if isinstance(value, list):
        return [flag, *texts] if texts else []
    return [f"{flag}={texts[0]}"]


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple | range) else value
