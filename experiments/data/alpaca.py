"""Rows of instruction, input and output in Alpaca's own files: JSON, JSON lines or parquet, here or on the Hub."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from experiments.data.rows import Rows, check_texts, find_split, from_hub, read_columns
from jaxprune.errors import UsageError, shown

COLUMNS = ("instruction", "input", "output")
HUB = "tatsu-lab/alpaca"

# Held out where there are no rows for validation: a share, and at most so many, the same whatever the seed of a run.
_SHARE, _MOST, _SEED = 0.05, 500, 0


def find(name: str, data_dir: Path | None, train: Path | None, validation: Path | None) -> dict[str, list[Path]]:
    """Return the files of each split without opening them: none of `train` for the Hub's, none of `validation` to hold out.

    Args:
      name: of the task, and of a folder in `data_dir`.
      data_dir: folder with `<name>/train.<format>` or `train.<format>`, and maybe validation.
      train: a file instead of the folder's.
      validation: a file instead of the folder's.

    Raises:
      UsageError: they are not there, or two are given for one split.
    """
    given = {"train": train, "validation": validation}
    for split, path in given.items():
        if path is not None and not path.is_file():
            raise UsageError(f"--{split}-file {shown(str(path))} is no file; name one in JSON, JSON lines or parquet")
    found = {split: [path] if path else [] for split, path in given.items()}
    if data_dir is None:
        return found
    if train is not None:
        raise UsageError("--data-dir and --train-file both name rows to train on; give one of them")
    if not data_dir.is_dir():
        raise UsageError(f"--data-dir {shown(str(data_dir))} is not a folder; expected one with {name}/train.json")
    for folder in (data_dir / name, data_dir):
        if files := find_split(folder, "train"):
            return {"train": files, "validation": found["validation"] or find_split(folder, "validation")}
    raise UsageError(
        f"no file train.json, train.jsonl or train.parquet in {shown(str(data_dir))}; put it there, or name one with "
        "--train-file"
    )


def load(name: str, data_dir: Path | None, train: Path | None, validation: Path | None) -> dict[str, Rows]:
    """Read and check both splits; arguments as in `find`.

    Raises:
      UsageError: anything missing or malformed; one line that names the file.
    """
    files = find(name, data_dir, train, validation)
    if not files["train"]:
        rows = _rows(from_hub(HUB, None, ["train"])["train"], HUB)
    else:
        rows = _rows(read_columns(files["train"], COLUMNS), str(files["train"][0]))
    if files["validation"]:
        source = str(files["validation"][0])
        return {"train": rows, "validation": _rows(read_columns(files["validation"], COLUMNS), source)}
    return _held_out(rows)


def _held_out(rows: Rows) -> dict[str, Rows]:
    """Take some rows away for validation."""
    count = min(_MOST, int(np.ceil(_SHARE * len(rows))))
    if count == len(rows):
        raise UsageError(f"{rows.source}: holds one row, and none is left to validate on; give --validation-file")
    order = np.random.Generator(np.random.PCG64(_SEED)).permutation(len(rows))
    out = np.isin(np.arange(len(rows)), order[:count])
    note = f"{count:,} of the {len(rows):,} rows of {rows.source} are held out for validation, always the same ones"
    return {"train": replace(rows.at(~out), notes=(*rows.notes, note)), "validation": replace(rows.at(out), notes=())}


def _rows(table: Mapping[str, list[Any]], source: str) -> Rows:
    """Turn columns into rows, or say what is wrong with them; an input may be missing."""
    for name in ("instruction", "output"):
        if name not in table:
            raise UsageError(
                f"{source}: no column {name!r}; expected instruction, input (may be missing) and output, found "
                f"{', '.join(table) or 'none'}"
            )
    instructions, outputs = table["instruction"], table["output"]
    if not outputs:
        raise UsageError(f"{source}: holds no rows; expected at least one")
    inputs = ["" if text is None else text for text in table.get("input") or [""] * len(outputs)]
    for name, column in zip(COLUMNS, (instructions, inputs, outputs), strict=True):
        check_texts(name, column, source)
    rows = Rows((instructions, inputs, outputs), np.zeros(len(outputs), np.int32), source)
    # Alpaca's own file has such rows: a response that is empty teaches a model to be silent.
    full = np.array(
        [bool(asked.strip() and answer.strip()) for asked, answer in zip(instructions, outputs, strict=True)]
    )
    if full.all():
        return rows
    if not full.any():
        raise UsageError(f"{source}: no row has both an instruction and an output; fill them in")
    note = f"{np.count_nonzero(~full):,} of the {len(rows):,} rows of {source} are left out, row {full.argmin()} the first: "
    return replace(rows.at(full), notes=(f"{note}their instruction or output is empty",))
