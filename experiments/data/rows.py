"""Task data: rows from a folder or the Hub, checked.

Whatever is wrong with a file is said in one line that names the file and the row.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from jaxprune.errors import UsageError, clipped, reason, shown

_FORMATS = (".parquet", ".jsonl", ".json", ".csv", ".tsv", ".jsonl.gz", ".json.gz", ".csv.gz", ".tsv.gz")


@dataclass(frozen=True)
class Rows:
    """Hold the checked rows of one split.

    Args:
        texts: one list of n strings for each text column.
        labels: `(n,)`, int32 or, for regression, float32.
        source: the file, for messages.
        notes: one line for each thing that people should know of it.
    """

    texts: tuple[list[str], ...]
    labels: np.ndarray
    source: str
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, n: int | None) -> Rows:
        """Return the first `n` rows; all of them for None."""
        return self if n is None else self.at(slice(n))

    def at(self, where: Any) -> Rows:
        """Return the rows that a slice or an array of indices names."""
        texts = tuple(np.array(column, object)[where].tolist() for column in self.texts)
        return replace(self, texts=texts, labels=self.labels[where])


class Table(Protocol):
    """What reading must know of a task: columns of texts, one column of labels, and where the files are."""

    @property
    def name(self) -> str: ...
    @property
    def texts(self) -> tuple[str, ...]: ...
    @property
    def splits(self) -> tuple[str, ...]: ...
    @property
    def num_labels(self) -> int: ...
    @property
    def regression(self) -> bool: ...
    @property
    def hub(self) -> str | None: ...


def load_rows(task: Table, data_dir: str | os.PathLike[str] | None = None) -> dict[str, Rows]:
    """Load and check every split of a task.

    Args:
        task: what is to be read.
        data_dir: folder with `<task>/<split>.<format>`, `glue/<task>/<split>.<format>` or `<split>.<format>`, where the
            format is parquet, jsonl, json, csv or tsv (all but parquet also with .gz); None downloads from the Hub.
            The columns are those of the Hub. As in GLUE's own files, quotes mean nothing in tsv.

    Raises:
        UsageError: anything missing or malformed; one line that names the file.

    Returns:
        split name -> rows, `train` first.
    """
    files = find_files(task, data_dir)
    if files is None:
        assert task.hub
        tables = from_hub(task.hub, task.name, task.splits)
        return {split: _check(task, table, f"{task.hub}:{split}") for split, table in tables.items()}
    columns = (*task.texts, "label")
    return {split: _check(task, read_columns(paths, columns), str(paths[0])) for split, paths in files.items()}


# Files


def find_files(task: Table, data_dir: str | os.PathLike[str] | None) -> dict[str, list[Path]] | None:
    """Return the files of each split of a task without opening them; None where it needs none.

    Raises:
        UsageError: they are not there, or the task is built in and reads none.
    """
    if data_dir is None:
        return None
    if task.hub is None:
        raise UsageError(f"{task.name} is built in and reads no files, got data_dir {str(data_dir)!r}; leave it out")
    if not os.fspath(data_dir):
        raise UsageError(f"data_dir is empty; expected a folder that holds {task.name}/train.parquet")
    return _split_files(task, Path(data_dir))


def _split_files(task: Table, folder: Path) -> dict[str, list[Path]]:
    """Return the file, or the shards, of each split."""
    if not os.path.isdir(folder):  # unlike a path's own is_dir it takes names of any length
        raise UsageError(
            f"data_dir {shown(str(folder))} is not a folder; expected one that holds {task.name}/train.parquet"
        )
    nested = [folder / task.name, folder / "glue" / task.name, folder]
    for candidate in nested:
        found = {split: find_split(candidate, split) for split in task.splits}
        if any(found.values()):
            missing = [split for split, paths in found.items() if not paths]
            if missing:
                raise UsageError(
                    f"no file for split {missing[0]!r} of {task.name} in {str(candidate)!r}; "
                    f"expected {missing[0]}.parquet (or {', '.join(_FORMATS[1:5])}, .gz)"
                )
            return found
    raise UsageError(
        f"no data of task {task.name!r} under {str(folder)!r}; expected {task.name}/train.parquet or "
        f"train.parquet in it (or {', '.join(_FORMATS[1:5])}, .gz)"
    )


def find_split(folder: Path, split: str) -> list[Path]:
    """Return `<split>.<format>`, or the Hub's `<split>-00000-of-00001.<format>`, all of them; nothing where there is none."""
    if not os.path.isdir(folder):
        return []
    whole = [path for path in (folder / f"{split}{ending}" for ending in _FORMATS) if os.path.isfile(path)]
    if len(whole) > 1:
        raise UsageError(
            f"both {whole[0].name} and {whole[1].name} lie in {str(folder)!r}; keep one file for {split!r}"
        )
    if whole:
        return whole
    pattern = re.compile(rf"{re.escape(split)}-(\d+)-of-(\d+)({'|'.join(map(re.escape, _FORMATS))})")
    try:
        found = [(pattern.fullmatch(name), name) for name in os.listdir(folder)]
    except OSError as error:
        raise UsageError(f"{folder}: cannot be listed ({error.strerror}); make it readable") from error
    shards = sorted((int(match[1]), int(match[2]), folder / name) for match, name in found if match)
    numbers, totals = [number for number, _, _ in shards], {of for _, of, _ in shards}
    if shards and (numbers != list(range(len(shards))) or totals != {len(shards)}):
        raise UsageError(
            f"{len(shards)} of {shown(shards[0][1])} files {split}-* in {str(folder)!r}; keep each of them once"
        )
    return [path for _, _, path in shards]


