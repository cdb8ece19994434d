import base64
import json
import re
from html.parser import HTMLParser

import pytest

from jaxprune.errors import UsageError
from jaxprune.report import append_jsonl, plot_pruning, write_json, write_page

EVENTS = [
    {
        "step": 100, "params_before": 1_327_104, "params_after": 900_000, "solver": "HIGHS",
        "status": "optimal, proved with gap 0", "gap": 0.0, "seconds": {"scores": 1.25, "solve": 0.04, "surgery": 0.5},
        "compacted": False, "ranks": {"a/b": 3},
    },
    {
        "step": 200, "params_before": 900_000, "params_after": 663_552, "solver": "CBC", "status": "<b>late</b>",
        "compacted": True, "compile_seconds": 2.5, "predicted_saving": 9.75, "measured_saving": 8.5,
    },
]  # fmt: skip
SUMMARY = {
    "method": "dplora", "model": "roberta-base", "task": "rte", "seed": 2025, "metric": "accuracy", "score": 78.339,
    "best_score": 79.061, "adapter_params": 663_552, "head_params": 592_130, "budget": 1_327_104, "layers_adapted": 7,
    "steps": 1500, "events": EVENTS,
    "seconds": {"total": 200.0, "train": 150.0, "compile": 30.0, "allocate": 0.5, "eval": 10.0},
    "versions": {"jax": "0.10.2"}, "config": {"batch_size": 1032, "alpha": None, "task": "rte"},
    "command": "python -m experiments.glue --task rte --tag 'a & b'",
}  # fmt: skip
VOID = {"meta", "img", "link", "br", "hr", "input"}


class Page(HTMLParser):
    """Reads tables as lists of rows, and checks that every tag is closed by its own."""

    def __init__(self, path):
        super().__init__()
        self.open, self.tables, self.tags, self.text = [], [], [], {}
        self.feed(path.read_text())
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open:
            self.text[self.open[-1]] = self.text.get(self.open[-1], []) + [data]
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data


def page_of(folder, summary=SUMMARY):
    write_json(folder / "summary.json", summary)
    write_page(folder)
    return Page(folder / "report.html")


def test_key_figures_stand_at_the_top(tmp_path):
    page = page_of(tmp_path)
    assert page.text["h1"] == page.text["title"] == ["dplora on rte with roberta-base"]
    assert page.text["p"] == ["seed 2025, 1,500 optimiser steps"]
    assert dict(zip(page.text["dt"], page.text["dd"], strict=True)) == {
        "accuracy": "78.34", "best accuracy": "79.06", "adapter parameters": "663,552",
        "of the budget of 1,327,104": "50.0 %", "head parameters": "592,130", "layers adapted": "7",
        "total time": "3 min 20 s",
    }  # fmt: skip
    assert page.text["pre"] == [SUMMARY["command"]]


def test_every_event_is_a_row(tmp_path):
    headings, *rows = page_of(tmp_path).tables[0]
    assert [dict(zip(headings, row, strict=True)) for row in rows] == [
        {
            "step": "100", "parameters before": "1,327,104", "after": "900,000", "solver": "HIGHS",
            "status": "optimal, proved with gap 0", "gap": "0", "seconds scores": "1.25", "seconds solve": "0.04",
            "seconds surgery": "0.5", "compacted": "no", "compile seconds": "–", "predicted saving": "–",
            "measured saving": "–",
        },
        {
            "step": "200", "parameters before": "900,000", "after": "663,552", "solver": "CBC",
            "status": "<b>late</b>", "gap": "–", "seconds scores": "–", "seconds solve": "–", "seconds surgery": "–",
            "compacted": "yes", "compile seconds": "2.5", "predicted saving": "9.75", "measured saving": "8.5",
        },
    ]  # fmt: skip


