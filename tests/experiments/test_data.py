"""Files of every format read alike, every mistake is one line, and tokens equal those of transformers."""

import csv
import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from experiments.data import rows as data
from experiments.tasks import get_task
from jaxprune.errors import UsageError

TRAIN = [
    {"sentence1": 'A man, he said "no".', "sentence2": "Él dijo que sí.", "label": 1, "idx": 0},
    {"sentence1": "It rains\u2028today", "sentence2": "", "label": 0, "idx": 1},
    {"sentence1": " spaces  kept ", "sentence2": "last", "label": 1, "idx": 2},
]
VALIDATION = [{"sentence1": "one", "sentence2": "two", "label": 0, "idx": 0}]


def write(path: Path, records: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    name = path.name.removesuffix(".gz")
    if name.endswith(".parquet"):
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
        return path
    with (gzip.open if path.suffix == ".gz" else open)(path, "wt", encoding="utf-8", newline="") as file:
        if name.endswith(".jsonl"):
            file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        elif name.endswith(".json"):
            json.dump(records, file)
        elif name.endswith(".csv"):
            writer = csv.DictWriter(file, list(records[0]))
            writer.writeheader()
            writer.writerows(records)
        else:
            file.write("\n".join("\t".join(map(str, line)) for line in (records[0], *(r.values() for r in records))))
    return path


def folder(root: Path, train=TRAIN, validation=VALIDATION, ending=".jsonl") -> Path:
    write(root / f"train{ending}", train)
    write(root / f"validation{ending}", validation)
    return root


@pytest.mark.parametrize(
    "ending", [".parquet", ".jsonl", ".json", ".csv", ".tsv", ".jsonl.gz", ".csv.gz", "-00000-of-00001.parquet"]
)
def test_every_format_reads_alike(tmp_path, ending):
    rows = get_task("rte").rows(folder(tmp_path, ending=ending))
    assert list(rows) == ["train", "validation"]
    assert rows["train"].texts == ([r["sentence1"] for r in TRAIN], [r["sentence2"] for r in TRAIN])
    assert rows["train"].labels.dtype == np.int32
    np.testing.assert_array_equal(rows["train"].labels, [1, 0, 1])
    assert len(rows["validation"]) == 1


@pytest.mark.parametrize("nested", [".", "rte", "glue/rte"])
def test_the_folder_may_be_nested(tmp_path, nested):
    folder(tmp_path / nested)
    assert len(get_task("rte").rows(tmp_path)["train"]) == 3


def test_shards_are_joined_in_order(tmp_path):
    folder(tmp_path, ending="-00000-of-00002.jsonl")
    write(tmp_path / "train-00001-of-00002.jsonl", VALIDATION)
    with pytest.raises(UsageError, match=r"1 of 2 files validation-\*"):
        get_task("rte").rows(tmp_path)
    write(tmp_path / "validation-00001-of-00002.jsonl", VALIDATION)
    assert get_task("rte").rows(tmp_path)["train"].texts[0] == [*(r["sentence1"] for r in TRAIN), "one"]


def test_only_the_first_rows(tmp_path):
    rows = get_task("rte").rows(folder(tmp_path, validation=TRAIN), 2)
    assert rows["train"].texts[0] == [r["sentence1"] for r in TRAIN[:2]] and len(rows["validation"]) == len(TRAIN)


def test_regression_labels_are_real(tmp_path):
    records = [{**TRAIN[0], "label": 3.8}, {**TRAIN[1], "label": "0.25"}]
    labels = get_task("stsb").rows(folder(tmp_path, train=records))["train"].labels
    assert labels.dtype == np.float32
    np.testing.assert_array_equal(labels, np.array([3.8, 0.25], np.float32))


def test_an_empty_name_of_a_folder():
    with pytest.raises(UsageError, match="data_dir is empty"):
        get_task("rte").rows("")


def test_the_built_in_task_needs_no_files(tmp_path):
    rows = get_task("grammar").rows(None, 100)
    assert len(rows["train"]) == 100 and len(rows["validation"]) == 1000
    with pytest.raises(UsageError, match="built in and reads no files"):
        get_task("grammar").rows(tmp_path)


def fails(root: Path, message: str, task: str = "rte") -> None:
    with pytest.raises(UsageError, match=message) as caught:
        get_task(task).rows(root)
    assert "\n" not in str(caught.value)
    assert str(root) in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": None}, "label of row 1 is None; rte expects an integer from 0 to 1"),
        ({"label": -1}, "label of row 1 is -1"),
        ({"label": 2}, "label of row 1 is 2"),
        ({"label": 0.5}, "label of row 1 is 0.5"),
        ({"label": "entailment"}, "label of row 1 is 'entailment'"),
        ({"label": float("nan")}, "label of row 1 is nan"),
        ({"label": [1]}, r"label of row 1 is \[1\]"),
        ({"sentence2": None}, "sentence2 of row 1 is None; expected a string"),
        ({"sentence1": 7}, "sentence1 of row 1 is 7; expected a string"),
    ],
)
def test_wrong_values(tmp_path, change, message):
    fails(folder(tmp_path, train=[TRAIN[0], {**TRAIN[1], **change}]), rf"train\.jsonl: {message}")


