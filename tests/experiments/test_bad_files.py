"""Files from outside that are broken, hostile or odd: status 2 and one line each, before anything is computed or written."""

from __future__ import annotations

import gzip
import io
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.experiments.refusals import assert_refused

# What breaks the copies of a model folder and a data folder, and further arguments where it returns some.
Break = Callable[[Path, Path], list[str] | None]


@pytest.fixture
def refuse(tiny_bert, tiny_rte, tmp_path) -> Callable[[Break, str], None]:
    """Break copies of the tiny model and of its data, and check what is said."""

    def check(breaks: Break, message: str) -> None:
        model = shutil.copytree(tiny_bert, tmp_path / "model")
        data = shutil.copytree(tiny_rte / "rte", tmp_path / "data")
        further = breaks(model, data) or []
        arguments = ["--model", str(model), "--task", "rte", "--data-dir", str(data), "--max-length", "32", *further]
        assert_refused("experiments.glue", arguments, tmp_path, message)

    return check


# Rows

ROW = {"sentence1": "one two", "sentence2": "three", "label": 1}
CSV = b"sentence1,sentence2,label\n"


def train(name: str, content: bytes | Callable[[], bytes]) -> Break:
    """Put another training file in place of train.jsonl."""

    def breaks(model: Path, data: Path) -> None:
        (data / "train.jsonl").unlink()
        (data / name).write_bytes(content if isinstance(content, bytes) else content())

    return breaks


def row(**changes: Any) -> Break:
    """Train on a good row and one with changes."""
    return train("train.jsonl", "".join(json.dumps({**ROW, **more}) + "\n" for more in ({}, changes)).encode())


def label(written: str) -> Break:
    """Train on a row whose label is written so."""
    return train("train.jsonl", json.dumps(ROW)[:-2].encode() + written.encode() + b"}\n")


def parquet(*names: str, **columns: Callable[[Any], Any]) -> Break:
    """Train on two good rows, or on columns that functions of pyarrow make; `names` renames them all."""

    def content() -> bytes:
        import pyarrow
        import pyarrow.parquet

        arrays = {name: pyarrow.array([value] * 2) for name, value in ROW.items()}
        arrays |= {name: make(pyarrow) for name, make in columns.items()}
        table = pyarrow.table(list(arrays.values()), names=names or list(arrays))
        pyarrow.parquet.write_table(table, file := io.BytesIO())
        return file.getvalue()

    return train("train.parquet", content)


def damaged(breaks: Break, change: Callable[[bytes], bytes]) -> Break:
    """Change the bytes of the training file as well."""

    def both(model: Path, data: Path) -> None:
        breaks(model, data)
        (path,) = data.glob("train*")
        path.write_bytes(change(path.read_bytes()))

    return both


def spoil(content: bytes) -> bytes:
    """Overwrite what lies in the middle."""
    return content[:25] + b"\xff" * 60 + content[85:]


LONG = gzip.compress(b"".join(json.dumps({**ROW, "idx": i}).encode() + b"\n" for i in range(200)))
BAD_LABEL = r"train\.\w+: label of row 0 is {}; rte expects an integer from 0 to 1"

