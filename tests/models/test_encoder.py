"""Packing, padding, types, dropout: properties of the encoder that need no reference implementation."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune.errors import UsageError
from jaxprune.models import EncoderConfig, SequenceClassifier, classifier_torch_paths, init_classifier
from jaxprune.models.pretrained import parameter_shapes
from jaxprune.sites import find_sites, flatten
from tests.models import tiny

_SMALL = dict(
    vocab_size=101, hidden_size=36, num_heads=3, num_layers=2, intermediate_size=52, initializer_range=0.3, num_labels=3
)
_NO_DROPOUT = dict.fromkeys(
    ("embedding_dropout", "attention_dropout", "attention_output_dropout", "mlp_dropout", "classifier_dropout"), 0.0
)


def small(family: str, **changes) -> EncoderConfig:
    own = {
        "bert": dict(max_positions=tiny.LENGTH, type_vocab_size=3),
        "roberta": dict(max_positions=tiny.LENGTH + 2, position_offset=2, pad_token_id=1, type_vocab_size=1),
        "distilbert": dict(max_positions=tiny.LENGTH, type_vocab_size=0),
    }[family]
    return EncoderConfig(**{"family": family, **_SMALL, **own, **changes})


def _alone(model, params, ids, types):
    def row(values, fill):
        return jnp.asarray([*values, *[fill] * (tiny.LENGTH - len(values))])[None]

    pad = model.config.pad_token_id
    pairs = zip(ids, types, strict=True)
    return np.concatenate([tiny.logits(model, params, row(i, pad), token_type_ids=row(t, 0)) for i, t in pairs])


def test_packed_rows_equal_single_examples(family):
    config = small(family)
    model, params = init_classifier(config, seed=3)
    rng = np.random.default_rng(0)
    lengths = [5, 1, 17, 3, 9, 4, 8]
    ids = [rng.integers(3, 101, n) for n in lengths]
    types = [rng.integers(0, max(config.type_vocab_size, 1), n) for n in lengths]
    # Two rows longer than any single example may be, in another order, with padding at the end.
    rows, width = [[2, 0, 1], [6, 3, 5, 4]], 27
    packed = {name: np.zeros((2, width), np.int32) for name in ("segment_ids", "position_ids", "token_type_ids")}
    input_ids = np.full((2, width), config.pad_token_id, np.int32)
    first = np.zeros(len(ids), np.int32)
    for r, row in enumerate(rows):
        start = 0
        for k, e in enumerate(row):
            span = slice(start, start + lengths[e])
            input_ids[r, span], packed["segment_ids"][r, span] = ids[e], k + 1
            packed["position_ids"][r, span], packed["token_type_ids"][r, span] = np.arange(lengths[e]), types[e]
            first[e], start = r * width + start, start + lengths[e]
    got = tiny.logits(model, params, input_ids, **packed, first_tokens=jnp.asarray(first))
    want = _alone(model, params, ids, types)
    assert np.ptp(want, axis=0).min() > 0.1
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_default_first_tokens_are_those_of_each_row():
    model, params = init_classifier(small("bert"), seed=1)
    ids = jnp.asarray(tiny.batch(model.config.pad_token_id, 1)["input_ids"])
    first = jnp.arange(ids.shape[0]) * ids.shape[1]
    for rngs in (None, {"dropout": jax.random.key(0)}):
        plain = tiny.logits(model, params, ids, rngs)
        named = tiny.logits(model, params, ids, rngs, first_tokens=first)
        np.testing.assert_allclose(plain, named, atol=1e-5)


@pytest.mark.parametrize("rngs", [None, {"dropout": 0}], ids=["plain", "dropout"])
def test_padding_neither_matters_nor_gives_nan(rngs):
    config = small("bert")
    model, params = init_classifier(config, seed=2)
    rngs = rngs and {"dropout": jax.random.key(0)}
    data = tiny.batch(config.pad_token_id, 1)
    ids = np.concatenate([data["input_ids"], np.full((2, tiny.LENGTH), config.pad_token_id)])

    @tiny.jit
    def logits_and_grads(params, ids):
        def logits(params):
            return model.apply({"params": params}, ids, (ids != config.pad_token_id).astype(jnp.int32), rngs=rngs)

        return logits(params), jax.grad(lambda p: logits(p).sum())(params)

    logits, grads = logits_and_grads(params, jnp.asarray(ids))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((logits, grads)))
    assert np.abs(flatten(grads)["encoder/layer_0/attention/query/kernel"]).max() > 0
    if rngs is None:
        without = tiny.logits(model, params, jnp.asarray(data["input_ids"]))
        np.testing.assert_allclose(logits[:5], without, atol=1e-5)
        shorter = tiny.logits(model, params, jnp.asarray(data["input_ids"][1:2, :1]))
        np.testing.assert_allclose(logits[1:2], shorter, atol=1e-5)


def test_bf16_is_close_to_fp32_and_keeps_fp32_parameters():
    model, params = init_classifier(small("bert", initializer_range=0.15), seed=5)
    half, half_params = init_classifier(dataclasses.replace(model.config, dtype=jnp.bfloat16), seed=5)
    assert {leaf.dtype for leaf in jax.tree.leaves(half_params)} == {jnp.dtype("float32")}
    ids = jnp.asarray(tiny.batch(model.config.pad_token_id, 1, rows=12)["input_ids"])
    full, low = tiny.logits(model, params, ids), tiny.logits(half, params, ids)
    assert low.dtype == jnp.float32
    error = np.abs(full - low).max()
    assert 0 < error < 0.05 * np.ptp(full)  # bfloat16 has 8 bits: 0.4 % a rounding
    trained = tiny.logits(half, params, ids, {"dropout": jax.random.key(0)})
    assert trained.dtype == jnp.float32 and np.isfinite(trained).all()


def test_dropout_only_with_an_rng(family):
    model, params = init_classifier(small(family))
    ids = jnp.asarray(tiny.batch(model.config.pad_token_id, 1)["input_ids"])

    def run(key):
        return tiny.logits(model, params, ids, {"dropout": key})

    a, b = run(jax.random.key(0)), run(jax.random.key(1))
    assert (run(jax.random.key(0)) == a).all()
    assert np.abs(a - b).max() > 1e-3
    still, _ = init_classifier(dataclasses.replace(model.config, **_NO_DROPOUT))
    plain = tiny.logits(model, params, ids)
    assert np.abs(a - plain).max() > 1e-3
    np.testing.assert_allclose(tiny.logits(still, params, ids, {"dropout": jax.random.key(0)}), plain, atol=1e-5)


def test_seeds_can_be_mapped():
    model, params = init_classifier(small("bert"))
    ids = jnp.asarray(tiny.batch(0, 1)["input_ids"])
    keys = jax.random.split(jax.random.key(7), 3)
    mapped = tiny.jit(jax.vmap(lambda key: model.apply({"params": params}, ids, rngs={"dropout": key})))(keys)
    single = np.stack([tiny.logits(model, params, ids, {"dropout": key}) for key in keys])
    np.testing.assert_allclose(mapped, single, atol=1e-5)


# The encoder is one for the three families, their heads are not.
@pytest.mark.parametrize(
    ("family", "name"),
    [
        *(("bert", name) for name in _NO_DROPOUT),
        ("roberta", "classifier_dropout"),
        ("distilbert", "classifier_dropout"),
    ],
)
def test_each_dropout_rate_acts(family, name):
    config = small(family, **{**_NO_DROPOUT, name: 0.5})
    model, params = init_classifier(config)
    ids = jnp.asarray(tiny.batch(config.pad_token_id, 1)["input_ids"])
    with_rng = tiny.logits(model, params, ids, {"dropout": jax.random.key(0)})
    assert np.abs(with_rng - tiny.logits(model, params, ids)).max() > 1e-3


def test_attention_with_dropout_has_the_numerics_of_attention_without():
    # A rate so small that nothing is dropped takes the explicit path.
    config = small("bert", **_NO_DROPOUT)
    model, params = init_classifier(config)
    explicit = SequenceClassifier(dataclasses.replace(config, attention_dropout=1e-12))
    ids = jnp.asarray(tiny.batch(config.pad_token_id, 1)["input_ids"])

    def grads(model, rngs):
        return tiny.jit(jax.grad(lambda p: (model.apply({"params": p}, ids, rngs=rngs) ** 2).sum()))(params)

    with_rng = grads(explicit, {"dropout": jax.random.key(0)})
    for a, b in zip(jax.tree.leaves(grads(model, None)), jax.tree.leaves(with_rng), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4, rtol=2e-4)


def test_parameter_paths_and_sites(family):
    config = small(family)
    model, params = init_classifier(config)
    flat = flatten(params)
    assert {p: v.shape for p, v in flat.items()} == parameter_shapes(model)
    assert flat["encoder/layer_1/mlp/fc1/kernel"].shape == (36, 52)
    assert flat["embeddings/position/embedding"].shape == (config.max_positions, 36)
    heads = {
        "bert": {"pooler", "head/out"},
        "roberta": {"head/dense", "head/out"},
        "distilbert": {"head/dense", "head/out"},
    }[family]
    assert {p.rsplit("/", 1)[0] for p in flat if not p.startswith(("embeddings", "encoder"))} == heads
    sites = find_sites(params)
    assert len(sites) == 12 and {s.layer for s in sites} == {0, 1}
    assert {s.type for s in sites} == {"query", "key", "value", "out", "fc1", "fc2"}
    assert set(classifier_torch_paths(config)) == {p.rsplit("/", 1)[0] for p in flat if not p.endswith("/embedding")}


def test_initial_weights_follow_the_hub_scheme():
    model, params = init_classifier(EncoderConfig(vocab_size=500, hidden_size=96, num_heads=4, num_layers=1))
    flat = {p: np.asarray(v) for p, v in flatten(params).items()}
    for path, array in flat.items():
        if path.endswith(("kernel", "embedding")) and array.size > 5000:
            assert abs(array.std() / 0.02 - 1) < 0.05 and abs(array.mean()) < 0.002, path
        elif path.endswith("bias"):
            assert not array.any()
        elif path.endswith("scale"):
            assert (array == 1).all()
    assert not flat["embeddings/word/embedding"][0].any()
    again = flatten(init_classifier(model.config, seed=0)[1])
    other = flatten(init_classifier(model.config, seed=1)[1])
    assert all((again[p] == flat[p]).all() for p in flat)
    assert (other["pooler/kernel"] != flat["pooler/kernel"]).mean() > 0.99
    assert (flat["pooler/kernel"] != flat["encoder/layer_0/attention/query/kernel"]).mean() > 0.99


def test_no_retrace_between_batches():
    model, params = init_classifier(small("bert"))
    traces = []

    @jax.jit
    def run(ids, key):
        traces.append(1)
        return model.apply({"params": params}, ids, rngs={"dropout": key})

    for seed in range(3):
        run(jnp.asarray(tiny.batch(0, 1, seed=seed)["input_ids"]), jax.random.key(seed))
    assert len(traces) == 1


def test_wrong_input_is_named():
    model, params = init_classifier(small("bert"))
    with pytest.raises(UsageError, match="18 tokens .* 17 positions"):
        model.apply({"params": params}, jnp.ones((2, 18), jnp.int32))
    with pytest.raises(UsageError, match=r"segment_ids has shape \(2,\); expected .* \(2, 4\)"):
        model.apply({"params": params}, jnp.ones((2, 4), jnp.int32), segment_ids=jnp.ones((2,), jnp.int32))
    with pytest.raises(UsageError, match="row length"):
        model.apply({"params": params}, jnp.ones((4,), jnp.int32))
    with pytest.raises(UsageError, match="model_type 'gpt2'"):
        EncoderConfig(family="gpt2")
    for wrong in ({"activation": "snake"}, {"num_heads": 5}, {"num_layers": 0}, {"position_offset": 99}):
        with pytest.raises(UsageError):
            small("bert", **wrong)
