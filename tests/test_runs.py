"""Loading what a run left: texts to labels, and what is wrong said in one line."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune import find_sites, load_adapters, load_run, save_adapters
from jaxprune.adapters import init_bottleneck
from jaxprune.errors import UsageError
from jaxprune.models import load_classifier, save_classifier
from jaxprune.runs import PREDICT, Reading
from tests.experiments.conftest import tiny_bert  # noqa: F401


@pytest.fixture(scope="module")
def left(tiny_bert, tmp_path_factory):  # noqa: F811
    """Two folders as a run leaves them: a regression as a model of its own, and bottlenecks on a pair of texts."""
    folder = tmp_path_factory.mktemp("left")
    number = load_classifier(tiny_bert, num_labels=1, regression=True)
    reading = Reading(None, ("sentence1", "sentence2"), (), 32, "float32")
    save_classifier(
        folder / "number" / "model", number.config, number.params, tokenizer=tiny_bert, labels=(),
        beside={PREDICT: reading.content()},
    )  # fmt: skip
    model = load_classifier(tiny_bert, num_labels=2, seed=3)
    sites = find_sites(model.params)[:3]
    adapters, masks = init_bottleneck(jax.random.key(0), sites, {site.path: 2 for site in sites})
    masks = {path: mask.at[0].set(0.0) for path, mask in masks.items()}
    heads = {f"head/out/{name}": leaf + 1.0 for name, leaf in model.params["head"]["out"].items()}
    beside = {PREDICT: Reading(str(tiny_bert), ("text",), ("no", "yes"), 10, "float32").content()}
    beside |= {name: (tiny_bert / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")}
    save_adapters(adapters, masks, folder / "adapter", weights=heads, beside=beside)
    return folder, adapters, masks, heads


def test_adapters_come_back_as_they_were(left):
    folder, *saved = left
    found = load_adapters(folder / "adapter")
    assert jax.tree.structure(found) == jax.tree.structure(tuple(saved))
    jax.tree.map(np.testing.assert_array_equal, found, tuple(saved))
    again, (adapters, _, heads) = load_run(folder / "adapter"), saved
    np.testing.assert_array_equal(again.model.params["head"]["out"]["bias"], heads["head/out/bias"])
    assert jax.tree.structure(again.adapters) == jax.tree.structure(adapters) and "text -> no, yes" in repr(again)


def test_numbers_and_labels(left):
    """Each example alone, unpadded, through the model itself."""
    folder, *_ = left
    run = load_run(folder / "number")
    pairs = [("one two", "three"), ("four " * 9, "five " * 20), ("six", "seven words are cut")] * 13
    numbers = run.predict(pairs)
    for pair, number in zip(pairs[:3], numbers, strict=False):
        tokens = run._tokenizer.encode(*pair)
        assert len(tokens.ids) <= 32
        ids, types = jnp.array([tokens.ids]), jnp.array([tokens.type_ids])
        alone = run.model.model.apply({"params": run.model.params}, ids, token_type_ids=types)
        assert number == pytest.approx(float(alone[0, 0]), abs=1e-5)
    assert numbers[:3] == pytest.approx(numbers[36:], abs=1e-5) and run.predict([]) == []
    for one in load_run(folder).predict(["one two three", ""]):
        assert set(one.probabilities) == {"no", "yes"} and one.label == max(
            one.probabilities, key=one.probabilities.get
        )
        assert sum(one.probabilities.values()) == pytest.approx(1.0)


def test_wrong_examples_are_refused(left):
    run, pairs = load_run(left[0]), load_run(left[0] / "number")
    for examples, why in {
        "one text": "expected a list of texts",
        ("a", 3): "example 1 is 3",
        (("a", "b"),): "example 0",
    }.items():
        with pytest.raises(UsageError, match=why):
            run.predict(examples)
    for examples in (["a"], [("a",)], [("a", "b", "c")], [("a", None)], ["ab"], {"a": "b"}, None):
        with pytest.raises(UsageError, match=r"expected a list of pairs of texts .sentence1 and sentence2."):
            pairs.predict(examples)


def damaged(folder, name, change):
    path = folder / name
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


WRONG = {
    "nothing": (lambda f: (f / PREDICT).unlink(), "holds no finished run"),
    "no json": (lambda f: (f / PREDICT).write_text("{"), "predict.json is damaged"),
    "labels": (lambda f: damaged(f, PREDICT, lambda x: {**x, "labels": [1, 2]}), "predict.json is damaged"),
    "length": (lambda f: damaged(f, PREDICT, lambda x: {**x, "max_length": 10**30}), "predict.json is damaged"),
    "long": (lambda f: damaged(f, PREDICT, lambda x: {**x, "max_length": 900}), "more than the 48 positions"),
    "field": (lambda f: damaged(f, PREDICT, lambda x: {**x, "more": 1}), "predict.json is damaged"),
    "dtype": (lambda f: damaged(f, PREDICT, lambda x: {**x, "dtype": "int8"}), "dtype is 'int8'"),
    "base": (lambda f: damaged(f, PREDICT, lambda x: {**x, "base_model": None}), "names no base_model; pass model"),
    "gone": (lambda f: damaged(f, PREDICT, lambda x: {**x, "base_model": "./gone"}), "'./gone' is not a folder"),
    "tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizer.json cannot be used"),
    "format": (lambda f: damaged(f, "adapters.json", lambda x: {**x, "version": 1}), "is not of version 2"),
    "kind": (
        lambda f: damaged(f, "adapters.json", lambda x: {**x, "adapters": {"a": {"kind": "Os", "settings": {}}}}),
        "unknown kind 'Os'",
    ),
    "arrays": (lambda f: (f / "adapters.safetensors").write_bytes(b"short"), "cannot be read as adapters"),
    "list": (lambda f: damaged(f, "adapters.json", lambda x: {**x, "adapters": [1]}), "cannot be read as adapters"),
    "lost": (
        lambda f: damaged(
            f,
            "adapters.json",
            lambda x: {**x, "weights": x["weights"][1:]},
        ),
        "belongs to no adapter",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_damaged_folder_is_one_line(what, left, tmp_path):
    folder = tmp_path / "adapter"
    shutil.copytree(left[0] / "adapter", folder)
    change, why = WRONG[what]
    change(folder)
    with pytest.raises(UsageError, match=why):
        load_run(folder)


def test_only_what_was_written_is_replaced(left, tmp_path):
    _, adapters, masks, _ = left
    save_adapters(adapters, masks, tmp_path / "a")
    save_adapters(adapters, masks, tmp_path / "a")
    (tmp_path / "a" / "mine.txt").touch()
    with pytest.raises(UsageError, match="holds other files, such as 'mine.txt'"):
        save_adapters(adapters, masks, tmp_path / "a")
    with pytest.raises(UsageError, match="expected one of jaxprune.adapters"):
        save_adapters({"a": 3}, {}, tmp_path / "b")
    with pytest.raises(UsageError, match="holds no finished run"):
        load_run(tmp_path / "a")
