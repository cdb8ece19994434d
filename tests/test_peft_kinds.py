"""Kinds other than LoRA in PEFT's format, and their forward passes and gradients beside Hugging Face PEFT's own."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxprune as jp
from jaxprune.adapters.vera import SHARED, Pair
from jaxprune.peft import load_peft, save_peft
from jaxprune.sites import Site

D_IN, D_OUT, N = 12, 10, 7
SITES = (Site("fc1", D_IN, D_OUT, 0, "fc1"), Site("fc2", D_OUT, D_IN, 1, "fc2"))
FORM = {"task_type": None}


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(0, 0.4, shape), jnp.float32)


PARAMS = {s.path: {"kernel": draw(i, s.d_in, s.d_out), "bias": draw(9 + i, s.d_out)} for i, s in enumerate(SITES)}


def begin(method, params=PARAMS, sites=SITES):
    return method.start(jp.Context(jax.random.key(0), params, sites, None, None))


def shaken(adapters):
    """Move every trained leaf away from its start."""
    return {
        path: dataclasses.replace(
            x,
            **{
                field: leaf + 0.3 * draw(i + len(field), *leaf.shape)
                for field, leaf in vars(x).items()
                if hasattr(leaf, "shape") and field not in getattr(x, "frozen", ())
            },
        )
        for i, (path, x) in enumerate(adapters.items())
    }


def apply(params, adapters, masks, x):
    """Two linear layers with a tanh between, from kernels merged in float64 by the adapters' own formula."""
    h = np.asarray(x, np.float64)
    for i, site in enumerate(SITES):
        kernel = np.asarray(params[site.path]["kernel"], np.float64)
        if site.path in adapters:
            kernel = effective(kernel, adapters[site.path], masks.get(site.path))
        h = (np.tanh(h) if i else h) @ kernel + np.asarray(params[site.path]["bias"], np.float64)
    return h


def effective(kernel, adapter, mask):
    a, b = np.asarray(adapter.a, np.float64), np.asarray(adapter.b, np.float64)
    gate = np.ones(a.shape[1]) if mask is None else np.asarray(mask, np.float64)
    if not gate.any():
        return kernel
    v = kernel + adapter.scale * (a * gate) @ b
    return (
        v * np.asarray(adapter.magnitude, np.float64) / np.linalg.norm(v, axis=0)
        if hasattr(adapter, "magnitude")
        else v
    )


def test_dora_round_trip(tmp_path):
    start = begin(jp.dora(rank=3))
    adapters, masks = shaken(start.adapters), {**start.masks, "fc1": jnp.array([1.0, 0, 1])}
    save_peft(adapters, masks, tmp_path / "a", **FORM)
    config = json.loads((tmp_path / "a/adapter_config.json").read_text())
    assert config["use_dora"] is True and config["rank_pattern"] == {"fc1": 2, "fc2": 3}
    tensors = load_file(tmp_path / "a/adapter_model.safetensors")
    np.testing.assert_array_equal(tensors["base_model.model.fc1.lora_magnitude_vector"], adapters["fc1"].magnitude)
    back, back_masks, _ = load_peft(tmp_path / "a", SITES)
    assert all(isinstance(adapter, jp.Dora) for adapter in back.values())
    x = draw(3, N, D_IN)
    np.testing.assert_allclose(apply(PARAMS, back, back_masks, x), apply(PARAMS, adapters, masks, x), atol=1e-5)


def test_dora_round_trip_of_the_layers_of_a_scan(tmp_path):
    sites = [Site(f"layers/fc[{i}]", D_IN, D_OUT, i, "fc") for i in range(3)]
    params = {"layers": {"fc": {"kernel": draw(0, 3, D_IN, D_OUT)}}}
    adapters = shaken(begin(jp.dora(rank=4), params, sites).adapters)
    masks = dict(zip(adapters, jnp.array([[1.0, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 0]]), strict=True))
    options = {"torch_paths": {"layers/fc": "model.{}.fc"}}
    save_peft(adapters, masks, tmp_path / "a", **options, **FORM)
    back, back_masks, _ = load_peft(tmp_path / "a", sites, **options)
    assert {path: x.rank for path, x in back.items()} == {"layers/fc[0]": 2, "layers/fc[2]": 3}
    before, after = (
        jp.merge(params, *pair)["layers"]["fc"]["kernel"] for pair in [(adapters, masks), (back, back_masks)]
    )
    np.testing.assert_allclose(after, before, atol=1e-5)
    np.testing.assert_array_equal(after[1], params["layers"]["fc"]["kernel"][1])


