"""Tokens against `transformers`, and their cache."""

import json

import numpy as np
import pytest

from experiments.data import tokens
from experiments.data.rows import Rows
from experiments.data.tokens import check_ids, encode
from experiments.tasks import get_task
from experiments.tasks.classification import TASKS
from jaxprune.errors import UsageError
from jaxprune.models import EncoderConfig

AWKWARD = [
    "Plain words.",
    "",
    " \t\n ",
    "Ünïcödé, naïve café — “quotes” … 東京 emoji 🙂 \u200b\ufeff",
    "don't [SEP] [MASK] <s> </s> 3.14159 $1,000",
    "supercalifragilisticexpialidocious " * 9,
    "word " * 300,
]


def pairs_of(texts):
    return Rows(
        ([a for a in texts for _ in texts], [b for _ in texts for b in texts]),
        np.zeros(len(texts) ** 2, np.int32),
        "test",
    )


def assert_equals_transformers(rows: Rows, model_dir, max_length: int) -> None:
    from transformers import AutoTokenizer

    expected = AutoTokenizer.from_pretrained(model_dir)(
        *rows.texts, truncation=True, max_length=max_length, return_token_type_ids=True
    )
    encoded = encode(rows, model_dir, max_length, cache_dir=None)
    assert encoded.ids.dtype == np.int32 and encoded.offsets.dtype == np.int64
    np.testing.assert_array_equal(np.diff(encoded.offsets), [len(ids) for ids in expected["input_ids"]])
    np.testing.assert_array_equal(encoded.ids, np.concatenate(expected["input_ids"]))
    np.testing.assert_array_equal(encoded.type_ids, np.concatenate(expected["token_type_ids"]))
    np.testing.assert_array_equal(encoded.labels, rows.labels)


@pytest.mark.parametrize("max_length", [6, 16, 128])
def test_tokens_equal_transformers(bert_like, roberta_like, max_length):
    for model_dir in (bert_like, roberta_like):
        assert_equals_transformers(pairs_of(AWKWARD), model_dir, max_length)
        assert_equals_transformers(Rows((AWKWARD,), np.arange(len(AWKWARD)), "test"), model_dir, max_length)


def test_truncation_side_of_the_model_folder(bert_like):
    config = bert_like / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "truncation_side": "left"}))
    assert_equals_transformers(pairs_of(AWKWARD), bert_like, 12)


def test_minilm_equals_transformers(minilm):
    for max_length in (7, 64):
        assert_equals_transformers(pairs_of(AWKWARD), minilm, max_length)


@pytest.mark.parametrize("task", [name for name, task in TASKS.items() if task.hub])
def test_real_data_equals_transformers(task, minilm, real_data):
    for rows in get_task(task).rows(real_data / "glue", 300).values():
        assert_equals_transformers(rows, minilm, 48)


@pytest.fixture
def rows():
    return Rows((["one two", "three"], ["four", "five six seven"]), np.array([0, 1], np.int32), "test")


def equal(one, other) -> bool:
    return all(np.array_equal(getattr(one, k), getattr(other, k)) for k in ("ids", "type_ids", "offsets", "labels"))


