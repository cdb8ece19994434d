"""Files from outside that are broken, hostile or merely odd: one clear line each, before anything is computed."""

from __future__ import annotations

import csv
import decimal
import gzip
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.experiments.refusals import assert_refused, command

ROW = {"sentence1": "one two", "sentence2": "three", "label": 1}
TSV = "sentence1\tsentence2\tlabel\n"


def line(**changes) -> bytes:
    """A good row and one with changes, as JSON lines."""
    return (json.dumps(ROW) + "\n" + json.dumps({**ROW, **changes}) + "\n").encode()


def raw(label: str) -> bytes:
    """A row whose label is written as it stands."""
    return b'{"sentence1": "one", "sentence2": "two", "label": ' + label.encode() + b"}\n"


def damaged(body: bytes) -> bytes:
    """Compress, and overwrite the middle of the compressed body."""
    packed = gzip.compress(body * 200)
    return packed[:20] + b"\xff" * 20 + packed[40:]


def parquet(**columns) -> bytes:
    """Two good rows with other columns, or with arrays of any type instead of them."""
    import pyarrow as pa
    import pyarrow.parquet

    table = pa.table({**{name: pa.array([value] * 2) for name, value in ROW.items()}, **columns})
    pa.parquet.write_table(table, sink := io.BytesIO())
    return sink.getvalue()


def twice() -> bytes:
    import pyarrow as pa
    import pyarrow.parquet

    columns = [pa.array([value]) for value in (*ROW.values(), 0)]
    pa.parquet.write_table(pa.table(columns, names=[*ROW, "label"]), sink := io.BytesIO())
    return sink.getvalue()


def arrow(values, kind: str):
    import pyarrow as pa

    kinds = {
        "binary": pa.binary(),
        "struct": pa.struct([("text", pa.string())]),
        "list": pa.list_(pa.string()),
        "null": pa.null(),
        "timestamp": pa.timestamp("s"),
    }
    return pa.array(values, kinds[kind])