def test_a_folder_with_and_without_magnitudes_must_say_so(tmp_path):
    save_peft(begin(jp.dora(rank=3)).adapters, {}, tmp_path / "a", **FORM)
    file, said = tmp_path / "a/adapter_model.safetensors", tmp_path / "a/adapter_config.json"
    tensors, config = load_file(file), json.loads(said.read_text())
    said.write_text(json.dumps({**config, "use_dora": False}))
    with pytest.raises(jp.UsageError, match=r"2 mismatches: fc1: lora_A, lora_B, lora_magnitude_vector are"):
        load_peft(tmp_path / "a", SITES)
    said.write_text(json.dumps(config))
    save_file({key: value for key, value in tensors.items() if "fc1.lora_mag" not in key}, file)
    with pytest.raises(jp.UsageError, match="1 mismatches: fc1: .* 'missing'"):
        load_peft(tmp_path / "a", SITES)


@pytest.mark.parametrize("method", [jp.pissa(rank=3, alpha=6), jp.dora(rank=3, init="pissa")])
@pytest.mark.parametrize("compacted", [False, True])
def test_pissa_is_written_for_the_checkpoint_as_it_is(tmp_path, method, compacted):
    start = begin(method)
    adapters, masks = shaken(start.adapters), {**start.masks, "fc1": jnp.array([1.0, 0, 1])}
    whole, x = isinstance(adapters["fc1"], jp.Dora), draw(3, N, D_IN)
    if compacted:
        adapters["fc1"] = dataclasses.replace(adapters["fc1"], a=adapters["fc1"].a[:, ::2], b=adapters["fc1"].b[::2])
        masks["fc1"] = jnp.ones(2)
        if not whole:
            del adapters["fc2"], masks["fc2"]  # as if none of its components had survived
    expected = apply(start.params, adapters, masks, x)
    with pytest.raises(jp.UsageError, match="taken out of the kernels; pass initial"):
        save_peft(adapters, masks, tmp_path / "a", **FORM)
    save_peft(adapters, masks, tmp_path / "a", initial=jax.device_get(start.adapters), **FORM)
    back, back_masks, _ = load_peft(tmp_path / "a", SITES)
    assert back["fc1"].rank == 2 + 3 and not back["fc1"].residual
    np.testing.assert_allclose(apply(PARAMS, back, back_masks, x), expected, atol=1e-5)
    assert np.abs(apply(PARAMS, {}, {}, x) - expected).max() > 0.1


def test_initial_values_that_were_donated_are_refused(tmp_path):
    start = begin(jp.pissa(rank=3))
    jax.jit(lambda tree: jax.tree.map(lambda leaf: leaf + 1, tree), donate_argnums=0)(dict(start.adapters))
    fresh = begin(jp.pissa(rank=3)).adapters
    with pytest.raises(jp.UsageError, match="a copy on the host"):
        save_peft(fresh, {}, tmp_path / "a", initial=start.adapters, **FORM)


@pytest.mark.parametrize("kind", ["vera", "lorafa", "rslora"])
def test_kinds_that_are_a_lora_are_written_as_one(tmp_path, kind):
    method = getattr(jp, kind)(rank=3)
    start = begin(method)
    adapters, masks = method.seen((), shaken(start.adapters), start.masks)
    save_peft(adapters, masks, tmp_path / "a", **FORM)
    back, back_masks, _ = load_peft(tmp_path / "a", SITES)
    for site in SITES:
        kernel = PARAMS[site.path]["kernel"]
        merged = adapters[site.path].merge(kernel, None)
        assert np.abs(merged - kernel).max() > 0.01
        np.testing.assert_allclose(back[site.path].merge(kernel, None), merged, atol=1e-5)


def test_what_no_folder_can_hold(tmp_path):
    doras, loras = begin(jp.dora(rank=3)).adapters, begin(jp.lora(rank=3)).adapters
    pissa, vera = begin(jp.dora(rank=3, init="pissa")), begin(jp.vera(rank=3)).adapters
    dead = {"fc1": jnp.zeros(3)}
    for adapters, masks, options, message in [
        ({**doras, "fc2": loras["fc2"]}, {}, {}, "1 adapters are DoRA and 1 are LoRA"),
        (doras, {}, {"profile": "vllm"}, "vLLM refuses DoRA"),
        (vera, {}, {}, "through method.seen first"),
        ({SHARED: vera[SHARED]}, {}, {}, "is a Pair, which"),
        (pissa.adapters, dead, {"initial": pissa.adapters}, "'fc1' has no live component"),
    ]:
        with pytest.raises(jp.UsageError, match=message) as caught:
            save_peft(adapters, masks, tmp_path / "a", **FORM, **options)
        assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