ROWS = {
    "wrong label column": (
        train("train.jsonl", b'{"sentence1": "a", "sentence2": "b", "lable": 1}'),
        r"train.jsonl: no column 'label'; rte needs .*found sentence1, sentence2, lable",
    ),
    "label out of range": (row(label=7), r"train.jsonl: label of row 1 is 7"),
    "negative label": (row(label=-1), r"label of row 1 is -1"),
    "half a label": (row(label=0.5), r"label of row 1 is 0.5"),
    "label that is NaN": (label("NaN"), BAD_LABEL.format("nan")),
    "label that is infinite": (label("-Infinity"), BAD_LABEL.format("-inf")),
    "label beyond a double": (label("1e400"), BAD_LABEL.format("inf")),
    "label of 400 digits": (label("1" * 400), BAD_LABEL.format(r"1111+\.\.\.1111+")),
    "label of 5000 digits": (label("1" * 5000), r"train.jsonl: line 1 .* \(an integer of thousands of digits\)"),
    "label that is true": (label("true"), BAD_LABEL.format("True")),
    "label that is a list": (label("[1]"), BAD_LABEL.format(r"\[1\]")),
    "label that is a word": (label('"entailment"'), BAD_LABEL.format("'entailment'")),
    "missing text": (row(sentence2=None), r"train.jsonl: sentence2 of row 1 is None; expected a string"),
    "number for a text": (row(sentence1=7), r"train.jsonl: sentence1 of row 1 is 7; expected a string"),
    "half of a surrogate pair": (row(sentence2="a\ud800b"), r"sentence2 of row 1 holds half a character.*ud800"),
    "no rows": (train("train.jsonl", b""), r"train.jsonl: no column 'sentence1'.*found \(none\)"),
    "an empty list": (train("train.json", b"[]"), r"train.json: no column 'sentence1'"),
    "an empty compressed file": (train("train.tsv.gz", b""), r"train.tsv.gz: no column 'sentence1'"),
    "a header alone": (train("train.csv", CSV), r"train.csv: holds no rows"),
    "broken line": (train("train.jsonl", json.dumps(ROW).encode() + b"\n{oops\n"), r"train.jsonl: line 2 is not JSON"),
    "lists for rows": (train("train.json", b"[[1, 2]]"), r"row 0 is \[1, 2\]; expected an object"),
    "brackets 100000 deep": (train("train.json", b"[" * 100_000), r"train.json: line 1 .* \(brackets nested too deep\)"),
    "a label 100000 deep": (label("[" * 100_000 + "]" * 100_000), r"train.jsonl: line 1 .* nested too deep"),
    "a label 900 deep": (label("[" * 900 + "]" * 900), BAD_LABEL.format(r"\[+\.\.\.\]+")),
    "zero bytes": (train("train.jsonl", bytes(300)), r"train.jsonl: line 1 is not JSON"),
    "UTF-16": (train("train.csv", (CSV.decode() + "a,b,1\n").encode("utf-16")), r"train.csv: not UTF-8 .*at byte 0"),
    "UTF-16 without a mark": (train("train.tsv", "sentence1\tlabel\n".encode("utf-16-le")), r"train.tsv: .*\\x00"),
    "Latin-1": (train("train.tsv", b"sentence1\tsentence2\tlabel\n\xe9\tb\t1\n"), r"not UTF-8 .*at byte 26"),
    "line breaks in column names": (
        train("train.json", json.dumps([{"sen\ntence1": "a", "\ud800": "b", "": "c"}]).encode()),
        r"found sen\\ntence1, \\ud800, ''",
    ),
    "2000 columns": (train("train.json", json.dumps([{f"{i}" * 40: "a" for i in range(2000)}]).encode()), r"\.\.\.$"),
    "damaged gzip": (train("train.jsonl.gz", spoil(LONG)), r"train.jsonl.gz: cannot be read \(Error -3 while decompr"),
    "truncated gzip": (train("train.jsonl.gz", LONG[:-12]), r"train.jsonl.gz: cannot be read .*ended before the end"),
    "gzip that is none": (train("train.csv.gz", CSV + b"a,b,1\n"), r"train.csv.gz: cannot be read .*Not a gzipped"),
    "gzip of other bytes": (train("train.json.gz", LONG[:-8] + bytes(8)), r"train.json.gz: cannot be read .*CRC"),
    "the same column twice": (train("train.csv", CSV[:-1] + b",label\na,b,1,0\n"), r"column 'label' is there 2 times"),
    "empty column names": (train("train.csv", b",,\na,b,1\n"), r"train.csv: column '' is there 3 times"),
    "a line too short": (train("train.csv", CSV + b"a,b\n"), r"train.csv: line 2 has 2 fields; expected 3: sentence1"),
    "a quote that stays open": (train("train.csv", CSV + b'"a,b,1\n'), r"train.csv: line 2 cannot be parsed"),
    "parquet that is none": (train("train.parquet", b"PAR1 and no more"), r"train.parquet: not a readable parquet file"),
    "an empty parquet": (train("train.parquet", b""), r"train.parquet: not a readable parquet file"),
    "truncated parquet": (damaged(parquet(), lambda content: content[:-60]), r"train.parquet: not a readable parquet"),
    "damaged parquet": (damaged(parquet(), spoil), r"train.parquet: not a readable parquet"),
    "binary text in parquet": (parquet(sentence1=lambda pa: pa.array([b"a", b"b"])), r"sentence1 of row 0 is b'a'"),
    "nested text in parquet": (parquet(sentence2=lambda pa: pa.array([{"a": "b"}] * 2)), r"row 0 is \{'a': 'b'\}"),
    "lists for labels in parquet": (parquet(label=lambda pa: pa.array([[1]] * 2)), BAD_LABEL.format(r"\[1\]")),
    "null labels in parquet": (parquet(label=lambda pa: pa.nulls(2)), BAD_LABEL.format("None")),
    "times for labels in parquet": (
        parquet(label=lambda pa: pa.array([2**50] * 2, pa.timestamp("s"))),
        r"train.parquet: not a readable parquet file",
    ),
    "text in parquet that is no UTF-8": (
        damaged(parquet(), lambda content: content.replace(b"three", b"thr\xff\xff")),
        r"train.parquet: not a readable parquet file",
    ),
    "the same column twice in parquet": (
        parquet(*ROW, "label", more=lambda pa: pa.array([0, 0])),
        r"train.parquet: column 'label' is there 2 times",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", ROWS)
def test_rows(kind, refuse):
    refuse(*ROWS[kind])


# Data folders


def shards(*names: str) -> Break:
    def breaks(model: Path, data: Path) -> None:
        for name in names:
            shutil.copy(data / "train.jsonl", data / name)
        (data / "train.jsonl").unlink()

    return breaks


def folder_for_a_file(model: Path, data: Path) -> None:
    (data / "train.jsonl").unlink()
    (data / "train.parquet").mkdir()


def broken_link(model: Path, data: Path) -> None:
    (data / "train.jsonl").unlink()
    (data / "train.csv").symlink_to(data / "nowhere")


FOLDERS = {
    "missing split": (lambda _, data: (data / "validation.jsonl").unlink(), r"no file for split 'validation' of rte"),
    "missing folder": (lambda *_: ["--data-dir", "nowhere"], r"data_dir 'nowhere' is not a folder"),
    "a file for a folder": (lambda _, data: ["--data-dir", f"{data}/train.jsonl"], r"train.jsonl' is not a folder"),
    "300 characters": (lambda *_: ["--data-dir", "d" * 300], r"--data-dir 'd+\.\.\.d+' is too long"),
    "line break": (lambda *_: ["--data-dir", "a\nb"], r"--data-dir 'a\\nb' cannot be used"),
    "another task's data": (lambda *_: ["--task", "cola"], r"train.jsonl: no column 'sentence'; cola needs"),
    "data for the built-in task": (lambda *_: ["--task", "grammar"], r"grammar is built in and reads no files"),
    "folder for a file": (folder_for_a_file, r"no file for split 'train' of rte"),
    "broken link": (broken_link, r"no file for split 'train' of rte"),
    "two files": (lambda _, data: shutil.copy(data / "train.jsonl", data / "train.json") and None, r"both train.jsonl and"),
    "missing shard": (shards("train-00000-of-00003.jsonl", "train-00002-of-00003.jsonl"), r"2 of 3 files train-\*"),
    "shards of two sets": (shards("train-00000-of-00002.jsonl", "train-00001-of-00003.jsonl"), r"2 of 2 files train-\*"),
    "the same shard twice": (shards("train-0-of-2.jsonl", "train-00-of-2.jsonl"), r"2 of 2 files train-\*"),
    "astronomically many shards": (shards(f"train-0-of-{'9' * 200}.jsonl"), r"1 of 9+\.\.\.9+ files train-\*"),
}  # fmt: skip


@pytest.mark.parametrize("kind", FOLDERS)
def test_data_folders(kind, refuse):
    refuse(*FOLDERS[kind])


# config.json


def config(content: bytes) -> Break:
    def breaks(model: Path, data: Path) -> None:
        (model / "config.json").write_bytes(content)

    return breaks


def fields(**changes: Any) -> Break:
    def breaks(model: Path, data: Path) -> None:
        path = model / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return breaks


WRONG: dict[str, tuple[Any, ...]] = {
    "vocab_size": ("x", True, 0, 1.5, 10**12, 10**400, float("nan")),
    "hidden_size": (None, {}),
    "num_hidden_layers": (0, 10**9),
    "num_attention_heads": (0,),
    "intermediate_size": (52.0,),
    "max_position_embeddings": ([],),
    "type_vocab_size": (-1,),
    "pad_token_id": (-1, "x"),
    "initializer_range": (float("nan"), 1e300),
    "hidden_dropout_prob": (2, 1 - 1e-12, float("nan"), "x"),
    "attention_probs_dropout_prob": (None,),
    "classifier_dropout": (1,),
    "layer_norm_eps": (float("inf"), -1e-12),
    "hidden_act": ("mish", ["gelu"]),
    "model_type": ("t5", ["bert"], None, "a\nb" * 3000),
    "position_embedding_type": ("relative_key", []),
    "is_decoder": (True,),
    "intermediate_sizes": (5, "ab", [52], [52, "a"], [52, 52.0]),
    "key_dims": ([12, -1],),
    "value_dims": ([[12], [12]],),
}
DISTILBERT = {"model_type": "distilbert", "dim": 36, "n_heads": 3, "n_layers": 2, "hidden_dim": 52, "vocab_size": 120}

CONFIGS = {
    **{
        f"{name} of {str(value)[:12]!r}": (fields(**{name: value}), rf"config.json(:| has) {name}\b")
        for name, values in WRONG.items()
        for value in values
    },
    **{
        f"distilbert's {name}": (config(json.dumps({**DISTILBERT, name: 2.5}).encode()), rf"config.json: {name}\b.*2.5")
        for name in ("dim", "n_heads", "n_layers", "hidden_dim", "activation", "dropout", "seq_classif_dropout")
    },
    "distilbert's hidden_size": (
        config(json.dumps({**DISTILBERT, "hidden_size": 2.5}).encode()),
        r"config.json: dim \(hidden_size\) is 2.5",
    ),
    "padding outside the table": (fields(pad_token_id=120), r"pad_token_id=120 is not below vocab_size=120"),
    "no padding": (fields(pad_token_id=None), r"config.json: there is no pad_token_id"),
    "heads that do not divide": (fields(num_attention_heads=5), r"hidden_size=36 is not a multiple of num_attention_heads=5"),
    "layers without weights": (fields(num_hidden_layers=900), r"config.json: 900 layers are more than the \d+ arrays"),
    "not JSON": (config(b"{"), r"config.json is not a JSON object"),
    "a list": (config(b"[]"), r"config.json is not a JSON object but \[\]"),
    "an empty file": (config(b""), r"config.json is not a JSON object"),
    "Latin-1": (config(b'{"model_type": "\xe9"}'), r"config.json is not a JSON object .*position 16"),
    "brackets 100000 deep": (config(b'{"a": ' + b"[" * 100_000), r"config.json is not a JSON object .*recursion"),
    "5000 digits": (config(b'{"vocab_size": ' + b"1" * 5000 + b"}"), r"config.json is not a JSON object .*4300 digits"),
    "missing": (lambda model, _: (model / "config.json").unlink(), r"model has no config.json"),
}  # fmt: skip


@pytest.mark.parametrize("kind", CONFIGS)
def test_model_configurations(kind, refuse):
    refuse(*CONFIGS[kind])


# Weights

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
WORD = "bert.embeddings.word_embeddings.weight"


def weights(change: Callable[[dict[str, np.ndarray]], Any]) -> Break:
    """Save the arrays again after a change."""

    def breaks(model: Path, data: Path) -> None:
        from safetensors.numpy import load_file, save_file

        arrays = load_file(model / SINGLE)
        change(arrays)
        save_file(arrays, model / SINGLE)

    return breaks


def array(name: str, value: np.ndarray) -> Break:
    return weights(lambda arrays: arrays.update({name: value}))


def put(name: str, index: Any, value: float, type: str = "float32") -> Break:
    """Set values of an array."""

    def change(arrays: dict[str, np.ndarray]) -> None:
        arrays[name] = arrays[name].astype(type)
        arrays[name][index] = value

    return weights(change)


def raw(change: Callable[[bytes], bytes]) -> Break:
    """Change the bytes of the file."""
    return lambda model, _: (model / SINGLE).write_bytes(change((model / SINGLE).read_bytes())) and None


def header(**entry: Any) -> Break:
    """Describe the arrays in the header otherwise, before no data."""
    text = json.dumps({WORD: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], **entry}}).encode()
    return raw(lambda content: struct.pack("<Q", len(text)) + text)