def test_what_is_odd_and_right_is_read(tmp_path):
    text, long = "sentence1,sentence2,label\n", "word " * 2_000_000
    for name, content, first in (
        ("train.csv", b"\xef\xbb\xbf" + f"{text}a,b,1\n".encode(), "a"),
        ("train.csv", f"{text}{long},b,1\n".encode(), long),
        ("train.csv", f"\n{text.rstrip()}\r\n\n\0a,b,1.0\r\n".encode(), "\0a"),
        (
            "train.json",
            b'\n [{"sentence1": "\\ud83d\\ude42", "sentence2": "b", "label": "1", "deep": [[[]]]}]',
            "\U0001f642",
        ),
    ):
        folder(tmp_path)
        (tmp_path / "train.jsonl").unlink()
        (tmp_path / name).write_bytes(content)
        rows = get_task("rte").rows(tmp_path)["train"]
        assert (rows.texts, rows.labels.tolist()) == (([first], ["b"]), [1])
        (tmp_path / name).unlink()


def test_parquet_columns_of_other_types(tmp_path):
    import decimal

    import pyarrow
    import pyarrow.parquet

    folder(tmp_path)
    (tmp_path / "train.jsonl").unlink()
    columns = {
        "sentence1": pyarrow.array(["a", "a"]).dictionary_encode(),
        "sentence2": pyarrow.array(["b", "c"], pyarrow.large_string()),
        "label": pyarrow.array([decimal.Decimal(1), decimal.Decimal(0)]),
        "other": pyarrow.array([2**50] * 2, pyarrow.timestamp("s")),  # years that Python does not know
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "train.parquet")
    rows = get_task("rte").rows(tmp_path)["train"]
    assert (rows.texts, rows.labels.tolist()) == ((["a", "a"], ["b", "c"]), [1, 0])


def test_regression_labels_are_finite(tmp_path):
    huge = folder(tmp_path, train=[{**TRAIN[0], "label": 1e300}])
    fails(huge, r"label of row 0 is 1e\+300; stsb expects a finite number that float32", task="stsb")
    fails(folder(tmp_path, train=[{**TRAIN[0], "label": float("inf")}]), "stsb expects a finite number", task="stsb")


def test_missing_columns_list_what_there_is(tmp_path):
    records = [{"sentence1": "a", "sentence2": "b", "gold": 1}]
    fails(folder(tmp_path, train=records), "no column 'label'; rte needs .*, found sentence1, sentence2, gold")
    fails(folder(tmp_path), "no column 'question'; qnli needs question, sentence, label, found sentence1", task="qnli")


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv", ".tsv", ".parquet", ".jsonl.gz"])
def test_empty_files(tmp_path, ending):
    folder(tmp_path, ending=ending)
    path = tmp_path / f"train{ending}"
    (gzip.open if ending.endswith(".gz") else open)(path, "wb").close()
    fails(tmp_path, rf"train{ending}: (no column|not a readable parquet file|not JSON|holds no rows)")