def test_cache_spares_the_tokenizer(rows, bert_like, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    first = encode(rows, bert_like, cache_dir=cache)
    assert len(list(cache.iterdir())) == 1
    monkeypatch.setattr(tokens, "_tokenize", None)
    assert equal(encode(rows, bert_like, cache_dir=cache), first)


def test_cache_knows_what_it_depends_on(rows, bert_like, roberta_like, tmp_path):
    cache = tmp_path / "cache"
    moved = Rows((["one", "two three"], rows.texts[1]), rows.labels, "test")
    joined = Rows((["one two", "three", "four", "five six seven"],), np.array([0, 1, 0, 1], np.int32), "test")
    relabelled = Rows(rows.texts, rows.labels[::-1], "test")
    cases = [(rows, bert_like, 128), (rows, bert_like, 6), (rows, roberta_like, 128)]
    cases += [(other, bert_like, 128) for other in (moved, joined, relabelled)]
    for count, case in enumerate(cases, 1):
        assert equal(encode(*case, cache_dir=cache), encode(*case, cache_dir=None))
        assert len(list(cache.iterdir())) == count


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "other", "types", "offsets"])
def test_damaged_cache_is_made_anew(rows, bert_like, tmp_path, damage):
    good = encode(rows, bert_like, cache_dir=tmp_path)
    (path,) = tmp_path.glob("*.npz")
    whole = path.read_bytes()
    arrays = vars(good)
    if damage == "other":
        np.savez(path, ids=good.ids)
    elif damage == "types":
        np.savez(path, **{**arrays, "ids": good.ids.astype(float)})
    elif damage == "offsets":
        np.savez(path, **{**arrays, "offsets": good.offsets[[0, 2, 2]]})
    else:
        middle = whole.index(good.ids.tobytes())
        flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
        path.write_bytes({"truncated": whole[:-30], "flipped": flipped, "empty": b""}[damage])
    assert equal(encode(rows, bert_like, cache_dir=tmp_path), good)
    with np.load(path) as arrays:  # and it is whole again
        np.testing.assert_array_equal(arrays["ids"], good.ids)


def test_a_cache_that_cannot_be_written_is_only_a_warning(rows, bert_like, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    encoded = encode(rows, bert_like, cache_dir=tmp_path / "file" / "cache")
    encode(rows, bert_like, 16, cache_dir=tmp_path / "file" / "cache")
    (record,) = caplog.records
    assert "tokens are not kept" in record.getMessage() and record.levelname == "WARNING"
    assert equal(encoded, encode(rows, bert_like, cache_dir=None))


def test_the_default_cache_is_the_users(rows, bert_like, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    encode(rows, bert_like)
    assert len(list((tmp_path / "jaxprune" / "tokens").glob("*.npz"))) == 1


def test_no_cache_writes_nothing(rows, bert_like, tmp_path, monkeypatch):
    monkeypatch.setattr(tokens, "_write_cache", None)
    encode(rows, bert_like, cache_dir=None)


def test_model_folder_without_tokenizer(rows, tmp_path):
    with pytest.raises(UsageError, match=r"no tokenizer\.json in"):
        encode(rows, tmp_path, cache_dir=None)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UsageError, match=r"tokenizer\.json: not a tokenizer"):
        encode(rows, tmp_path, cache_dir=None)


def test_ids_beyond_the_tables(rows, bert_like):
    encoded = encode(rows, bert_like, cache_dir=None)
    last = int(encoded.ids.max())
    assert set(encoded.type_ids) == {0, 1}
    check_ids(encoded, EncoderConfig(vocab_size=last + 1), bert_like)
    with pytest.raises(UsageError, match=rf"tokenizer.json: makes token {last}, where .* vocab_size {last};"):
        check_ids(encoded, EncoderConfig(vocab_size=last), bert_like)
    with pytest.raises(UsageError, match="makes token type 1, where .* type_vocab_size 1;"):
        check_ids(encoded, EncoderConfig(type_vocab_size=1), bert_like)
    check_ids(encoded, EncoderConfig(family="distilbert", type_vocab_size=0), bert_like)


def test_no_limit_to_the_length(rows, bert_like):
    whole = encode(rows, bert_like, cache_dir=None)
    assert equal(encode(rows, bert_like, 10**5000, cache_dir=None), whole)


def test_max_length_without_room(rows, bert_like, roberta_like):
    with pytest.raises(UsageError, match="max_length is 4; expected at least 5, as 3 tokens are special"):
        encode(rows, bert_like, 4, cache_dir=None)
    with pytest.raises(UsageError, match="expected at least 6"):
        encode(rows, roberta_like, 5, cache_dir=None)
