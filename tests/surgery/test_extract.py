"""Extraction: the smaller model computes what the masked one did, for every group of channels, and what breaks that."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from jaxprune.adapters import MaskedDora, mask_channels, settle, to_dora
from jaxprune.models import EncoderConfig, SequenceClassifier, init_classifier, load_classifier, save_classifier
from jaxprune.sites import flatten, unflatten

CONFIG = EncoderConfig(
    family="distilbert", vocab_size=40, hidden_size=24, num_heads=3, num_layers=2, intermediate_size=20,
    max_positions=9, type_vocab_size=0, attention_output_dropout=0.0, initializer_range=0.3,
)  # fmt: skip
IDS = np.random.default_rng(0).integers(1, 40, (4, 9))
GROUPS = {"mlp": ("fc1",), "value": ("value",), "pair": ("query",), "both of a pair": ("query", "key"), "all": ()}
EVERY = ("query", "key", "value", "fc1")


def noise(key, like):
    return jnp.asarray(np.random.default_rng(key).normal(0, 0.3, np.shape(like)), jnp.float32)


@functools.cache
def base():
    """A model with biases that are not 0, DoRA of rank 3 everywhere, one component of it masked."""
    _, params = init_classifier(CONFIG)
    params = unflatten(
        {
            p: leaf + noise(i, leaf) if p.endswith("bias") else leaf
            for i, (p, leaf) in enumerate(flatten(params).items())
        }
    )
    sites = jp.find_sites(params)
    loras, masks = jp.init_lora(jax.random.key(1), sites, {s.path: 3 for s in sites})
    loras = {p: dataclasses.replace(x, b=noise(100 + i, x.b)) for i, (p, x) in enumerate(loras.items())}
    adapters = {
        path: dataclasses.replace(dora, magnitude=dora.magnitude * jnp.exp(noise(200 + i, dora.magnitude)))
        for i, (path, dora) in enumerate(to_dora(loras, params).items())
    }
    masks["encoder/layer_0/mlp/fc2"] = jnp.array([1.0, 0, 1])
    return params, adapters, masks


def made(types):
    """The base with random channel masks on the given types: ragged, more than half of the channels off."""
    params, adapters, masks = base()
    adapters = dict(adapters)
    for i, (path, dora) in enumerate(adapters.items()):
        if (kind := path.rpartition("/")[2]) in types:
            kept = np.random.default_rng(300 + i).random(dora.magnitude.shape) < 0.4
            adapters[path] = settle(mask_channels(dora, heads=1 if kind == "fc1" else 3), jnp.asarray(kept))
    return params, adapters, dict(masks)


@functools.cache
def forward(config):
    return jax.jit(jp.attach(SequenceClassifier(config)))


def logits(config, params, adapters, masks):
    return forward(config)(params, adapters, masks, IDS)


@pytest.mark.parametrize("group", GROUPS)
def test_masked_and_extracted_model_agree(group):
    types = GROUPS[group] or EVERY
    params, adapters, masks = made(types)
    want = logits(CONFIG, params, adapters, masks)
    small = jp.extract(CONFIG, params, adapters, masks)
    np.testing.assert_allclose(logits(*small[:3], masks), want, rtol=1e-5, atol=1e-5)
    # Something was masked, and what it was is gone: each head is as wide as its layer's fullest.
    assert np.abs(logits(CONFIG, params, {p: plain(x) for p, x in adapters.items()}, masks) - want).max() > 1e-2
    for layer in range(2):
        gate = {name: gates(adapters, layer, name) for name in EVERY}
        widths = small.config.widths(layer)
        assert widths.mlp == gate["fc1"].sum()
        assert widths.value == gate["value"].reshape(3, -1).sum(-1).max()
        assert widths.key == (gate["query"] * gate["key"]).reshape(3, -1).sum(-1).max().clip(1)
    sizes = [sum(np.size(leaf) for leaf in jax.tree.leaves(tree)) for tree in (params, small.params)]
    assert sizes[1] < sizes[0]


def plain(adapter):
    return settle(adapter, jnp.ones(adapter.logits.shape)) if isinstance(adapter, MaskedDora) else adapter


def gates(adapters, layer, name):
    adapter = adapters[f"encoder/layer_{layer}/{'mlp' if name == 'fc1' else 'attention'}/{name}"]
    return np.asarray(adapter.channels(None)) if isinstance(adapter, MaskedDora) else np.ones(adapter.magnitude.shape)


def test_two_dora_layers_in_float64():
    """fc2(relu(fc1(x))) by hand: the extracted factors give the masked product, the old magnitude does not."""
    params, adapters, masks = made(("fc1",))
    small = jp.extract(CONFIG, params, adapters, masks)

    def dense(params, adapters, name, x):
        path = f"encoder/layer_0/mlp/{name}"
        leaves = {k: np.asarray(v, np.float64) for k, v in vars(adapters[path]).items() if hasattr(v, "shape")}
        node = params["encoder"]["layer_0"]["mlp"][name]
        mask = np.asarray(masks[path], np.float64)
        direction = np.asarray(node["kernel"], np.float64) + adapters[path].scale * leaves["a"] * mask @ leaves["b"]
        y = x @ (direction * leaves["magnitude"] / np.linalg.norm(direction, axis=0)) + np.asarray(node["bias"])
        return y * (leaves["logits"] > 0) if "logits" in leaves else y

    x = np.random.default_rng(0).normal(size=(5, 24))
    old, new = (
        dense(tree, of, "fc2", np.maximum(dense(tree, of, "fc1", x), 0))
        for tree, of in ((params, adapters), (small.params, small.adapters))
    )
    np.testing.assert_allclose(new, old, rtol=1e-5, atol=1e-5)
    path = "encoder/layer_0/mlp/fc2"
    kept = {**small.adapters, path: dataclasses.replace(small.adapters[path], magnitude=adapters[path].magnitude)}
    wrong = dense(small.params, kept, "fc2", np.maximum(dense(small.params, kept, "fc1", x), 0))
    assert np.abs(wrong - old).max() > 0.1


def test_with_the_bias_unmasked_it_would_be_off(monkeypatch):
    params, adapters, masks = made(("fc1",))
    small = jp.extract(CONFIG, params, adapters, masks)
    extracted = logits(*small[:3], masks)
    original = MaskedDora.linear
    monkeypatch.setattr(
        MaskedDora, "linear", lambda self, x, k, m, key: original(self, x, k, m, key) * self.channels(m)
    )
    monkeypatch.setattr(MaskedDora, "finish", lambda self, y, mask: y)
    unmasked = jax.jit(jp.attach(SequenceClassifier(CONFIG)))(params, adapters, masks, IDS)
    assert np.abs(unmasked - extracted).max() > 1e-2


def test_a_saved_model_gives_the_same_logits_and_can_shrink_again(tmp_path):
    params, adapters, masks = made(EVERY)
    small = jp.extract(CONFIG, params, adapters, masks)
    merged = jp.merge(small.params, small.adapters, masks)
    folder = save_classifier(tmp_path / "small", small.config, merged)
    loaded = load_classifier(folder, num_labels=2)
    assert loaded.config == small.config and loaded.initialised == ()
    want = logits(CONFIG, params, adapters, masks)
    np.testing.assert_allclose(logits(small.config, loaded.params, {}, {}), want, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(logits(small.config, loaded.params, {}, {}), logits(small.config, merged, {}, {}))
    # The surplus channels of ragged heads are still masked: nothing more goes, and nothing is lost.
    again = jp.extract(*small[:3], masks)
    assert again.config == small.config
    np.testing.assert_array_equal(logits(*again[:3], masks), logits(*small[:3], masks))


def test_an_even_mlp_is_an_ordinary_checkpoint(tmp_path):
    params, adapters, masks = made(())
    method = jp.uniformmask(total_steps=2, channels=("fc1",), ratio=0.25)
    for path in [p for p in adapters if p.endswith("fc1")]:
        adapters[path] = mask_channels(adapters[path])
    context = jp.Context(jax.random.key(0), params, jp.find_sites(params), lambda: None, lambda: None)
    _, decision = method.decide((), adapters, masks, 1, context)
    small = jp.extract(CONFIG, params, {**adapters, **decision.adapters}, masks)
    assert small.config == dataclasses.replace(CONFIG, intermediate_size=15)
    merged = jp.merge(small.params, small.adapters, masks)
    said = json.loads((save_classifier(tmp_path, small.config, merged) / "config.json").read_text())
    assert said["hidden_dim"] == 15 and not {"intermediate_sizes", "key_dims", "value_dims"} & set(said)


def test_what_goes_along_and_what_cannot():
    params, adapters, masks = made(("fc1",))
    fc1, fc2, out = (f"encoder/layer_0/{p}" for p in ("mlp/fc1", "mlp/fc2", "attention/out"))
    loras, _ = jp.init_lora(jax.random.key(0), jp.find_sites(params), {fc2: 2, out: 2})
    lora = dataclasses.replace(loras[fc2], b=noise(1, loras[fc2].b))
    weights = {f"{fc1}/bias": params["encoder"]["layer_0"]["mlp"]["fc1"]["bias"] + 1.0}
    mixed = {fc1: adapters[fc1], fc2: lora}
    want = logits(CONFIG, jp.with_weights(params, weights), mixed, {})
    small = jp.extract(CONFIG, params, mixed, weights=weights)
    got = logits(small.config, jp.with_weights(small.params, small.weights), small.adapters, {})
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    bottleneck, _ = jp.adapters.init_bottleneck(jax.random.key(0), jp.find_sites(params), {fc2: 2, out: 2})
    same = jp.extract(CONFIG, params, {fc1: adapters[fc1], out: bottleneck[out]})
    assert same.adapters[out] is bottleneck[out]
    with pytest.raises(jp.UsageError, match="mlp/fc2' is a Bottleneck, which cannot lose channels"):
        jp.extract(CONFIG, params, {fc1: adapters[fc1], fc2: bottleneck[fc2]})


def test_shared_heads_leave_no_surplus():
    params, adapters, masks = made(())
    path = "encoder/layer_0/attention/value"
    kept = jnp.array([1, 0, 0, 1, 1, 0, 1, 0], bool)
    adapters[path] = settle(mask_channels(adapters[path], heads=3, shared=True), kept)
    small = jp.extract(CONFIG, params, adapters, masks)
    assert small.config.value_dims == (4, 8)
    np.testing.assert_array_equal(small.adapters[path].channels(None), np.ones(12))
    want = logits(CONFIG, params, adapters, masks)
    np.testing.assert_allclose(logits(*small[:3], masks), want, rtol=1e-5, atol=1e-5)