# name of the training file -> its content, and what must be said.
ROWS = {
    "wrong label column": ("train.jsonl", lambda: json.dumps({"lable": 1, **ROW, "label": 1}).replace('"label"', '"x"').encode(), r""),
    "label out of range": ("train.jsonl", lambda: line(label=7), r""),
    "label that is NaN": ("train.jsonl", lambda: raw("NaN"), r""),
    "label that is infinite": ("train.jsonl", lambda: raw("Infinity"), r""),
    "label that is true": ("train.jsonl", lambda: raw("true"), r""),
    "label of 400 digits": ("train.jsonl", lambda: raw("1" + "0" * 399), r""),
    "label of 400 digits as text": ("train.jsonl", lambda: raw('"1' + "0" * 399 + '"'), r""),
    "label of 5000 digits": ("train.jsonl", lambda: raw("1" * 5000), r""),
    "label of 5000 digits json": ("train.json", lambda: b"[" + raw("1" * 5000) + b"]", r""),
    "label of 1e400": ("train.jsonl", lambda: raw("1e400"), r""),
    "label that is a list": ("train.jsonl", lambda: raw("[1]"), r""),
    "label that is null": ("train.jsonl", lambda: raw("null"), r""),
    "missing text": ("train.jsonl", lambda: line(sentence2=None), r""),
    "text number": ("train.jsonl", lambda: line(sentence2=float("nan")), r""),
    "lone surrogate": ("train.jsonl", lambda: line(sentence2="a\ud800b"), r""),
    "no rows": ("train.jsonl", lambda: b"", r""),
    "empty json": ("train.json", lambda: b"", r""),
    "empty csv": ("train.csv", lambda: b"", r""),
    "empty tsv gz": ("train.tsv.gz", lambda: gzip.compress(b""), r""),
    "empty gz": ("train.jsonl.gz", lambda: b"", r""),
    "empty parquet": ("train.parquet", lambda: b"", r""),
    "no rows parquet": ("train.parquet", lambda: parquet(sentence1=arrow([], "null"), sentence2=arrow([], "null"), label=arrow([], "null")), r""),
    "empty list": ("train.json", lambda: b"[]", r""),
    "broken line": ("train.jsonl", lambda: line() + b"{oops\n", r""),
    "row is list": ("train.json", lambda: b"[[1, 2]]", r""),
    "deep json": ("train.json", lambda: b"[" * 100_000, r""),
    "deep jsonl": ("train.jsonl", lambda: raw("[" * 100_000), r""),
    "deep closed": ("train.jsonl", lambda: raw("[" * 100_000 + "]" * 100_000), r""),
    "deep a bit": ("train.jsonl", lambda: raw("[" * 900 + "]" * 900), r""),
    "deep text": ("train.jsonl", lambda: b'{"sentence2": "a", "label": 1, "sentence1": ' + b'{"a":' * 900 + b"1" + b"}" * 900 + b"}", r""),
    "NUL jsonl": ("train.jsonl", lambda: b"\0\0\0", r""),
    "utf-16": ("train.csv", lambda: "sentence1,sentence2,label\na,b,1\n".encode("utf-16"), r""),
    "utf-16 no bom": ("train.csv", lambda: "sentence1,sentence2,label\na,b,1\n".encode("utf-16-le"), r""),
    "utf-16 no bom jsonl": ("train.jsonl", lambda: line().decode().encode("utf-16-le"), r""),
    "latin": ("train.tsv", lambda: TSV.encode() + b"\xe9\tb\t1\n", r""),
    "newline in name": ("train.json", lambda: json.dumps([{"sen\ntence1": "a", "\ud800": "b"}]).encode(), r""),
    "many columns": ("train.json", lambda: json.dumps([{f"name{i}" * 40: "a" for i in range(2000)}]).encode(), r""),
    "damaged gz": ("train.jsonl.gz", lambda: damaged(line()), r""),
    "gz that is none": ("train.csv.gz", lambda: b"sentence1,sentence2,label\na,b,1\n", r""),
    "truncated gz": ("train.jsonl.gz", lambda: gzip.compress(line())[:-12], r""),
    "wrong crc gz": ("train.jsonl.gz", lambda: gzip.compress(line())[:-8] + b"\0" * 8, r""),
    "gz trailing garbage": ("train.jsonl.gz", lambda: gzip.compress(line()) + b"garbage", r""),
    "header only": ("train.csv", lambda: b"sentence1,sentence2,label\n", r""),
    "dup header": ("train.csv", lambda: b"sentence1,sentence2,label,label\na,b,1,0\n", r""),
    "dup header tsv": ("train.tsv", lambda: b"sentence1\tsentence2\tlabel\tlabel\na\tb\t1\t0\n", r""),
    "empty header": ("train.csv", lambda: b",,\na,b,1\n", r""),
    "ragged": ("train.csv", lambda: b"sentence1,sentence2,label\na,b\n", r""),
    "ragged long names": ("train.csv", lambda: b",".join(b"x" * 300 for _ in range(100)) + b"\na,b\n", r""),
    "open quote": ("train.csv", lambda: b'sentence1,sentence2,label\n"a,b,1\n', r""),
    "cr": ("train.csv", lambda: b"sentence1,sentence2,label\ra,b,1\r", r""),
    "label 1e300 csv": ("train.csv", lambda: b"sentence1,sentence2,label\na,b,1e300\n", r""),
    "truncated parquet": ("train.parquet", lambda: b"PAR1 and no more", r""),
    "cut parquet": ("train.parquet", lambda: parquet()[:-60], r""),
    "middle parquet": ("train.parquet", lambda: parquet()[:30] + b"\xff" * 60 + parquet()[90:], r""),
    "binary text": ("train.parquet", lambda: parquet(sentence1=arrow([b"a", b"b"], "binary")), r""),
    "struct text": ("train.parquet", lambda: parquet(sentence1=arrow([{"text": "a"}] * 2, "struct")), r""),
    "list label": ("train.parquet", lambda: parquet(label=arrow([["a"]] * 2, "list")), r""),
    "null label": ("train.parquet", lambda: parquet(label=arrow([None] * 2, "null")), r""),
    "timestamp label": ("train.parquet", lambda: parquet(label=arrow([0, 2**60], "timestamp")), r""),
    "dup parquet": ("train.parquet", twice, r""),
}


def prepare(case, model, data):
    name, content, message = case
    (data / "train.jsonl").unlink()
    (data / name).write_bytes(content())
    return ["--model", str(model), "--data-dir", str(data)]


# Scratch tables.
def setconfig(**changes):
    def f(model, data):
        p = model / "config.json"
        p.write_text(json.dumps({**json.loads(p.read_text()), **changes}))
    return f

def rawconfig(content):
    return lambda model, data: (model / "config.json").write_bytes(content() if callable(content) else content) and None

def drop(*names):
    def f(model, data):
        p = model / "config.json"
        p.write_text(json.dumps({k: v for k, v in json.loads(p.read_text()).items() if k not in names}))
    return f

