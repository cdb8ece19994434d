"""Settings as YAML: what a run writes into its folder, and what `--config FILE` reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxprune.errors import UsageError, nearest, reason, shown

# Where the files go is a matter of one run alone.
_OF_ONE_RUN = ("config", "output_dir", "overwrite", "resume")


def written(given: Any, resolved: Any) -> bytes:
    """Return the content of config.yaml: the settings that were given, and as comments what stood for the others.

    What was left open stays open, so that with another method or task beside the file its own defaults stand.

    Args:
      given: the settings of the command line, a dataclass.
      resolved: the same with nothing left open.
    """
    import yaml

    default = type(given)()
    lines = [
        "# Settings of a run: --config takes this file, and flags beside it win. Those with # have their defaults."
    ]
    for field in dataclasses.fields(given):
        if field.name in _OF_ONE_RUN:
            continue
        own, stood = getattr(given, field.name), getattr(resolved, field.name)
        named = own != getattr(default, field.name)
        value = _plain(own if named else stood)
        line = yaml.safe_dump({field.name: value}, allow_unicode=True, width=10**6).rstrip()
        lines.append(line if named else "# " + line.replace("\n", "\n# "))
    return ("\n".join(lines) + "\n").encode()


def flags(path: str, config: type, beside: Sequence[str]) -> list[str]:
    """Return the settings of a file as flags; those that the command line has itself are left out.

    Args:
      path: of the YAML file.
      config: the dataclass of all settings.
      beside: the flags of the command line.

    Raises:
      UsageError: the file cannot be read, or holds anything but settings by name.
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
    known = [field.name for field in dataclasses.fields(config) if field.name not in _OF_ONE_RUN]
    given = {_name(flag) for flag in beside if flag.startswith("--")}
    found = []
    for key, value in said.items():
        name = key.replace("-", "_") if isinstance(key, str) else key
        if name not in known:
            why = "belongs to one run and goes on the command line" if name in _OF_ONE_RUN else "is no setting"
            raise UsageError(f"--config {shown(path)}: {shown(key)} {why}; nearest: {nearest(str(key), known)}")
        if value is not None and name not in given:
            found += _flag(path, name, value)
    return found


def _name(flag: str) -> str:
    return flag.removeprefix("--").partition("=")[0].removeprefix("no-").replace("-", "_")


def _flag(path: str, name: str, value: Any) -> list[str]:
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    if isinstance(value, list) and all(isinstance(one, str) for one in value):
        return [f"--{flag}", *value] if value else []
    if not isinstance(value, str | int | float):
        raise UsageError(
            f"--config {shown(path)}: {name} is {shown(value)}; expected one value, or a list of texts for set"
        )
    try:
        return [f"--{flag}={value}"]
    except ValueError:  # Python refuses to write integers of thousands of digits
        raise UsageError(f"--config {shown(path)}: {name} is {shown(value)}, which is too large; give less") from None


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value
