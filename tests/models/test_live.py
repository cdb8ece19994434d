"""Side by side with transformers on PyTorch: logits, every gradient, and the statistics of dropout."""

from __future__ import annotations

import dataclasses
import json
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune.models import load_classifier
from jaxprune.models.convert import convert
from jaxprune.models.pretrained import parameter_shapes
from jaxprune.sites import flatten
from tests.models import tiny

torch = pytest.importorskip("torch")

VARIANTS = {
    "bert": [
        {},
        {"hidden_act": "gelu_new", "num_hidden_layers": 3, "num_attention_heads": 1, "num_labels": 1},
        {
            "hidden_act": "relu",
            "hidden_size": 60,
            "num_attention_heads": 5,
            "classifier_dropout": 0.4,
            "pad_token_id": 2,
        },
    ],
    "roberta": [{}, {"hidden_act": "silu", "num_hidden_layers": 1, "type_vocab_size": 2, "num_labels": 1}],
    "distilbert": [{}, {"activation": "relu", "n_layers": 1, "dim": 60, "n_heads": 12, "sinusoidal_pos_embds": True}],
}
CASES = [(family, change) for family, changes in VARIANTS.items() for change in changes]


def torch_model(family, change=(), dropout=None):
    from transformers import AutoConfig, AutoModelForSequenceClassification

    config = {**tiny.CONFIGS[family], **dict(change)}
    if dropout is not None:
        names = ("dropout", "attention_dropout", "seq_classif_dropout")
        config |= dict.fromkeys(names if family == "distilbert" else (f"hidden_{names[0]}_prob",), dropout)
        if family != "distilbert":
            config["attention_probs_dropout_prob"] = dropout
    hf = AutoConfig.for_model(**config)
    model = AutoModelForSequenceClassification.from_config(hf, attn_implementation="eager").eval()
    shapes = {name: list(value.shape) for name, value in model.state_dict().items()}
    model.load_state_dict({k: torch.from_numpy(v) for k, v in tiny.weights(shapes).items()}, strict=True)
    return model, config


@pytest.mark.parametrize(("family", "change"), CASES, ids=[f"{f}-{i}" for i, (f, _) in enumerate(CASES)])
def test_logits_and_all_gradients(family, change, tmp_path):
    model, config = torch_model(family, change)
    model.save_pretrained(tmp_path)  # the file that a user would have
    labels = config["num_labels"]
    loaded = load_classifier(tmp_path, num_labels=labels)
    assert loaded.initialised == () and loaded.notes == ()
    types = config.get("type_vocab_size", 0)
    data = tiny.batch(config["pad_token_id"], types, rows=7, seed=1)
    keys = ("input_ids", "attention_mask", "token_type_ids") if types else ("input_ids", "attention_mask")
    weight = np.random.RandomState(0).standard_normal((7, labels)).astype(np.float32)
    want = model(**{k: torch.from_numpy(data[k]) for k in keys}).logits
    (want * torch.from_numpy(weight)).sum().backward()

    def objective(params):
        kwargs = {"token_type_ids": jnp.asarray(data["token_type_ids"])} if types else {}
        ids, mask = jnp.asarray(data["input_ids"]), jnp.asarray(data["attention_mask"])
        logits = loaded.model.apply({"params": params}, ids, mask, **kwargs)
        return (logits * weight).sum(), logits

    (_, got), grads = tiny.jit(jax.value_and_grad(objective, has_aux=True))(loaded.params)
    np.testing.assert_allclose(got, want.detach().numpy(), atol=1e-5)

    theirs = {name: Stored(p.grad.numpy()) for name, p in model.named_parameters() if p.grad is not None}
    shapes = parameter_shapes(loaded.model)
    expected = convert(theirs, loaded.config, shapes, "gradients").arrays
    for path, gradient in flatten(grads).items():
        gradient = np.array(gradient)
        if path == "embeddings/word/embedding":
            gradient[config["pad_token_id"]] = 0  # PyTorch gives the padding row no gradient
        scale = max(np.abs(expected[path]).max(), 1.0)
        np.testing.assert_allclose(gradient / scale, expected[path] / scale, atol=2e-5, err_msg=path)


