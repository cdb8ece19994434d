"""One page that shows a run: a file without scripts that needs nothing but itself."""

from __future__ import annotations

import base64
import html
import json
import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from jaxprune.errors import UsageError
from jaxprune.files import checked_path, write_whole
from jaxprune.report.figure import DPI

_PICTURES = {
    "pruning.png": "Adapter parameters and score over optimiser steps",
    "ranks.png": "Rank of every site",
    "ranks_after.png": "Ranks after pruning",
}

_STYLE = """
:root { color-scheme: light dark; --line: #d4d4d4; --soft: #f4f4f4; --pale: #5c5c5c }
@media (prefers-color-scheme: dark) { :root { --line: #444; --soft: #262626; --pale: #a8a8a8 } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .5rem 0 0; overflow-wrap: anywhere }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem }
p { margin: .25rem 0; color: var(--pale) }
dl { display: flex; flex-wrap: wrap; gap: .5rem; margin: 1rem 0 }
dl div { background: var(--soft); border-radius: .5rem; padding: .5rem .75rem; min-width: 6.5rem }
dt { font-size: .8rem; color: var(--pale) }
dd { margin: 0; font-size: 1.15rem; font-weight: 600 }
figure { margin: 1.5rem 0; overflow-x: auto }
img { max-width: max(100%, 34rem); height: auto; background: white; border-radius: .5rem }
figcaption { font-size: .85rem; color: var(--pale) }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .75rem .3rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line) }
th { color: var(--pale); font-weight: 600 }
td { overflow-wrap: break-word }
.n { text-align: right; white-space: nowrap }
.s { min-width: 14rem }
pre { background: var(--soft); border-radius: .5rem; padding: .75rem; white-space: pre-wrap; overflow-wrap: anywhere }
details { margin-top: 2rem }
summary { cursor: pointer; font-size: 1.15rem; font-weight: 600; margin-bottom: .5rem }
"""


def write_page(folder: str | os.PathLike[str]) -> None:
    """Write `report.html` into a run's folder, from what the run left there.

    The page holds the key figures, the pictures that exist, the pruning events, evaluations, seconds, settings,
    versions and the command; what the run did not record is left out. It is one file without scripts, and opens without
    a server or a network.

    Args:
      folder: output folder of a run, with `summary.json` and any of `metrics.jsonl`, `pruning.png`, `ranks.png` and
        `ranks_after.png`.

    Raises:
      UsageError: `summary.json` is missing or damaged, or the page cannot be written.
    """
    folder = checked_path("folder", folder)
    summary = _Summary(folder / "summary.json")
    title = _title(summary) or folder.absolute().name
    seed, steps = summary.get("seed"), summary.get("steps")
    said = [f"seed {seed}" * (seed is not None), f"{_text(steps)} optimiser steps" * (steps is not None)]
    said.append(f"computed on {summary.get('device')}" * (summary.get("device") is not None))
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        f"<p>{html.escape(', '.join(filter(None, said)))}</p>",
        _figures(summary),
        *(_picture(folder / name, caption) for name, caption in _PICTURES.items() if (folder / name).is_file()),
        _events(summary.list("events")),
        _evaluations(folder / "metrics.jsonl"),
        _pairs("Allocation", summary.dict("allocation")),
        _seconds(summary.dict("seconds")),
        _command(summary.get("command")),
        # Settings as they were given: a seed of 2025, not 2,025.
        _folded("Settings", {key: str(v) if _is_number(v) else v for key, v in summary.dict("config").items()}),
        _folded("Versions", summary.dict("versions")),
    ]
    page = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{html.escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
{chr(10).join(filter(None, parts))}
</body>
</html>
"""
    write_whole(folder / "report.html", page.encode(errors="backslashreplace"))


class _Summary:
    """What `summary.json` holds, where every key is optional but has to be of its type."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._values = json.loads(path.read_bytes())
        except OSError as error:
            raise UsageError(
                f"cannot read {path}: {error.strerror}; name the output folder of a finished run"
            ) from None
        except (ValueError, RecursionError) as error:
            raise self._damaged(str(error)) from None
        if not isinstance(self._values, dict):
            raise self._damaged(f"it holds a {type(self._values).__name__}, expected an object")

    def get(self, key: str) -> Any:
        return self._values.get(key)

    def dict(self, key: str) -> Mapping[str, Any]:
        return self._typed(key, {})

    def list(self, key: str) -> Sequence[Mapping[str, Any]]:
        values = self._typed(key, [])
        if not all(isinstance(value, dict) for value in values):
            raise self._damaged(f"{key!r} should hold objects only")
        return values

    def _typed(self, key: str, default: Any) -> Any:
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, type(default)):
            raise self._damaged(f"{key!r} is a {type(value).__name__}, expected a {type(default).__name__}")
        return value

    def _damaged(self, how: str) -> UsageError:
        return UsageError(f"{self._path} is damaged: {how}; run again, or restore the file")


def _title(summary: _Summary) -> str:
    named = [("", "method"), ("on ", "task"), ("with ", "model")]
    return " ".join(f"{word}{_text(summary.get(key))}" for word, key in named if summary.get(key) is not None)


