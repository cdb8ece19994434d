"""Logits and gradients equal those of transformers on PyTorch, read from golden files."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.models import load_classifier
from jaxprune.sites import flatten
from tests.models import tiny


def _inputs(family, data):
    kwargs = {"segment_ids": jnp.asarray(data["attention_mask"])}
    if family != "distilbert":
        kwargs["token_type_ids"] = jnp.asarray(data["token_type_ids"])
    return jnp.asarray(data["input_ids"]), kwargs


def test_logits(family, folder):
    data = tiny.golden(family)
    loaded = load_classifier(folder, num_labels=tiny.NUM_LABELS)
    ids, kwargs = _inputs(family, data)
    assert loaded.initialised == () and loaded.origin == "folder"
    got = tiny.logits(loaded.model, loaded.params, ids, **kwargs)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, data["logits"], atol=1e-5, rtol=0)
    assert np.ptp(data["logits"], axis=0).min() > 0.1  # rows differ, so agreement means something
    del kwargs["segment_ids"]  # the default finds the padding by its id
    np.testing.assert_allclose(tiny.logits(loaded.model, loaded.params, ids, **kwargs), data["logits"], atol=1e-5)


def test_gradients(family, folder):
    data = tiny.golden(family)
    loaded = load_classifier(folder, num_labels=tiny.NUM_LABELS)
    ids, kwargs = _inputs(family, data)

    def loss_fn(params):
        log_probs = jax.nn.log_softmax(loaded.model.apply({"params": params}, ids, **kwargs))
        return -jnp.mean(jnp.take_along_axis(log_probs, jnp.asarray(data["labels"])[:, None], axis=1))

    loss, grads = tiny.jit(jax.value_and_grad(loss_fn))(loaded.params)
    np.testing.assert_allclose(loss, data["loss"], atol=1e-5)
    grads = flatten(grads)
    ours = {torch: path for path, torch in loaded.torch_paths.items()}
    checked = 0
    for name in (n for n in data if n.startswith("grad:")):
        module = ours[name.removeprefix("grad:").removesuffix(".weight")]
        got = grads[f"{module}/kernel"].T if f"{module}/kernel" in grads else grads[f"{module}/scale"]
        np.testing.assert_allclose(got, data[name], atol=1e-5)
        assert np.abs(data[name]).max() > 1e-3
        checked += 1
    assert checked == 2


def test_minilm(minilm):
    data = tiny.golden("minilm")
    loaded = load_classifier(tiny.MINILM, num_labels=2)
    assert loaded.origin in ("cache", "package")
    assert loaded.initialised == ("head/out/kernel", "head/out/bias")
    head = tiny.weights({"classifier.weight": [2, 384], "classifier.bias": [2]})
    out = {"kernel": head["classifier.weight"].T, "bias": head["classifier.bias"]}
    got = tiny.logits(
        loaded.model,
        {**loaded.params, "head": {"out": out}},
        jnp.asarray(data["input_ids"]),
        segment_ids=jnp.asarray(data["attention_mask"]),
        token_type_ids=jnp.asarray(data["token_type_ids"]),
    )
    np.testing.assert_allclose(got, data["logits"], atol=1e-4)