def read_columns(paths: Sequence[Path], columns: Sequence[str]) -> dict[str, list[Any]]:
    """Return column name -> values of a file and its further shards; of columns other than `columns` the names alone may do."""
    tables = [_read(columns, path) for path in paths]
    for path, table in zip(paths, tables, strict=True):
        if set(table) != set(tables[0]):
            raise UsageError(f"{path}: columns {_names(table)} differ from {_names(tables[0])} in {paths[0].name}")
    return {name: [value for table in tables for value in table[name]] for name in tables[0]}


def _read(columns: Sequence[str], path: Path) -> dict[str, list[Any]]:
    """Return column name -> values; whatever is wrong with the file becomes one line."""
    if path.suffix == ".parquet":
        return _read_parquet(columns, path)
    try:
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rt", encoding="utf-8-sig", newline="") as file:
            text = file.read()
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from error
    except (OSError, EOFError, zlib.error) as error:
        raise UsageError(f"{path}: cannot be read ({reason(error)}); get it again") from error
    ending = path.name.removesuffix(".gz").rsplit(".", 1)[1]
    return _parse_json(path, text) if ending in ("json", "jsonl") else _parse_csv(path, text, ending == "tsv")


def _read_parquet(columns: Sequence[str], path: Path) -> dict[str, list[Any]]:
    """Read `columns`; of the others, which may hold what Python cannot, the names alone."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            _refuse_twice(path, names)
            table = file.read(columns=[name for name in columns if name in names])
        return {name: table[name].to_pylist() if name in table.column_names else [] for name in names}
    except UsageError:
        raise
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise UsageError(f"{path}: not a readable parquet file ({reason(error)}); get it again") from error


def _refuse_twice(path: Path, names: list[str]) -> None:
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise UsageError(f"{path}: column {shown(twice[0])} is there {names.count(twice[0])} times; keep one")


def _parse_json(path: Path, text: str) -> dict[str, list[Any]]:
    """Parse one object a line, or one list of objects."""
    if text.lstrip().startswith("["):
        records = _loads(path, text, 1)
    else:
        records = [_loads(path, line, number) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    for i, record in enumerate(records):
        if not isinstance(record, dict):
            raise UsageError(f"{path}: row {i} is {shown(record)}; expected an object of columns")
    names = dict.fromkeys(name for record in records for name in record)
    return {name: [record.get(name) for record in records] for name in names}


def _loads(path: Path, text: str, line: int) -> Any:
    """Parse the JSON that begins in a line of a file."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line, fault = line + error.lineno - 1, error.msg
    except RecursionError:
        fault = "brackets nested too deep"
    except ValueError:
        fault = "an integer of thousands of digits"
    raise UsageError(f"{path}: line {line} is not JSON that can be read ({fault}); mend it")