def index(content: Any, keep: bool = False, **files: bytes) -> Break:
    """Replace the weights by an index of shards."""

    def breaks(model: Path, data: Path) -> None:
        if not keep:
            (model / SINGLE).unlink()
        (model / INDEX).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        for name, data_ in files.items():
            (model / name).write_bytes(data_)

    return breaks


def folder_for_weights(model: Path, data: Path) -> None:
    (model / SINGLE).unlink()
    (model / SINGLE).mkdir()


WEIGHTS = {
    "one NaN": (put(WORD, (3, 5), np.nan), rf"{SINGLE}: 1 of the 4320 values of {WORD} are NaN or infinite"),
    "infinities": (put("bert.encoder.layer.1.output.dense.bias", slice(4), -np.inf), r"4 of the 36 values of .*layer.1.*are"),
    "NaN in half precision": (put(WORD, 0, np.nan, "float16"), rf"36 of the 4320 values of {WORD}"),
    "beyond float32": (put(WORD, (0, 0), 1e300, "float64"), rf"1 of the 4320 values of {WORD}"),
    "integers": (array(WORD, np.zeros((120, 36), np.int8)), r"word_embeddings.weight has type I8, expected F32, F16, BF16, F64"),
    "booleans": (array(WORD, np.zeros((120, 36), bool)), r"word_embeddings.weight has type BOOL, expected"),
    "no rows": (array(WORD, np.zeros((0, 36), np.float32)), r"has shape \(0, 36\), expected \(120, 36\)"),
    "other shape": (fields(vocab_size=121), r"word_embeddings.weight has shape \(120, 36\), expected \(121, 36\)"),
    "other layers": (fields(num_hidden_layers=12), r"160 mismatches: encoder.layer.\{2,3,4.*; and so on"),
    "line break in a name": (array("a\nb" * 99, np.zeros(1, np.float32)), r"1 mismatches: a\\nba\\nb.* is unexpected|a\\nb"),
    "none at all": (weights(lambda arrays: arrays.clear()), r"2 layers are more than the 0 arrays"),
    "truncated": (raw(lambda content: content[:-100]), r"model.safetensors is truncated or not a safetensors file"),
    "empty": (raw(lambda content: b""), r"model.safetensors is truncated or not a safetensors file"),
    "garbage": (raw(lambda content: b"\xff" * 5000), r"model.safetensors is truncated or not a safetensors file"),
    "a header of 10**12 bytes": (raw(lambda content: struct.pack("<Q", 10**12) + content), r"is truncated or not .*[Hh]eader"),
    "a header that is no JSON": (raw(lambda content: content[:8] + b"x" * 5000), r"is truncated or not .*[Hh]eader"),
    "arrays beyond the end": (header(shape=[10**6], data_offsets=[0, 4 * 10**6]), r"model.safetensors is truncated"),
    "a shape beyond 64 bits": (header(shape=[2**62, 2**62]), r"model.safetensors is truncated"),
    "an unknown type": (header(dtype="X9"), r"model.safetensors is truncated"),
    "missing": (lambda model, _: (model / SINGLE).unlink(), r"has no weights; expected model.safetensors or"),
    "a pickle alone": (lambda model, _: (model / SINGLE).rename(model / "pytorch_model.bin") and None, r"only as a pickle"),
    "a folder": (folder_for_weights, r"has no weights; expected model.safetensors or"),
    "an index that is no JSON": (index(b"{"), rf"{INDEX} is not an index of shards"),
    "an index 100000 deep": (index(b'{"weight_map": ' + b"[" * 100_000), rf"{INDEX} is not an index of shards .*recursion"),
    "an index without a map": (index({"weight_map": [1]}), rf"{INDEX} is not an index of shards"),
    "a number for a shard": (index({"weight_map": {WORD: 3}}), rf"{INDEX} is not an index of shards"),
    "a shard outside": (index({"weight_map": {WORD: "../x.safetensors"}}), rf"{INDEX} is not .*not a plain file name"),
    "a shard that is missing": (index({"weight_map": {WORD: "b"}}), rf"lacks 1 shards that {INDEX} names: b"),
    "a shard of 300 characters": (index({"weight_map": {WORD: "b" * 300}}), rf"lacks 1 shards that {INDEX} names: b+\.\.\."),
    "a shard that is empty": (index({"weight_map": {WORD: "b"}}, b=b""), r"model/b is truncated or not a safetensors file"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WEIGHTS)
def test_weights(kind, refuse):
    refuse(*WEIGHTS[kind])


# Tokenizers


def tokenizer(**changes: Any) -> Break:
    """Change parts of tokenizer.json."""

    def breaks(model: Path, data: Path) -> None:
        path = model / "tokenizer.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return breaks


def side(content: Any) -> Break:
    return lambda model, _: (model / "tokenizer_config.json").write_bytes(content) and None


def bytes_of(content: bytes) -> Break:
    return lambda model, _: (model / "tokenizer.json").write_bytes(content) and None


def processor(type_id: int, cls: int = 2) -> dict[str, Any]:
    """A post-processor whose second text has this type and whose first token is this one."""
    a, b = ({"Sequence": {"id": "AB"[i], "type_id": i * type_id}} for i in range(2))
    start = {"SpecialToken": {"id": "S", "type_id": 0}}
    special = {"S": {"id": "S", "ids": [cls], "tokens": ["S"]}}
    return {"type": "TemplateProcessing", "single": [start, a], "pair": [start, a, b], "special_tokens": special}


WORDS = {
    "type": "WordPiece",
    "vocab": {"a": 0},
    "unk_token": "U",
    "continuing_subword_prefix": "##",
    "max_input_chars_per_word": 99,
}

TOKENIZERS = {
    "missing": (lambda model, _: (model / "tokenizer.json").unlink(), r"no tokenizer.json in '.*model'"),
    "empty": (bytes_of(b""), r"tokenizer.json: not a tokenizer"),
    "not JSON": (bytes_of(b"{"), r"tokenizer.json: not a tokenizer"),
    "not UTF-8": (bytes_of(b"\xff"), r"tokenizer.json: not a tokenizer"),
    "another's JSON": (bytes_of(b'{"a": 1}'), r"tokenizer.json: not a tokenizer"),
    "brackets 100000 deep": (bytes_of(b'{"model": ' + b"[" * 100_000), r"tokenizer.json: not a tokenizer"),
    "unknown model": (tokenizer(model={"type": "Magic"}), r"tokenizer.json: not a tokenizer"),
    "a word list that is none": (tokenizer(model={"type": "WordLevel", "vocab": [1]}), r"tokenizer.json: not a tokenizer"),
    "no word for the unknown": (tokenizer(model=WORDS), r"tokenizer.json: cannot tokenize \(.*UNK"),
    "no token of a text": (
        tokenizer(model={"type": "BPE", "vocab": {}, "merges": []}, post_processor=None),
        r"tokenizer.json: makes no token of row 0 of .*train.jsonl",
    ),
    "a special token that is not there": (
        tokenizer(post_processor={**processor(1), "special_tokens": {}}),
        r"tokenizer.json: cannot tokenize \(no entry found",
    ),
    "an id beyond 31 bits": (tokenizer(post_processor=processor(1, cls=2**31)), r"tokenizer.json: cannot tokenize"),
    "a type beyond 8 bits": (tokenizer(post_processor=processor(300)), r"tokenizer.json: cannot tokenize"),
    "no room for text": (lambda *_: ["--max-length", "4"], r"max_length is 4; expected at least 5, as 3 tokens are special"),
    "longer than the model": (lambda *_: ["--max-length", str(10**30)], r"--max-length 10+ is more than the model's 48"),
    "a truncation side of 3": (side(b'{"truncation_side": 3}'), r"tokenizer_config.json: truncation_side is 3; expected 'left'"),
    "a list for a truncation side": (side(b'{"truncation_side": ["left"]}'), r"truncation_side is \['left'\]"),
    "a list for settings": (side(b"[]"), r"tokenizer_config.json: not a readable JSON object"),
    "settings 100000 deep": (side(b'{"a": ' + b"[" * 100_000), r"tokenizer_config.json: not a readable JSON object .*recursion"),
}  # fmt: skip


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_tokenizers(kind, refuse):
    refuse(*TOKENIZERS[kind])


# Names of models

NAMES = {
    "a missing folder": ("./no/such/model", r"'./no/such/model' is not a folder"),
    "an absolute one": ("/no/such/model", r"'/no/such/model' is not a folder"),
    "nothing on the hub": ("nobody/nothing", r"nobody/nothing not found: .*HF_HUB_OFFLINE forbids a download"),
    "three parts": ("a/b/c", r"'a/b/c' is not a folder"),
    "300 characters": ("h" * 300, r"--model 'hhhh+\.\.\.h+' is too long"),
    "an unknown user": ("~nouser", r"--model '~nouser' cannot be used: could not determine home"),
    "his folder": ("~nouser/x", r"--model '~nouser/x' cannot be used: could not determine home"),
    "a line break": ("a\nb", r"--model 'a\\nb' cannot be used; expected a text"),
    "undecodable": ("a\udcff", r"--model 'a\\udcff' cannot be used; expected a text"),
    "two words": ("two words", r"'two words' is neither a folder nor a hub id"),
    "a space": (" ", r"--model ' ' cannot be used; expected a text"),
    "here": (".", r"\. has no config.json"),
    "the root": ("/", r"/ has no config.json"),
    "a file": ("data/train.jsonl", r"'data/train.jsonl' is a file; expected a GGUF file, or the folder"),
}


@pytest.mark.parametrize("kind", NAMES)
def test_names_of_models(kind, refuse):
    name, message = NAMES[kind]
    refuse(lambda *_: ["--model", name], message)
