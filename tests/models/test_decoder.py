"""Decoders: the formulas in float64, transformers on PyTorch, padding, packing, stacks of layers, checkpoints both ways."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from jaxprune.errors import UsageError
from jaxprune.models import weights as files
from jaxprune.models.decoder import Decoder
from jaxprune.models.decoder_config import DecoderConfig
from jaxprune.models.decoder_weights import init_decoder, load_decoder, regroup, save_decoder
from jaxprune.models.rope import Rope
from jaxprune.sites import flatten
from tests.models import decoders

IDS = np.random.RandomState(1).randint(3, 83, (2, 11))


def run(loaded, *inputs, **kwargs):
    params = kwargs.pop("params", loaded.params)
    return jax.jit(lambda p, a, k: loaded.model.apply({"params": p}, *a, **k))(params, inputs, kwargs)


@pytest.mark.parametrize(
    "name", ["llama1", "llama2", "llama3", "llama3.1", "llama3.2", "linear", "biased", "mistral", "qwen2"]
)
def test_logits_are_the_formula(name, tmp_path):
    folder, config, arrays = decoders.save(tmp_path, name)
    got = run(load_decoder(folder, query_chunk=4), jnp.asarray(IDS))
    want = np.stack([decoders.logits(config, arrays, row) for row in IDS])
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_rope_kinds_that_read_the_length():
    positions = jnp.asarray(40)
    dynamic = Rope(10000.0, "dynamic", (("factor", 4.0),))
    base = 10000.0 * (4.0 * 40 / 8 - 3.0) ** (8 / 6)
    np.testing.assert_allclose(dynamic.frequencies(8, 8, positions)[0], base ** (-np.arange(0, 8, 2) / 8), rtol=1e-5)
    np.testing.assert_allclose(
        dynamic.frequencies(8, 8, jnp.asarray(5))[0], Rope().frequencies(8, 8, positions)[0], rtol=1e-6
    )
    long = Rope.from_hf({"rope_parameters": decoders.LONG}, 1e4, 8)
    for used, name in ((8, "short_factor"), (9, "long_factor")):
        got, factor = long.frequencies(8, 32, jnp.asarray(used))
        np.testing.assert_allclose(got, 10000.0 ** (-np.arange(0, 8, 2) / 8) / decoders.LONG[name], rtol=1e-6)
        assert factor == pytest.approx((1 + np.log(4) / np.log(8)) ** 0.5)


@pytest.mark.parametrize("name", decoders.CONFIGS)
def test_configuration_both_ways(name):
    config = DecoderConfig.from_hf(decoders.CONFIGS[name])
    assert DecoderConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config


@pytest.mark.parametrize("name", decoders.CONFIGS)
def test_logits_and_all_gradients_beside_pytorch(name, tmp_path):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    folder, _, _ = decoders.save(tmp_path, name)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    output = model(torch.tensor(IDS), labels=torch.tensor(IDS))
    output.loss.backward()
    loaded = load_decoder(folder, query_chunk=4, loss_chunk=3, groups=(3,))
    np.testing.assert_allclose(run(loaded, jnp.asarray(IDS)), output.logits.detach(), atol=1e-5)

    def loss(params):
        nll, _ = loaded.model.apply({"params": params}, jnp.asarray(IDS), targets=jnp.roll(IDS, -1, axis=1))
        return nll[:, :-1].mean()

    value, grads = jax.jit(jax.value_and_grad(loss))(loaded.params)
    np.testing.assert_allclose(value, output.loss.detach(), atol=1e-5)
    wanted = {path: parameter.grad.numpy() for path, parameter in model.named_parameters()}
    for path, got in flatten(grads).items():
        module, _, leaf = path.rpartition("/")
        torch_name = f"{loaded.torch_paths[module]}.{'bias' if leaf == 'bias' else 'weight'}"
        layers = range(got.shape[0]) if "{}" in torch_name else [None]
        for i in layers:
            mine = got if i is None else got[i]
            want = wanted.pop(torch_name if i is None else torch_name.format(i))
            np.testing.assert_allclose(mine.T if leaf == "kernel" else mine, want, atol=1e-4, err_msg=path)
    assert not wanted


def test_padding_and_packing_change_nothing(tmp_path):
    loaded = load_decoder(decoders.save(tmp_path, "llama3.1")[0], query_chunk=4)
    short, long = IDS[0, :4], IDS[1]
    alone = [run(loaded, jnp.asarray(row[None]))[0] for row in (short, long)]
    pad = np.zeros(7, int)
    for row, own in ((np.append(short, pad), slice(0, 4)), (np.append(pad, short), slice(7, 11))):
        segments = jnp.zeros(11, jnp.int32).at[own].set(1)
        positions = jnp.clip(jnp.cumsum(segments) - 1, 0)
        got = run(loaded, jnp.asarray(row[None]), segments[None], positions[None])[0, own]
        np.testing.assert_allclose(got, alone[0], atol=1e-5)
    packed = jnp.asarray(np.concatenate([short, long])[None])
    segments = jnp.asarray([[1] * 4 + [2] * 11])
    positions = jnp.asarray([[*range(4), *range(11)]])
    got = run(loaded, packed, segments, positions)[0]
    np.testing.assert_allclose(got[:4], alone[0], atol=1e-5)
    np.testing.assert_allclose(got[4:], alone[1], atol=1e-5)
    # Without segments the second example sees the first.
    assert np.abs(run(loaded, packed)[0, 4:] - alone[1]).max() > 0.01


def test_scored_positions_and_targets(tmp_path):
    loaded = load_decoder(decoders.save(tmp_path, "llama3.2")[0], loss_chunk=2)
    ids, scored = jnp.asarray(IDS), jnp.asarray([[3, 9, 0], [10, 2, 2]])
    every = run(loaded, ids)
    some = run(loaded, ids, scored=scored)
    np.testing.assert_allclose(some, np.take_along_axis(np.asarray(every), np.asarray(scored)[..., None], 1), atol=1e-5)
    targets = jnp.asarray([[5, 6, 7], [8, 9, int(some[1, 2].argmax())]])
    nll, correct = run(loaded, ids, scored=scored, targets=targets)
    wide = np.asarray(some, np.float64)
    want = np.log(np.exp(wide).sum(-1)) - np.take_along_axis(wide, np.asarray(targets)[..., None], -1)[..., 0]
    np.testing.assert_allclose(nll, want, atol=1e-5)
    assert correct[1, 2] and (correct == (some.argmax(-1) == targets)).all()


def adapted(loaded, layers):
    sites = loaded.sites()
    adapters, masks = jp.init_lora(jax.random.key(0), sites, {s.path: 2 for s in sites if s.layer in layers})
    keys = jax.random.split(jax.random.key(1), len(adapters))
    filled = {
        path: dataclasses.replace(a, b=0.1 * jax.random.normal(key, a.b.shape))
        for key, (path, a) in zip(keys, adapters.items(), strict=True)
    }
    return sites, filled, masks


def grads_of(loaded, adapters, masks):
    forward = jp.attach(loaded.model)

    def loss(adapters, params):
        return forward(params, adapters, masks, jnp.asarray(IDS), targets=jnp.roll(IDS, -1, axis=1))[0].mean()

    return jax.jit(jax.value_and_grad(loss)), loss


@pytest.mark.parametrize("groups", [(1, 2), (2, 1), (1, 1, 1)])
def test_stacks_are_storage_alone(groups, tmp_path):
    folder = decoders.save(tmp_path, "llama3")[0]
    whole, parts = load_decoder(folder, groups=(3,)), load_decoder(folder, groups=groups)
    sites, adapters, masks = adapted(whole, (1, 2))
    assert parts.sites() == sites
    assert jp.find_sites(parts.params, call=lambda p: parts.model.apply({"params": p}, jnp.asarray(IDS))) == sites
    assert [s.path for s in sites if s.layer == 2][:2] == ["layers/attention/q_proj[2]", "layers/attention/k_proj[2]"]
    moved, config = regroup(whole.params, whole.config, groups)
    again, _ = regroup(moved, config, (3,))
    for path, leaf in flatten(moved).items():
        np.testing.assert_array_equal(leaf, flatten(parts.params)[path])
    for path, leaf in flatten(again).items():
        np.testing.assert_array_equal(leaf, flatten(whole.params)[path])
    (first, g1), (second, g2) = (
        grads_of(loaded, adapters, masks)[0](adapters, loaded.params) for loaded in (whole, parts)
    )
    np.testing.assert_allclose(first, second, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), g1, g2)
    one, other = (jp.merge(loaded.params, adapters, masks) for loaded in (whole, parts))
    for path, leaf in flatten(regroup(one, whole.config, groups)[0]).items():
        np.testing.assert_array_equal(leaf, flatten(other)[path])


def test_the_backward_pass_ends_above_a_stack_without_adapters(tmp_path):
    """Stacks of one layer are unrolled by XLA, which then counts every product."""
    loaded = load_decoder(decoders.save(tmp_path, "llama3")[0], groups=(1, 1, 1))
    flops = {}
    for layers in ((0, 1, 2), (1, 2), (2,)):
        _, adapters, masks = adapted(loaded, layers)
        jitted, loss = grads_of(loaded, adapters, masks)
        cost = lambda f, *args: f.lower(*args).compile().cost_analysis()["flops"]  # noqa: E731
        flops[layers] = cost(jitted, adapters, loaded.params)
        flops["forward"] = cost(jax.jit(loss), adapters, loaded.params)
    backward = [flops[layers] - flops["forward"] for layers in ((0, 1, 2), (1, 2), (2,))]
    layer = backward[0] - backward[1]
    assert backward[1] - backward[2] == pytest.approx(layer, rel=0.15)
    assert layer > 0.15 * backward[0]


@pytest.mark.parametrize("remat", ["dots", "names", "full"])
def test_rematerialisation_changes_no_gradient(remat, tmp_path):
    folder = decoders.save(tmp_path, "llama3")[0]
    plain, again = load_decoder(folder, groups=(3,)), load_decoder(folder, groups=(1, 2), remat=remat)
    _, adapters, masks = adapted(plain, (0, 1, 2))
    (a, g1), (b, g2) = (grads_of(loaded, adapters, masks)[0](adapters, loaded.params) for loaded in (plain, again))
    np.testing.assert_allclose(a, b, rtol=1e-6)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), g1, g2)


def test_sixteen_bits_keep_norms_and_adapters_wide(tmp_path):
    folder = decoders.save(tmp_path, "llama3.2")[0]
    loaded = load_decoder(folder, dtype=jnp.bfloat16)
    kinds = {path.rpartition("/")[2]: leaf.dtype for path, leaf in flatten(loaded.params).items()}
    assert kinds == {"kernel": jnp.bfloat16, "embedding": jnp.bfloat16, "scale": jnp.float32}
    _, adapters, masks = adapted(loaded, (0, 1, 2))
    _, grads = grads_of(loaded, adapters, masks)[0](adapters, loaded.params)
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype("float32")}
    wide = run(load_decoder(folder), jnp.asarray(IDS))
    assert np.abs(run(loaded, jnp.asarray(IDS)) - wide).max() < 0.05 * np.abs(wide).max()


def test_saved_in_shards_and_loaded(tmp_path, monkeypatch):
    folder, _, arrays = decoders.save(tmp_path / "a", "qwen2")
    loaded = load_decoder(folder, groups=(2, 1))
    monkeypatch.setattr("jaxprune.models.decoder_weights.SHARD_BYTES", 20_000)
    out = save_decoder(tmp_path / "b", loaded.config, loaded.params, beside={"README.md": b"x"})
    assert len(list(out.glob("model-0*-of-0*.safetensors"))) > 2 and (out / "README.md").read_bytes() == b"x"
    stored = files.open_weights(out)
    assert stored.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(stored[name].read(), array)
    assert load_decoder(out, groups=(2, 1)).config == loaded.config
    pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    state = AutoModelForCausalLM.from_pretrained(out).state_dict()
    for name, array in arrays.items():
        np.testing.assert_array_equal(state[name].numpy(), array)
    with pytest.raises(UsageError, match="do not fit the configuration, first lm_head/kernel: got None"):
        save_decoder(tmp_path / "c", loaded.config, {k: v for k, v in loaded.params.items() if k != "lm_head"})
    (out / sorted(p.name for p in out.glob("model-*"))[1]).unlink()
    with pytest.raises(UsageError, match=r"lacks 1 shards that model.safetensors.index.json names: model-00002"):
        load_decoder(out)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported; expected one of llama, mistral, qwen2"),
        (
            {"rope_parameters": {"rope_type": "spiral"}},
            "rope_type 'spiral' is not supported; expected one of default, lin",
        ),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope_type linear has no factor; it needs factor"),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": -1}},
            "factor of rope_parameters is -1; expected a number ab",
        ),
        ({"rope_parameters": [1]}, r"rope_parameters is \[1\]; expected an object"),
        ({"num_key_value_heads": 4}, "num_attention_heads=6 is not a multiple of num_key_value_heads=4"),
        ({"hidden_size": "many"}, "hidden_size is 'many'; expected an integer from 1"),
        ({"hidden_size": None}, "there is no hidden_size; add it"),
        ({"head_dim": 7}, "head_dim=7 cannot be turned in pairs; expected an even number"),
        ({"hidden_act": "sine"}, "hidden_act 'sine' is not supported"),
        ({"tie_word_embeddings": 2}, "tie_word_embeddings is 2; expected true or false"),
        ({"pretraining_tp": 2}, "pretraining_tp=2 is not supported; expected 1"),
        ({"num_hidden_layers": 2}, r"9 mismatches: model.layers.2.input_layernorm.weight is unexpected"),
        ({"num_hidden_layers": 4}, r"9 mismatches: model.layers.3.self_attn.k_proj.weight is missing"),
        (
            {"intermediate_size": 41},
            r"model.layers.\{0,1,2\}.mlp.gate_proj.weight has shape \(40, 24\), expected \(41, 24\)",
        ),
        ({"tie_word_embeddings": False, "attention_bias": True}, "self_attn.q_proj.bias is missing"),
    ],
)
def test_bad_configurations(changes, message, tmp_path):
    folder, config, _ = decoders.save(tmp_path, "llama3")
    (folder / "config.json").write_text(json.dumps({k: v for k, v in {**config, **changes}.items() if v is not None}))
    with pytest.raises(UsageError, match=message) as error:
        load_decoder(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"groups": (1, 1)}, r"groups \(1, 1\) do not fit; expected numbers of layers, 3 in all"),
        ({"remat": "some"}, "remat 'some' is not supported; expected one of none, dots, names, full"),
        ({"attention": "flash"}, "attention 'flash' is not supported"),
        ({"loss_chunk": -1}, "loss_chunk is -1; expected an integer from 0"),
        ({"dtype": "int8"}, "dtype 'int8' is not supported"),
    ],
)
def test_bad_settings(settings, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        load_decoder(decoders.save(tmp_path, "llama3")[0], **settings)


def test_fresh_weights_are_a_function_of_the_seed():
    config = DecoderConfig.from_hf(decoders.CONFIGS["llama3"])
    first, second, other = (flatten(init_decoder(config, seed)[1]) for seed in (0, 0, 1))
    for path, leaf in first.items():
        np.testing.assert_array_equal(leaf, second[path])
        if path.endswith("kernel"):
            assert leaf.std() == pytest.approx(0.02, rel=0.1) and (leaf != other[path]).any()
    with pytest.raises(UsageError, match=r"input_ids has shape \(3,\); expected \(rows, row length\)"):
        Decoder(config).apply({"params": init_decoder(config)[1]}, jnp.ones(3, jnp.int32))