def test_seconds_settings_and_versions_are_tables(tmp_path):
    _, seconds, settings, versions = page_of(tmp_path).tables
    assert seconds[1:3] == [["total", "200.0", "100.0 %"], ["train", "150.0", "75.0 %"]]
    assert settings == [["batch_size", "1032"], ["alpha", "–"], ["task", "rte"]]
    assert versions == [["jax", "0.10.2"]]


def test_evaluations_are_read_past_torn_and_training_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    append_jsonl(path, {"step": 10, "loss": 0.5})
    append_jsonl(path, {"step": 20, "split": "validation", "accuracy": 61.256})
    with open(path, "a") as file:
        file.write('{"step": 30, "spl')
    table = page_of(tmp_path, {}).tables[0]
    assert table == [["step", "split", "accuracy"], ["20", "validation", "61.26"]]


def test_pictures_are_inside_and_nothing_comes_from_elsewhere(tmp_path):
    plot_pruning([], EVENTS, tmp_path / "pruning.png", metric="accuracy")
    page = page_of(tmp_path)
    (image,) = [attrs for tag, attrs in page.tags if tag == "img"]
    kind, data = image["src"].split(",")
    assert kind == "data:image/png;base64"
    assert base64.b64decode(data, validate=True) == (tmp_path / "pruning.png").read_bytes()
    # 7.2 inches at the 96 pixels an inch of CSS
    assert image["width"] == "691"
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    text = (tmp_path / "report.html").read_text()
    assert not re.search(r"https?:|url\(|@import", text)
    assert [p.name for p in tmp_path.iterdir() if p.name.endswith(".new")] == []


def test_everything_is_escaped(tmp_path):
    evil = "<script>alert('&')</script>\"'"
    summary = {key: evil for key in ("method", "model", "task", "seed", "metric", "score", "adapter_params", "command")}
    summary |= {key: {evil: evil} for key in ("config", "versions", "allocation", "seconds")}
    summary |= {"seconds": {evil: 1.0, "total": 2.0}, "events": [{evil: evil, "seconds": {evil: evil}}]}
    append_jsonl(tmp_path / "metrics.jsonl", {"split": evil, evil: evil})
    page = page_of(tmp_path, summary)
    assert "<script" not in (tmp_path / "report.html").read_text()
    assert "script" not in {tag for tag, _ in page.tags}
    assert page.text["h1"] == [f"{evil} on {evil} with {evil}"]
    assert page.text["pre"] == [evil]
    # 4 among the events (2 headings, 2 values), 3 among the evaluations, 2 + 2 + 2 in pairs, 1 among the seconds
    assert sum(evil in cell for table in page.tables for row in table for cell in row) == 14


@pytest.mark.parametrize("left_out", [[key] for key in SUMMARY] + [list(SUMMARY)])
@pytest.mark.parametrize("null", [False, True])
def test_what_was_not_recorded_is_left_out(tmp_path, left_out, null):
    summary = {key: value for key, value in SUMMARY.items() if key not in left_out}
    page = page_of(tmp_path, summary | ({key: None for key in left_out} if null else {}))
    assert len(page.tables) == sum(key in summary for key in ("events", "seconds", "config", "versions"))
    assert page.text["h1"][0]


def test_command_as_a_list_can_be_pasted(tmp_path):
    page = page_of(tmp_path, {"command": ["python", "-m", "experiments.glue", "--tag", "a b"]})
    assert page.text["pre"] == ["python -m experiments.glue --tag 'a b'"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot read .*summary.json: No such file"),
        ('{"method": "do', "summary.json is damaged"),
        (b"\xff\xfe\xfa", "summary.json is damaged"),
        ("[1]", "it holds a list, expected an object"),
        ('{"events": 3}', "'events' is a int, expected a list"),
        ('{"events": [3]}', "'events' should hold objects only"),
        (json.dumps({"seconds": [1]}), "'seconds' is a list, expected a dict"),
    ],
)
def test_a_missing_or_damaged_summary_is_one_line(tmp_path, content, said):
    if content is not None:
        (tmp_path / "summary.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UsageError, match=said) as error:
        write_page(tmp_path)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "report.html").exists()