BERT = "vocab_size hidden_size num_hidden_layers num_attention_heads intermediate_size max_position_embeddings type_vocab_size pad_token_id initializer_range hidden_act hidden_dropout_prob attention_probs_dropout_prob classifier_dropout layer_norm_eps".split()
VALUES = ["x", [1], None, True, float("nan"), float("inf"), -1, 0, 0.5, 2, 10**12, 10**30, {}, "1"]
CONFIG = {f"{n}={str(v)[:9]!r}": (setconfig(**{n: v}), "") for n in BERT for v in VALUES}
OTHER = dict(position_embedding_type=["relative_key", [], 3, {}], is_decoder=["x", True, []], num_labels=["x", -1, None, 10**12, [], 10**9, True, 2.5],
  id2label=["x", [], [1,2], {"a": 1}, {"0": []}, {"1": "a"}, {"0": "a\nb"}, 5, None], label2id=["x", [], 5, {"a": "b"}], intermediate_sizes=["x", 5, [], [1], [52, "a"], [52, 0], [52, True], [52, 52.0], {}, [float("nan"), 52], [10**30, 52], [[1],[2]]],
  key_dims=[[12, 10**12], "ab", [12, -1]], value_dims=[[1.5, 12], [None, None]], model_type=[[], {}, 3, None, "x\ny", "b" * 5000], dtype=["x", 3, []], torch_dtype=["x", 3], architectures=["x", 3, [3]],
  problem_type=["x", 3], transformers_version=[3, []], use_cache=["x", []], output_attentions=[True, "x"], return_dict=[False, "x"], quantization_config=["x", {"quant_method": "gptq"}, {}], auto_map=["x", {"AutoConfig": "evil.Evil"}], tie_word_embeddings=[3], chunk_size_feed_forward=["x", -1], bos_token_id=["x", []], eos_token_id=[[], "x"], _name_or_path=[3, []], attn_implementation=["x"], _attn_implementation=["x", 3], rope_parameters=["x"], generation_config=["x"], torchscript=["x"], gradient_checkpointing=["x", True], pruned_heads=[{"0": [1]}, "x"], temperature=[2.0, "x"], max_length=[5], is_encoder_decoder=["x", True], label_names=[3], hidden_sizes=[3], attribute_map=[{"hidden_size": "x"}], sub_configs=[3], num_parameters=[3], to_dict=[3], from_hf=[3], keys_to_ignore_at_inference=[3], name_or_path=[3], use_return_dict=[3], base_config_key=[3], add_cross_attention=[True], transformers_weights=["x"], validate=[3], layer_types=["x", [3]], update=[3])
CONFIG2 = {f"{n}={str(v)[:19]!r}": (setconfig(**{n: v}), "") for n, vs in OTHER.items() for v in vs}
CONFIG2 |= {"garbage": (rawconfig(b"{"), ""), "list": (rawconfig(b"[]"), ""), "null": (rawconfig(b"null"), ""), "empty": (rawconfig(b""), ""), "latin": (rawconfig(b'{"a": "\xe9"}'), ""),
  "deep": (rawconfig(lambda: b'{"model_type": "bert", "x": ' + b"[" * 100000 + b"}"), ""), "deep ok": (rawconfig(lambda: b'{"model_type": "bert", "x": ' + b"[" * 900 + b"]" * 900 + b"}"), ""), "deep ok 300": (setconfig(x=json.loads("[" * 300 + "]" * 300)), ""),
  "digits": (rawconfig(b'{"model_type": "bert", "vocab_size": ' + b"1" * 5000 + b"}"), ""), "digits400": (setconfig(vocab_size=10**400), ""), "bom": (lambda m, d: (m / "config.json").write_bytes(b"\xef\xbb\xbf" + (m / "config.json").read_bytes()) and None, ""),
  "surrogate key": (setconfig(**{"\ud800": 1}), ""), "surrogate value": (setconfig(hidden_act="\ud800"), ""), "newline key": (setconfig(**{"a\nb": 1}), ""), "empty key": (setconfig(**{"": 1}), ""), "twice": (rawconfig(lambda: b'{"model_type": "bert", "hidden_act": 1, "hidden_act": "x"}'), ""), "folder": (lambda m, d: ((m / "config.json").unlink(), (m / "config.json").mkdir()) and None, ""), "missing": (lambda m, d: (m / "config.json").unlink() and None, "")}
CONFIG2 |= {f"no {n}": (drop(n), "") for n in BERT}
DIS = {"dim": 36, "n_heads": 3, "n_layers": 2, "hidden_dim": 52}
def distil(**c):
    return rawconfig(json.dumps({"model_type": "distilbert", "vocab_size": 120, "max_position_embeddings": 48, "pad_token_id": 0, **DIS, **c}).encode())
CONFIG3 = {f"distil {n}={str(v)[:9]!r}": (distil(**{n: v}), "") for n in ["dim", "n_heads", "n_layers", "hidden_dim", "activation", "dropout", "attention_dropout", "seq_classif_dropout", "vocab_size"] for v in ["x", [1], None, True, float("nan"), -1, 0, 2, 10**12]}

def prepare(case, model, data):
    extra = case[0](model, data) or ()
    return ["--model", str(model), "--data-dir", str(data), "--targets", "nothing", *extra]