class Stored(NamedTuple):
    """An array as `open_weights` gives it."""

    array: np.ndarray
    dtype = "F32"

    @property
    def shape(self):
        return self.array.shape

    def read(self):
        return self.array


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_dropout_has_the_same_distribution(family, tmp_path):
    model, config = torch_model(family, dropout=0.2)
    model.save_pretrained(tmp_path)
    loaded = load_classifier(tmp_path, num_labels=tiny.NUM_LABELS)
    copies = 20_000
    ids = np.broadcast_to(tiny.batch(config["pad_token_id"], 1)["input_ids"][2:3, :9], (copies, 9))
    mask = (ids != config["pad_token_id"]).astype(np.int64)
    torch.manual_seed(0)
    with torch.no_grad():
        want = model.train()(torch.from_numpy(ids.copy()), torch.from_numpy(mask)).logits.numpy()
    rngs = {"dropout": jax.random.key(0)}
    got = np.asarray(tiny.logits(loaded.model, loaded.params, jnp.asarray(ids), rngs))
    error = want.std(axis=0) / np.sqrt(copies)
    assert (np.abs(got.mean(axis=0) - want.mean(axis=0)) < 6 * error).all()
    np.testing.assert_allclose(got.std(axis=0), want.std(axis=0), rtol=0.04)
    np.testing.assert_allclose(np.corrcoef(got.T), np.corrcoef(want.T), atol=0.05)
    # The test would notice one rate that is off: without attention dropout the spread is another.
    fewer = dataclasses.replace(loaded.config, attention_dropout=0.0, mlp_dropout=0.0)
    other = tiny.logits(type(loaded.model)(fewer), loaded.params, jnp.asarray(ids), rngs)
    assert (np.abs(np.asarray(other).std(axis=0) / want.std(axis=0) - 1) > 0.04).any()


def test_torch_paths_are_modules_of_the_classifier(tmp_path):
    for family in tiny.FAMILIES:
        model, _ = torch_model(family)
        model.save_pretrained(tmp_path / family)
        loaded = load_classifier(tmp_path / family, num_labels=tiny.NUM_LABELS)
        named = dict(model.named_modules())
        linear = {name for name, module in named.items() if isinstance(module, torch.nn.Linear | torch.nn.LayerNorm)}
        assert set(loaded.torch_paths.values()) == linear


def test_sharded_by_transformers(tmp_path):
    model, _ = torch_model("bert")
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    index = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    whole, shards = (flatten(load_classifier(tmp_path / d, num_labels=3).params) for d in ("whole", "shards"))
    assert all((whole[path] == shards[path]).all() for path in whole)


def test_minilm(minilm, tmp_path):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    loaded = load_classifier(tiny.MINILM, num_labels=2)
    theirs = AutoModelForSequenceClassification.from_pretrained(loaded.folder, num_labels=2).eval()
    kernel, bias = (np.array(loaded.params["head"]["out"][name]) for name in ("kernel", "bias"))
    head = {"classifier.weight": torch.from_numpy(kernel.T * 50), "classifier.bias": torch.from_numpy(bias)}
    theirs.load_state_dict(head, strict=False)
    params = {**loaded.params, "head": {"out": {"kernel": kernel * 50, "bias": bias}}}
    tokenizer = AutoTokenizer.from_pretrained(loaded.folder)
    texts = [
        "He said the foodservice pie business doesn't fit the company's long-term growth strategy.",
        "Yes.",
        "?" * 200,
    ]
    batch = tokenizer(texts, texts[::-1], padding=True, return_tensors="np")
    with torch.no_grad():
        want = theirs(**{k: torch.from_numpy(v) for k, v in batch.items()}).logits.numpy()
    got = tiny.logits(
        loaded.model,
        params,
        jnp.asarray(batch["input_ids"]),
        segment_ids=jnp.asarray(batch["attention_mask"]),
        token_type_ids=jnp.asarray(batch["token_type_ids"]),
    )
    np.testing.assert_allclose(got, want, atol=1e-4)
    assert np.ptp(want) > 0.1