# The rest runs against Hugging Face PEFT where it is installed.


def torch_model():
    torch = pytest.importorskip("torch")
    model = torch.nn.Sequential()
    for i, site in enumerate(SITES):
        layer = torch.nn.Linear(site.d_in, site.d_out)
        with torch.no_grad():
            layer.weight.copy_(torch.tensor(np.asarray(PARAMS[site.path]["kernel"]).T))
            layer.bias.copy_(torch.tensor(np.asarray(PARAMS[site.path]["bias"])))
        model.add_module(site.path, layer)
        if i == 0:
            model.add_module("tanh", torch.nn.Tanh())
    return model


def forward(params, adapters, masks, x):
    """The same network through the adapters' `linear`."""
    for i, site in enumerate(SITES):
        x = jnp.tanh(x) if i else x
        kernel, bias = params[site.path]["kernel"], params[site.path]["bias"]
        x = adapters[site.path].linear(x, kernel, masks.get(site.path), None) + bias
    return x


CONFIGS = {
    "lora": (jp.lora(rank=4, alpha=6), {"lora_alpha": 6}),
    "rslora": (jp.rslora(rank=4, alpha=6), {"lora_alpha": 6, "use_rslora": True}),
    "lorafa": (jp.lorafa(rank=4, alpha=6), {"lora_alpha": 6}),
    "dora": (jp.dora(rank=4, alpha=6), {"lora_alpha": 6, "use_dora": True}),
    "pissa": (jp.pissa(rank=4), {"lora_alpha": 4, "init_lora_weights": "pissa"}),
    "dora_pissa": (
        jp.dora(rank=4, init="pissa"), {"lora_alpha": 4, "init_lora_weights": "pissa", "use_dora": True}
    ),
    "vera": (jp.vera(rank=4), {}),
}  # fmt: skip


def wrapped(name):
    """The model in PEFT, and its adapters' tensors as a mapping {site path: {field: tensor}} in our orientation."""
    peft = pytest.importorskip("peft")
    kind = peft.VeraConfig if name == "vera" else peft.LoraConfig
    model = peft.get_peft_model(
        torch_model(), kind(r=4, target_modules=[site.path for site in SITES], **CONFIGS[name][1])
    )
    layers = {site.path: getattr(model.base_model.model, site.path) for site in SITES}
    if name == "vera":
        fields = {p: {"d": x.vera_lambda_d["default"], "b": x.vera_lambda_b["default"]} for p, x in layers.items()}
    else:
        fields = {p: {"a": x.lora_A["default"].weight, "b": x.lora_B["default"].weight} for p, x in layers.items()}
        if "dora" in name:
            for path, layer in layers.items():
                fields[path]["magnitude"] = layer.lora_magnitude_vector["default"].weight
        if name == "lorafa":
            for factors in fields.values():
                factors["a"].requires_grad_(False)
    return model, layers, fields


def ours(value):
    return jnp.asarray(value.detach().numpy().T)


