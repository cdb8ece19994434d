"""Checkpoints in every form they come in load the same; what cannot load says why, all at once."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxprune.errors import UsageError
from jaxprune.models import load_classifier
from jaxprune.models.convert import modules
from jaxprune.sites import flatten
from tests.models import tiny

HEADS = {
    "bert": ("head/out",),
    "roberta": ("head/dense", "head/out"),
    "distilbert": ("head/dense", "head/out"),
}
PRETRAINING = {
    "bert": {
        "cls.predictions.bias": (101,),
        "cls.seq_relationship.weight": (2, 36),
        "bert.embeddings.position_ids": (1,),
    },
    "roberta": {"lm_head.dense.weight": (36, 36), "roberta.pooler.dense.bias": (36,), "lm_head.bias": (101,)},
    "distilbert": {"vocab_transform.weight": (36, 36), "vocab_layer_norm.bias": (36,), "vocab_projector.bias": (101,)},
}


def load(folder, num_labels=tiny.NUM_LABELS, **kwargs):
    return load_classifier(folder, num_labels=num_labels, **kwargs)


def same(a, b):
    a, b = flatten(a), flatten(b)
    return set(a) == set(b) and all((a[path] == b[path]).all() for path in a)


def error_of(call) -> str:
    with pytest.raises(UsageError) as caught:
        call()
    return str(caught.value)


def encoder_only(family, arrays):
    heads = tuple(m.torch for m in modules(load_config(family)) if m.path.startswith("head/"))
    return {name: array for name, array in arrays.items() if not name.startswith(heads)}


def load_config(family):
    from transformers import AutoConfig

    from jaxprune.models import EncoderConfig

    config = dict(tiny.CONFIGS[family])
    return EncoderConfig.from_hf(AutoConfig.for_model(config.pop("model_type"), **config), tiny.NUM_LABELS)


def test_every_array_arrives_where_the_paths_say(family, folder):
    loaded, arrays = load(folder), tiny.state(family)
    params = {path: np.asarray(value) for path, value in flatten(loaded.params).items()}
    assert {value.dtype for value in params.values()} == {np.dtype("float32")}
    assert sum(v.size for v in params.values()) == sum(v.size for v in arrays.values())
    for path, torch in loaded.torch_paths.items():
        for ours, theirs in (("kernel", "weight"), ("scale", "weight"), ("bias", "bias")):
            if f"{path}/{ours}" in params:
                want = arrays[f"{torch}.{theirs}"]
                np.testing.assert_array_equal(params[f"{path}/{ours}"], want.T if ours == "kernel" else want)
    assert loaded.notes == () and loaded.ignored == ()


def test_shards_and_missing_prefix_load_the_same(family, folder, tmp_path):
    from safetensors.numpy import save_file

    whole, arrays = load(folder), tiny.state(family)
    sharded = tmp_path / "sharded"
    sharded.mkdir()
    (sharded / "config.json").write_text(json.dumps(tiny.CONFIGS[family]))
    names = sorted(arrays)
    parts = {f"model-0000{k + 1}-of-00003.safetensors": names[k::3] for k in range(3)}
    for name, part in parts.items():
        save_file({key: arrays[key] for key in part}, sharded / name)
    index = {"metadata": {}, "weight_map": {key: name for name, part in parts.items() for key in part}}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    assert same(load(sharded).params, whole.params)
    bare = {name.removeprefix(family + "."): array for name, array in arrays.items()}
    assert bare.keys() != arrays.keys()
    assert same(load(tiny.save(tmp_path / "bare", tiny.CONFIGS[family], bare)).params, whole.params)


def test_old_norm_names_and_half_precision_load(family, tmp_path):
    arrays = tiny.state(family)
    low = {name: array.astype(ml_dtypes.bfloat16) for name, array in arrays.items()}
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): array
        for name, array in low.items()
    }
    loaded = load(tiny.save(tmp_path / "old", tiny.CONFIGS[family], old))
    kernel = np.asarray(loaded.params["encoder"]["layer_1"]["mlp"]["fc1"]["kernel"])
    torch = loaded.torch_paths["encoder/layer_1/mlp/fc1"]
    np.testing.assert_array_equal(kernel, low[f"{torch}.weight"].T.astype(np.float32))
    assert kernel.dtype == np.float32
    half = {name: array.astype(np.float16) for name, array in arrays.items()}
    kernel = load(tiny.save(tmp_path / "half", tiny.CONFIGS[family], half)).params["encoder"]["layer_0"]["mlp"]["fc2"][
        "kernel"
    ]
    np.testing.assert_allclose(kernel, arrays[loaded.torch_paths["encoder/layer_0/mlp/fc2"] + ".weight"].T, atol=1e-3)


def test_absent_head_is_initialised_and_said(family, tmp_path):
    arrays = encoder_only(family, tiny.state(family))
    extra = {name: np.ones(shape, np.float32) for name, shape in PRETRAINING[family].items()}
    folder = tiny.save(tmp_path / "encoder", tiny.CONFIGS[family], {**arrays, **extra})
    loaded = load(folder, num_labels=5, seed=3)
    assert loaded.initialised == tuple(f"{m}/{leaf}" for m in HEADS[family] for leaf in ("kernel", "bias"))
    assert set(loaded.ignored) == {name.removeprefix(family + ".") for name in extra}
    assert all("freshly initialised" in note and "missing" in note for note in loaded.notes)
    kernel = np.asarray(loaded.params["head"]["out"]["kernel"])
    assert kernel.shape == (36, 5) and 0.01 < kernel.std() < 0.03 and not loaded.params["head"]["out"]["bias"].any()
    assert same(load(folder, num_labels=5, seed=3).params, loaded.params)
    other = load(folder, num_labels=5, seed=4).params
    assert (other["head"]["out"]["kernel"] != kernel).all()
    assert same(other["encoder"], loaded.params["encoder"])
    assert loaded.hf_config.num_labels == 5 and loaded.config.num_labels == 5


def test_head_for_other_labels_is_replaced_and_said(family, folder):
    loaded = load(folder, num_labels=1, regression=True)
    assert loaded.initialised == ("head/out/kernel", "head/out/bias")
    assert "has shape (3, 36), expected (1, 36)" in loaded.notes[0]
    assert loaded.hf_config.problem_type == "regression"
    if family != "bert":
        assert (loaded.params["head"]["dense"]["bias"] == load(folder).params["head"]["dense"]["bias"]).all()


def test_absent_pooler_is_initialised(tmp_path):
    arrays = {name: a for name, a in tiny.state("bert").items() if "pooler" not in name}
    loaded = load(tiny.save(tmp_path / "m", tiny.CONFIGS["bert"], arrays))
    assert loaded.initialised == ("pooler/kernel", "pooler/bias")


def test_all_mismatches_are_reported_together(family, tmp_path):
    arrays = tiny.state(family)
    paths = load_config(family)
    torch = {m.path: m.torch.removeprefix(family + ".") for m in modules(paths)}
    full = {m.path: m.torch for m in modules(paths)}
    for layer in (0, 1):
        del arrays[full[f"encoder/layer_{layer}/attention/key"] + ".bias"]
    arrays[full["encoder/layer_1/mlp/fc1"] + ".weight"] = np.zeros((50, 36), np.float32)
    arrays[full["embeddings/word"] + ".weight"] = np.zeros((101, 36), np.int32)
    arrays["adapter.down.weight"] = np.zeros((2, 2), np.float32)
    message = error_of(lambda: load(tiny.save(tmp_path / "m", tiny.CONFIGS[family], arrays)))
    key = torch["encoder/layer_0/attention/key"].replace(".0.", ".{0,1}.")
    start, _, listed = message.partition(": 5 mismatches: ")
    faults = listed.split("; ")
    assert start.startswith("the weights in") and "\n" not in message
    assert f"{key}.bias is missing" in faults
    assert f"{torch['encoder/layer_1/mlp/fc1']}.weight has shape (50, 36), expected (52, 36)" in faults
    assert f"{torch['embeddings/word']}.weight has type I32, expected F32, F16, BF16, F64" in faults
    assert "adapter.down.weight is unexpected" in faults


def test_layers_that_config_does_not_have_are_unexpected(family, tmp_path):
    name = "n_layers" if family == "distilbert" else "num_hidden_layers"
    message = error_of(lambda: load(tiny.save(tmp_path / "m", {**tiny.CONFIGS[family], name: 1}, tiny.state(family))))
    assert "16 mismatches" in message and "layer.1." in message and "unexpected" in message


def test_the_same_array_with_and_without_prefix_is_an_error(tmp_path):
    arrays = tiny.state("bert")
    arrays["embeddings.LayerNorm.bias"] = arrays["bert.embeddings.LayerNorm.bias"]
    message = error_of(lambda: load(tiny.save(tmp_path / "m", tiny.CONFIGS["bert"], arrays)))
    assert "embeddings.LayerNorm.bias is there twice" in message


@pytest.mark.parametrize("keep", [0, 7, 100, 0.5, -1])
def test_truncated_weights(keep, tmp_path):
    folder = tiny.save(tmp_path / "m", tiny.CONFIGS["bert"], tiny.state("bert"))
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep) if isinstance(keep, float) else keep])
    message = error_of(lambda: load(folder))
    assert "model.safetensors is truncated" in message and "\n" not in message


def test_files_that_are_missing_or_wrong_are_named(tmp_path):
    arrays, config = tiny.state("bert"), tiny.CONFIGS["bert"]
    folder = tiny.save(tmp_path / "m", config, arrays)

    def case(text, *edits):
        for name, content in edits:
            path = folder / name
            path.unlink(missing_ok=True) if content is None else path.write_bytes(content)
        message = error_of(lambda: load(folder))
        assert text in message and "\n" not in message, message
        tiny.save(folder, config, arrays)

    index = "model.safetensors.index.json"
    no_single = ("model.safetensors", None)
    case("has no config.json", ("config.json", None))
    case("is not a JSON object", ("config.json", b"{"))
    case("is not a JSON object", ("config.json", b"[]"))
    case("model_type 'gpt2'; expected one of bert, roberta, distilbert", ("config.json", b'{"model_type": "gpt2"}'))
    case("model_type None", ("config.json", b"{}"))
    case(
        "config.json: hidden_size is 'wide'; expected an integer from 1",
        ("config.json", b'{"model_type": "bert", "hidden_size": "wide"}'),
    )
    case(
        "config.json: is_decoder=True is not supported",
        ("config.json", json.dumps({**config, "is_decoder": True}).encode()),
    )
    relative = {**config, "position_embedding_type": "relative_key"}
    case("position_embedding_type='relative_key'", ("config.json", json.dumps(relative).encode()))
    case(
        "config.json: hidden_act (activation) 'mish' is not supported; expected one of gelu",
        ("config.json", json.dumps({**config, "hidden_act": "mish"}).encode()),
    )
    case("has no weights", no_single)
    case("only as a pickle (pytorch_model.bin)", no_single, ("pytorch_model.bin", b"PK"))
    (folder / "pytorch_model.bin").unlink()
    case("is not an index of shards", no_single, (index, b"{}"))
    case("is not an index of shards", no_single, (index, b'{"weight_map": {"a": "../x.safetensors"}}'))
    case(
        "lacks 1 shards that model.safetensors.index.json names: a.safetensors",
        no_single,
        (index, b'{"weight_map": {"a": "a.safetensors"}}'),
    )
    shard = (folder / "model.safetensors").read_bytes()
    other = (index, b'{"weight_map": {"nowhere": "b.safetensors"}}')
    case("places arrays where they are not: nowhere", no_single, other, ("b.safetensors", shard))


def test_wrong_arguments(folder):
    assert "regression has num_labels=1" in error_of(lambda: load(folder, num_labels=2, regression=True))
    assert "num_labels is 0; expected an integer from 1" in error_of(lambda: load(folder, num_labels=0))
    assert "is a file" in error_of(lambda: load(folder / "config.json"))


def test_loading_in_bf16_keeps_fp32_parameters(family, folder):
    loaded = load(folder, dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded.params)} == {jnp.dtype("float32")}
    assert loaded.config.dtype == jnp.bfloat16