def _figures(summary: _Summary) -> str:
    metric = _text(summary.get("metric") or "score")
    params, budget = summary.get("adapter_params"), summary.get("budget")
    known = _is_number(params) and _is_number(budget) and budget > 0
    whole, left = summary.get("model_params_at_start"), summary.get("model_params")
    pruned = _is_number(whole) and _is_number(left) and whole > 0
    total = summary.dict("seconds").get("total")
    figures = {
        metric: _score(summary.get("score")),
        f"best {metric}": _score(summary.get("best_score")),
        "adapter parameters": summary.get("adapter_params"),
        f"of the budget of {_text(budget)}": f"{100 * params / budget:.1f} %" if known else None,
        "head parameters": summary.get("head_params"),
        "model parameters": left,
        f"of the model's {_text(whole)} before": f"{100 * left / whole:.1f} %" if pruned else None,
        "layers adapted": summary.get("layers_adapted"),
        "total time": duration(total) if _is_number(total) else None,
    }
    cells = [
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(_text(value))}</dd></div>"
        for name, value in figures.items()
        if value is not None
    ]
    return f"<dl>{''.join(cells)}</dl>" if cells else ""


def _picture(path: Path, caption: str) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}; make it readable, or remove it") from None
    # The header of a PNG has its width in pixels there; shown in the size it was drawn for, it is sharp on any screen.
    width = int.from_bytes(content[16:20], "big") * 96 // DPI
    source = base64.b64encode(content).decode()
    return (
        f'<figure><img src="data:image/png;base64,{source}" width="{width}" alt="{html.escape(caption)}">'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )


def _events(events: Sequence[Mapping[str, Any]]) -> str:
    """Return the table of pruning events: the columns that any event has, in a fixed order, then those unknown here."""
    if not events:
        return ""
    rows = [_flat(event) for event in events]
    counts = {"params_before", "params_after"}
    first = [
        "step",
        "loss_before",
        "loss_after",
        "solver",
        "status",
        "gap",
        "seconds",
        "seconds scores",
        "seconds solve",
        "seconds surgery",
    ]
    first += ["compacted", "compile_seconds"]
    keys = dict.fromkeys(key for key in first if any(key in row for row in rows))
    keys |= dict.fromkeys(key for row in rows for key in row if key not in counts)
    headings = [key.replace("_", " ") for key in keys]
    cells = [[row.get(key) for key in keys] for row in rows]
    if any(counts & row.keys() for row in rows):
        at = int("step" in keys)
        headings[at:at] = ["parameters before", "after"]
        for row, line in zip(rows, cells, strict=True):
            line[at:at] = [row.get("params_before"), row.get("params_after")]
    return _section(f"Pruning events ({len(events)})", _table(headings, cells))


def _flat(event: Mapping[str, Any]) -> dict[str, Any]:
    """Return an event's single values, and those of its `seconds`; longer ones, such as ranks, would burst the table."""
    flat = {key: value for key, value in event.items() if not isinstance(value, dict | list)}
    seconds = event.get("seconds")
    return flat | ({f"seconds {key}": value for key, value in seconds.items()} if isinstance(seconds, dict) else {})


def _evaluations(path: Path) -> str:
    """Return the table of the evaluations in `metrics.jsonl`; a line that was cut off is passed over."""
    try:
        lines = path.read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}; make it readable, or remove it") from None
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and "split" in row:
            rows.append(row)
    if not rows:
        return ""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    table = _table(keys, [[_score(row.get(key)) for key in keys] for row in rows])
    return _details(f"Evaluations ({len(rows)})", table)


def _seconds(seconds: Mapping[str, Any]) -> str:
    total = seconds.get("total")
    rows = [
        [name, f"{value:,.1f}", f"{100 * value / total:.1f} %" if _is_number(total) and total > 0 else None]
        for name, value in seconds.items()
        if _is_number(value)
    ]
    return _section("Seconds", _table(["kind", "seconds", "share"], rows)) if rows else ""


def _command(command: Any) -> str:
    if not command:
        return ""
    line = shlex.join(map(str, command)) if isinstance(command, list) else _text(command)
    return _section("The same run again", f"<pre>{html.escape(line)}</pre>")


def _pairs(heading: str, values: Mapping[str, Any]) -> str:
    rows = [[name, value] for name, value in values.items()]
    return _section(heading, _table([], rows)) if rows else ""


def _folded(heading: str, values: Mapping[str, Any]) -> str:
    """Return a table of names and values that opens on a click."""
    return _details(heading, _table([], list(values.items()))) if values else ""


def _details(heading: str, content: str) -> str:
    return f"<details><summary>{html.escape(heading)}</summary>{content}</details>"


def _section(heading: str, content: str) -> str:
    return f"<h2>{html.escape(heading)}</h2>\n{content}"


def _table(headings: Iterable[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a table; under headings, numbers stand right and long texts get room."""
    headings, rows = list(headings), list(rows)
    columns = list(zip(*rows, strict=True))
    kinds = [_kind(column) if headings else "" for column in columns]

    def line(tag: str, cells: Iterable[Any]) -> str:
        joined = "".join(
            f"<{tag}{kind}>{html.escape(_text(cell))}</{tag}>" for kind, cell in zip(kinds, cells, strict=True)
        )
        return f"<tr>{joined}</tr>"

    head = f"<thead>{line('th', headings)}</thead>" if headings else ""
    body = "\n".join(line("td", row) for row in rows)
    return f'<div class="wide"><table>{head}<tbody>\n{body}\n</tbody></table></div>'


def _kind(column: Sequence[Any]) -> str:
    texts = [_text(cell) for cell in column if cell is not None]
    if texts and all(text.replace(",", "").removesuffix(" %").lstrip("-")[:1].isdigit() for text in texts):
        return ' class="n"'
    return ' class="s"' if any(len(text) > 30 for text in texts) else ""


def _text(value: Any) -> str:
    """Return a value as a reader wants it: 1,234 and 0.1235, yes and no, a dash for nothing."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return value if isinstance(value, str) else json.dumps(value)


def _score(value: Any) -> Any:
    return f"{value:.2f}" if isinstance(value, float) else value


def duration(seconds: float) -> str:
    """Return a time as a reader wants it: `4.2 s`, `3 min 5 s` or `2 h 10 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e100