def test_a_file_without_rows(tmp_path):
    folder(tmp_path, ending=".csv")
    (tmp_path / "train.csv").write_text("sentence1,sentence2,label\n")
    fails(tmp_path, "holds no rows")


@pytest.mark.parametrize("ending", [".parquet", ".jsonl.gz"])
def test_truncated_files(tmp_path, ending):
    folder(tmp_path, train=TRAIN * 50, ending=ending)
    path = tmp_path / f"train{ending}"
    path.write_bytes(path.read_bytes()[:-20])
    fails(tmp_path, rf"train{ending}: .*get it again")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train.jsonl", b'{"sentence1": "a"}\n{"sentence1": \n', "line 2 is not JSON"),
        ("train.jsonl", b"3\n", "row 0 is 3; expected an object"),
        ("train.json", b'[{"sentence1": "a"},', "not JSON"),
        ("train.csv", b"sentence1,sentence2,label\na,b,1\na,b\n", "line 3 has 2 fields; expected 3"),
        ("train.csv", b'sentence1,sentence2,label\n"a"x,b,1\n', "line 2 cannot be parsed"),
        ("train.tsv", b"sentence1\tsentence2\tlabel\na\tb\t1\tc\n", "line 2 has 4 fields; expected 3"),
        ("train.tsv", b"sentence1\tsentence2\tlabel\n\xff\tb\t1\n", "not UTF-8 text"),
    ],
)
def test_malformed_files(tmp_path, name, content, message):
    folder(tmp_path)
    (tmp_path / "train.jsonl").unlink()
    (tmp_path / name).write_bytes(content)
    fails(tmp_path, rf"{name}: .*{message}")


def test_missing_files(tmp_path):
    fails(tmp_path / "nowhere", "is not a folder")
    fails(tmp_path, "no data of task 'rte'")
    (folder(tmp_path) / "validation.jsonl").unlink()
    fails(tmp_path, "no file for split 'validation' of rte")
    folder(tmp_path)
    write(tmp_path / "train.csv", TRAIN)
    fails(tmp_path, "both train.jsonl and train.csv")


def test_offline_the_hub_fails_at_once(monkeypatch):
    import datasets
    from datasets import config
    from huggingface_hub import constants

    called = []

    def load_dataset(*arguments):
        called.append((arguments, constants.HF_HUB_OFFLINE, config.HF_HUB_OFFLINE))
        raise ConnectionError("Couldn't reach it\nand more")

    monkeypatch.setattr(data, "_reachable", lambda endpoint: False)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    before = constants.HF_HUB_OFFLINE
    with pytest.raises(UsageError, match="cannot load 'rte' .*offline: Couldn't reach it.*pass data_dir") as caught:
        get_task("rte").rows()
    assert called == [(("nyu-mll/glue", "rte"), True, True)] and "\n" not in str(caught.value)
    assert constants.HF_HUB_OFFLINE == before


def test_the_hub_is_checked_like_a_file(monkeypatch):
    import datasets

    loaded = {split: datasets.Dataset.from_list(TRAIN) for split in ("train", "validation")}
    monkeypatch.setattr(data, "_reachable", lambda endpoint: True)
    monkeypatch.setattr(datasets, "load_dataset", lambda *arguments: loaded)
    assert get_task("rte").rows()["validation"].texts[0] == [r["sentence1"] for r in TRAIN]
    loaded["train"] = datasets.Dataset.from_list([{**TRAIN[0], "label": -1}])
    with pytest.raises(UsageError, match="nyu-mll/glue:train: label of row 0 is -1"):
        get_task("rte").rows()
    del loaded["validation"]
    with pytest.raises(UsageError, match="no split 'validation'"):
        get_task("rte").rows()


def test_an_address_that_does_not_answer():
    assert not data._reachable("http://127.0.0.1:9")