def _parse_csv(path: Path, text: str, tabs: bool) -> dict[str, list[Any]]:
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))  # a long field is no mistake
    quoting = csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL
    # StringIO without newline translation, so that line breaks inside quotes survive.
    reader = csv.reader(
        io.StringIO(text, newline=""), delimiter="\t" if tabs else ",", quoting=quoting, strict=not tabs
    )
    columns: list[list[str]] = []
    names: list[str] = []
    try:
        for fields in reader:
            if not names:
                names, columns = fields, [[] for _ in fields]
                _refuse_twice(path, names)
            elif fields:
                if len(fields) != len(names):
                    raise UsageError(
                        f"{path}: line {reader.line_num} has {len(fields)} fields; expected {len(names)}: "
                        f"{_names(names)}"
                    )
                for column, value in zip(columns, fields, strict=True):
                    column.append(value)
    except csv.Error as error:
        raise UsageError(f"{path}: line {reader.line_num} cannot be parsed ({error}); mend that line") from error
    return dict(zip(names, columns, strict=True))


# The Hub


def from_hub(hub: str, config_name: str | None, splits: Sequence[str]) -> dict[str, dict[str, list[Any]]]:
    """Load the splits' columns from the Hub, or from what `datasets` has kept of it, without its retries when offline."""
    import datasets
    from datasets import config
    from huggingface_hub import constants

    what = "the rows" if config_name is None else repr(config_name)
    offline = constants.HF_HUB_OFFLINE or not _reachable(constants.ENDPOINT)
    was = constants.HF_HUB_OFFLINE, config.HF_HUB_OFFLINE
    try:
        constants.HF_HUB_OFFLINE, config.HF_HUB_OFFLINE = offline, offline
        loaded: Any = datasets.load_dataset(hub, config_name)
    except Exception as error:  # whatever `datasets` raises, the user can only do the same about it
        raise UsageError(
            f"cannot load {what} from the Hub dataset {hub} ({'offline: ' if offline else ''}{reason(error)}); "
            "go online once, or pass data_dir with the split files"
        ) from error
    finally:
        constants.HF_HUB_OFFLINE, config.HF_HUB_OFFLINE = was
    missing = [split for split in splits if split not in loaded]
    if missing:
        raise UsageError(f"the Hub dataset {hub} has no split {missing[0]!r} of {config_name}; it has {list(loaded)}")
    return {split: {name: list(loaded[split][name]) for name in loaded[split].column_names} for split in splits}


def _reachable(endpoint: str) -> bool:
    import urllib.error
    import urllib.request

    try:
        with urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=5):
            return True
    except urllib.error.HTTPError:
        return True  # it answered
    except (OSError, ValueError):
        return False


# Rows


def _check(task: Table, table: dict[str, list[Any]], source: str) -> Rows:
    """Turn columns into rows, or say what is wrong with them."""
    for name in (*task.texts, "label"):
        if name not in table:
            raise UsageError(
                f"{source}: no column {name!r}; {task.name} needs {', '.join((*task.texts, 'label'))}, "
                f"found {_names(table)}"
            )
    if not table["label"]:
        raise UsageError(f"{source}: holds no rows; expected at least one")
    for name in task.texts:
        check_texts(name, table[name], source)
    largest = float(np.finfo(np.float32).max) if task.regression else task.num_labels - 1
    expected = "a finite number that float32 can hold" if task.regression else f"an integer from 0 to {largest}"
    labels = np.empty(len(table["label"]), np.float64)
    for i, label in enumerate(table["label"]):
        x = labels[i] = _number(label)
        if not (abs(x) <= largest and (task.regression or (x >= 0 and x == int(x)))):
            raise UsageError(f"{source}: label of row {i} is {shown(label)}; {task.name} expects {expected}")
    return Rows(tuple(table[name] for name in task.texts), labels.astype(_label_type(task)), source)


def check_texts(name: str, column: Iterable[Any], source: str) -> None:
    """Refuse what is no text in a column."""
    for i, text in enumerate(column):
        if not isinstance(text, str):
            raise UsageError(f"{source}: {name} of row {i} is {shown(text)}; expected a string")
        if not _is_unicode(text):
            raise UsageError(f"{source}: {name} of row {i} holds half a character (a lone surrogate): {shown(text)}")


def _number(label: Any) -> float:
    """Return a label as a number, NaN for what is none; files of text hold labels as strings."""
    if isinstance(label, bool | bytes):
        return np.nan
    try:
        return float(label)
    except (TypeError, ValueError, OverflowError):
        return np.nan


def _is_unicode(text: str) -> bool:
    try:
        _ = text.isascii() or text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _label_type(task: Table) -> type:
    return np.float32 if task.regression else np.int32


def _names(names: Iterable[str]) -> str:
    return clipped(", ".join(name if name.strip() else repr(name) for name in names)) or "(none)"