@pytest.mark.parametrize("name", CONFIGS)
def test_start_forward_and_gradients_equal_those_of_peft(name):
    torch, method = pytest.importorskip("torch"), CONFIGS[name][0]
    model, layers, fields = wrapped(name)
    start = begin(method)
    params = start.params
    for site in SITES:  # where drawing plays no part, the starts are equal too
        layer, adapter = layers[site.path], start.adapters[site.path]
        base = layer.get_base_layer().weight.detach().numpy().T
        np.testing.assert_allclose(params[site.path]["kernel"], base, atol=1e-5)
        if "pissa" in name:
            delta = layer.get_delta_weight("default").detach().numpy().T
            np.testing.assert_allclose(adapter.scale * adapter.a @ adapter.b, delta, atol=1e-5)
        for field in ("magnitude", "d"):
            if hasattr(adapter, field):
                np.testing.assert_allclose(getattr(adapter, field), ours(fields[site.path][field]), rtol=1e-5)

    with torch.no_grad():
        for i, factors in enumerate(fields.values()):
            for j, value in enumerate(factors.values()):
                value.add_(torch.tensor(np.asarray(0.3 * draw(5 * i + j, *value.shape))))
    adapters = {
        path: dataclasses.replace(adapter, **{field: ours(value) for field, value in fields[path].items()})
        for path, adapter in start.adapters.items()
        if path != SHARED
    }
    if name == "vera":
        pair = layers["fc1"]
        adapters[SHARED] = Pair(ours(pair.vera_A["default"]), ours(pair.vera_B["default"]))

    x, c = draw(40, N, D_IN), draw(41, N, D_IN)

    def loss(adapters):
        y = forward(params, *method.seen((), adapters, start.masks), x)
        return jnp.sum(c * y**2), y

    (value, y), grads = jax.value_and_grad(loss, has_aux=True)(adapters)
    theirs = model(torch.tensor(np.asarray(x)))
    total = (torch.tensor(np.asarray(c)) * theirs**2).sum()
    total.backward()
    np.testing.assert_allclose(y, theirs.detach().numpy(), atol=1e-5)
    np.testing.assert_allclose(value, total.item(), rtol=1e-5, atol=1e-6)
    for path, factors in fields.items():
        for field, tensor in factors.items():
            expected = np.zeros(tensor.shape) if tensor.grad is None else tensor.grad.numpy()
            got = getattr(grads[path], field)
            np.testing.assert_allclose(got, expected.T, atol=1e-5 * max(1.0, np.abs(expected).max()), err_msg=field)
            assert np.any(expected) == (field not in getattr(grads[path], "frozen", ()))


@pytest.mark.parametrize("name", ["dora", "pissa", "dora_pissa", "vera", "lorafa", "rslora"])
def test_peft_loads_the_folder_and_computes_the_same(tmp_path, name):
    peft, torch, method = pytest.importorskip("peft"), pytest.importorskip("torch"), CONFIGS[name][0]
    start = begin(method)
    masks = {path: mask.at[1].set(0.0) for path, mask in start.masks.items()}
    adapters, masks = method.seen((), shaken(start.adapters), masks)
    params = start.params
    save_peft(adapters, masks, tmp_path / "a", initial=jax.device_get(start.adapters), **FORM)
    model = peft.PeftModel.from_pretrained(torch_model(), tmp_path / "a").eval()
    x = draw(40, N, D_IN)
    with torch.no_grad():
        got = model(torch.tensor(np.asarray(x))).numpy()
        base = torch_model()(torch.tensor(np.asarray(x))).numpy()
    np.testing.assert_allclose(got, forward(params, adapters, masks, x), atol=1e-5)
    assert np.abs(got - base).max() > 0.01


@pytest.mark.parametrize("rslora", [False, True])
def test_reads_the_dora_that_peft_writes(tmp_path, rslora):
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    config = peft.LoraConfig(
        r=4, lora_alpha=6, use_dora=True, use_rslora=rslora, target_modules=["fc1", "fc2"], rank_pattern={"fc2": 2}
    )
    model = peft.get_peft_model(torch_model(), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "a")
    adapters, masks, _ = load_peft(tmp_path / "a", SITES)
    x = draw(40, N, D_IN)
    got = forward(PARAMS, adapters, masks, x)
    np.testing.assert_allclose(got, model(torch.tensor(np.asarray(x))).detach().numpy(), atol=1e-5)


def test_dropout_of_dora_is_that_of_peft(monkeypatch):
    """With the same entries dropped in both."""
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    x, keep = draw(40, N, D_IN), np.random.default_rng(0).random((N, D_IN)) > 0.4
    model = peft.get_peft_model(
        torch_model(), peft.LoraConfig(r=4, lora_alpha=8, use_dora=True, lora_dropout=0.4, target_modules=["fc1"])
    )
    layer = model.base_model.model.fc1.train()

    class Same(torch.nn.Module):
        def forward(self, value):
            return value * torch.tensor(keep / 0.6, dtype=value.dtype)

    layer.lora_dropout["default"] = Same()
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
        expected = layer(torch.tensor(np.asarray(x))).numpy()
    adapter = jp.Dora(
        ours(layer.lora_A["default"].weight), ours(layer.lora_B["default"].weight), 2.0, 0.4,
        magnitude=ours(layer.lora_magnitude_vector["default"].weight),
    )  # fmt: skip
    monkeypatch.setattr(jax.random, "bernoulli", lambda key, p, shape: jnp.asarray(keep))
    kernel, bias = PARAMS["fc1"]["kernel"], PARAMS["fc1"]["bias"]
    np.testing.assert_allclose(adapter.linear(x, kernel, None, jax.random.key(0)) + bias, expected, atol=1e-5)
