import json
import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxprune.adapters import Lora, init_lora
from jaxprune.errors import UsageError
from jaxprune.peft import load_peft, save_peft
from jaxprune.sites import Site, find_sites

RNG = np.random.default_rng(0)
SHAPES = {"query": (16, 16), "value": (16, 16), "fc1": (16, 32), "fc2": (32, 16)}
SITES = tuple(Site(f"encoder/layer_{i}/{name}", *shape, i, name) for i in range(12) for name, shape in SHAPES.items())
HEAD = {"head/dense/kernel": (16, 16), "head/dense/bias": (16,), "head/out/kernel": (16, 3), "head/out/bias": (3,)}


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def lora(site, rank, scale=2.0):
    return Lora(normal(site.d_in, rank), normal(rank, site.d_out), scale, 0.1)


def product(adapter, mask):
    """s (A * m) B in float64."""
    a, b = np.asarray(adapter.a, np.float64), np.asarray(adapter.b, np.float64)
    return adapter.scale * (a * np.asarray(mask, np.float64)) @ b


def heads():
    return {path: normal(*shape) for path, shape in HEAD.items()}


def mixed(sites, ranks=(0, 1, 3, 8)):
    """Adapters of different ranks and scales; every second one has dead components, some have no live one."""
    adapters, masks = {}, {}
    for i, site in enumerate(sites):
        rank = ranks[i % len(ranks)]
        if rank:
            adapters[site.path] = lora(site, rank, 0.5 + i % 3)
            masks[site.path] = jnp.asarray(RNG.random(rank) < 0.5 if i % 2 else np.ones(rank), jnp.float32)
    masks[SITES[-1].path] = jnp.zeros_like(masks[SITES[-1].path]) if SITES[-1].path in masks else None
    return adapters, {path: mask for path, mask in masks.items() if mask is not None}


def test_round_trip_keeps_every_product_and_drops_dead_components(tmp_path):
    adapters, masks = mixed(SITES)
    weights = heads()
    save_peft(adapters, masks, tmp_path / "adapter", weights=weights)
    back, back_masks, back_weights = load_peft(tmp_path / "adapter", SITES)
    assert back_weights.keys() == weights.keys()
    for path, value in weights.items():
        np.testing.assert_array_equal(back_weights[path], value)
    live = {path: int(mask.sum()) for path, mask in masks.items() if mask.sum()}
    assert len(live) < len(adapters)
    assert {path: a.rank for path, a in back.items()} == live
    for path in live:
        expected = product(adapters[path], masks[path])
        np.testing.assert_allclose(product(back[path], back_masks[path]), expected, rtol=0, atol=1e-5)
        assert back[path].dropout == 0.1


def test_files_follow_the_format(tmp_path):
    site = SITES[2]
    adapter, mask, head = lora(site, 4, 3.0), jnp.array([1.0, 0.0, 0.0, 1.0]), heads()
    save_peft({site.path: adapter}, {site.path: mask}, tmp_path / "a", weights=head, base_model="some/model")
    config = json.loads((tmp_path / "a/adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 2
    assert config["rank_pattern"] == config["alpha_pattern"] == {"encoder.layer_0.fc1": 2}
    assert config["target_modules"] == ["encoder.layer_0.fc1"]
    assert config["modules_to_save"] == ["head"]
    assert config["base_model_name_or_path"] == "some/model"
    tensors = load_file(tmp_path / "a/adapter_model.safetensors")
    prefix = "base_model.model."
    assert {key: value.shape for key, value in tensors.items()} == {
        prefix + "encoder.layer_0.fc1.lora_A.weight": (2, 16),
        prefix + "encoder.layer_0.fc1.lora_B.weight": (32, 2),
        prefix + "head.dense.weight": (16, 16),
        prefix + "head.dense.bias": (16,),
        prefix + "head.out.weight": (3, 16),
        prefix + "head.out.bias": (3,),
    }
    a, b = (tensors[f"{prefix}encoder.layer_0.fc1.lora_{x}.weight"] for x in "AB")
    np.testing.assert_allclose(b @ a, product(adapter, mask).T, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(tensors[prefix + "head.out.weight"], np.asarray(head["head/out/kernel"]).T)


def test_paths_that_end_in_another_path_keep_their_own_rank(tmp_path):
    sites = [Site("fc", 8, 8, 0, "fc"), Site("block/fc", 8, 8, 0, "fc")]
    adapters = {site.path: lora(site, rank) for site, rank in zip(sites, (2, 5), strict=True)}
    save_peft(adapters, {}, tmp_path / "a", task_type=None)
    back, *_ = load_peft(tmp_path / "a", sites)
    assert {path: adapter.rank for path, adapter in back.items()} == {"fc": 2, "block/fc": 5}


@pytest.mark.parametrize("form", ["{}[{}]", "{}[:,{}]"])
@pytest.mark.parametrize("entry", ["model.layers.{}.q", ["model.layers.0.q", "model.layers.1.q", "model.layers.2.q"]])
def test_layers_of_a_scan_have_names_of_their_own(tmp_path, form, entry):
    sites = [Site(form.format("layers/q", i), 16, 24, i, "q") for i in range(3)]
    adapters = {site.path: lora(site, rank) for site, rank in zip(sites[::2], (2, 3), strict=True)}
    save_peft(adapters, {}, tmp_path / "a", torch_paths={"layers/q": entry}, task_type=None)
    config = json.loads((tmp_path / "a/adapter_config.json").read_text())
    assert config["rank_pattern"] == {"model.layers.0.q": 2, "model.layers.2.q": 3}
    back, *_ = load_peft(tmp_path / "a", sites, torch_paths={"layers/q": entry})
    assert back.keys() == adapters.keys()
    for path, adapter in adapters.items():
        np.testing.assert_allclose(
            product(back[path], np.ones(adapter.rank)), product(adapter, np.ones(adapter.rank)), rtol=0, atol=1e-5
        )


@pytest.mark.parametrize(
    "torch_paths", [None, {"layers/q": "q"}, {"layers/q": ["a"]}, {"layers/q": ["a", "b", "b"]}, {"layers/q": "{x}"}]
)
def test_a_layer_of_a_scan_needs_a_name_of_its_own(tmp_path, torch_paths):
    site = Site("layers/q[2]", 16, 24, 2, "q")
    with pytest.raises(UsageError, match=r"'layers/q\[2\]' is a layer of a scan.*pattern with \{\}"):
        save_peft({site.path: lora(site, 2)}, {}, tmp_path / "a", torch_paths=torch_paths, task_type=None)


def test_frozen_leaves_complete_the_head(tmp_path):
    trained = {"head/out/kernel": normal(16, 3)}
    params = {"head": {"dense": {"kernel": normal(16, 16), "bias": normal(16)}, "out": {"bias": normal(3)}}}
    torch_paths = {SITES[0].path: "roberta.q", "head/dense": "classifier.dense", "head/out": "classifier.out_proj"}
    adapters = {SITES[0].path: lora(SITES[0], 2)}
    with pytest.raises(UsageError, match="'head/dense' was not trained; pass params"):
        save_peft(adapters, {}, tmp_path / "a", weights=trained, torch_paths=torch_paths)
    save_peft(adapters, {}, tmp_path / "a", weights=trained, torch_paths=torch_paths, params=params)
    *_, back = load_peft(tmp_path / "a", SITES[:1], torch_paths=torch_paths)
    np.testing.assert_array_equal(back["head/dense/kernel"], params["head"]["dense"]["kernel"])
    np.testing.assert_array_equal(back["head/out/bias"], params["head"]["out"]["bias"])
    np.testing.assert_array_equal(back["head/out/kernel"], trained["head/out/kernel"])


def test_frozen_head_is_saved_where_peft_wants_one(tmp_path):
    params = {"head": {"out": {"kernel": normal(16, 3), "bias": normal(3)}}, "pooler": {"kernel": normal(16, 16)}}
    torch_paths = {SITES[0].path: "bert.q", "pooler": "bert.pooler.dense", "head/out": "classifier"}
    save_peft({SITES[0].path: lora(SITES[0], 2)}, {}, tmp_path / "a", torch_paths=torch_paths, params=params)
    back, _, weights = load_peft(tmp_path / "a", SITES[:1], torch_paths=torch_paths)
    assert set(back) == {SITES[0].path} and set(weights) == {"head/out/kernel", "head/out/bias"}
    np.testing.assert_array_equal(weights["head/out/kernel"], params["head"]["out"]["kernel"])


@pytest.mark.parametrize(
    ("extra", "options", "message"),
    [
        ({}, {"weights": {"encoder/layer_0/query/bias": jnp.zeros(16)}}, "outside the head.*merge"),
        ({}, {"weights": {"encoder/layer_0/query/kernel": jnp.zeros((16, 16))}}, "outside the head.*merge"),
        ({"encoder/layer_1/query": object()}, {}, "is a object.*merge"),
        ({}, {"task_type": "SEQ_CLS"}, "goes with a head"),
        ({}, {"task_type": None, "profile": "onnx"}, "expected 'peft' or 'vllm'"),
        ({}, {"task_type": None, "torch_paths": {"encoder/layer_0/key": "k"}}, "no entry for 'encoder/layer_0/query'"),
        ({"encoder/layer_0/value": lora(SITES[1], 1)},
         {"task_type": None, "torch_paths": {SITES[0].path: "q", SITES[1].path: "q"}}, "both have the torch path 'q'"),
        ({"head/out": lora(SITES[0], 1)}, {"weights": heads()}, "lies in the head"),
        ({}, {"weights": heads(), "profile": "vllm"}, "vLLM refuses adapters with a trained head"),
        ({"encoder/layer_0/fc1": lora(SITES[2], 520)}, {"task_type": None, "profile": "vllm"}, "up to 512, got 520"),
        ({"encoder/layer_0/fc1": Lora(jnp.full((16, 2), jnp.nan), normal(2, 32), 2.0)}, {"task_type": None}, "NaN"),
    ],
)  # fmt: skip
def test_what_the_format_cannot_hold_is_refused(tmp_path, extra, options, message):
    adapters = {SITES[0].path: lora(SITES[0], 2), **extra}
    with pytest.raises(UsageError, match=message) as caught:
        save_peft(adapters, {}, tmp_path / "a", **options)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_nothing_live_is_refused(tmp_path):
    with pytest.raises(UsageError, match="no adapter has a live component"):
        save_peft({SITES[0].path: lora(SITES[0], 2)}, {SITES[0].path: jnp.zeros(2)}, tmp_path / "a", task_type=None)


def test_vllm_profile_writes_what_vllm_reads(tmp_path):
    adapters, masks = mixed(SITES)
    save_peft(adapters, masks, tmp_path / "a", task_type="CAUSAL_LM", profile="vllm")
    config = json.loads((tmp_path / "a/adapter_config.json").read_text())
    tensors = load_file(tmp_path / "a/adapter_model.safetensors")
    # vLLM knows one scale, lora_alpha / r, and reads the ranks from the tensors.
    scale = config["lora_alpha"] / config["r"]
    assert config["modules_to_save"] is None
    for path in adapters:
        key = f"base_model.model.{path.replace('/', '.')}.lora_"
        if key + "A.weight" in tensors:
            got = scale * tensors[key + "B.weight"] @ tensors[key + "A.weight"]
            np.testing.assert_allclose(got.T, product(adapters[path], masks[path]), rtol=0, atol=1e-5)


def test_folder_is_replaced_whole_or_left_as_it_was(tmp_path, monkeypatch):
    folder = tmp_path / "deep" / "adapter"
    site = SITES[0]
    save_peft({site.path: lora(site, 2)}, {}, folder, task_type=None)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def disk_full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(UsageError, match="No space left on device"):
        patch.setattr("pathlib.Path.write_text", disk_full)
        save_peft({site.path: lora(site, 5)}, {}, folder, task_type=None)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    save_peft({site.path: lora(site, 5)}, {}, folder, task_type=None)
    assert load_peft(folder, [site])[0][site.path].rank == 5
    assert [path.name for path in folder.parent.iterdir()] == ["adapter"]


def test_other_files_are_never_removed(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match="other files, such as 'thesis.tex'"):
        save_peft({SITES[0].path: lora(SITES[0], 2)}, {}, tmp_path, task_type=None)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot write the adapter to .*file/adapter"):
        save_peft({SITES[0].path: lora(SITES[0], 2)}, {}, tmp_path / "file/adapter", task_type=None)


def test_a_write_that_does_not_read_back_is_an_error(tmp_path, monkeypatch):
    import safetensors.numpy

    def corrupt(tensors, *args, **kwargs):
        save_file({key: value + 0.01 * ("lora_B" in key) for key, value in tensors.items()}, *args, **kwargs)

    monkeypatch.setattr(safetensors.numpy, "save_file", corrupt)
    with pytest.raises(RuntimeError, match="differs from the one written.*encoder/layer_0/query"):
        save_peft({SITES[0].path: lora(SITES[0], 2)}, {}, tmp_path / "a", task_type=None)
    assert list(tmp_path.iterdir()) == []


def rewrite(folder, config=None, tensors=None):
    """Change a folder: merge keys into the configuration, update tensors, drop those that are None."""
    if config:
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    if tensors:
        path = folder / "adapter_model.safetensors"
        merged = {**load_file(path), **tensors}
        save_file({key: value for key, value in merged.items() if value is not None}, path)


@pytest.fixture
def folder(tmp_path):
    adapters = {site.path: lora(site, 2) for site in SITES[:4]}
    save_peft(adapters, {}, tmp_path / "adapter", weights=heads())
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "ADALORA"}, "ADALORA"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"bias": "all"}, "bias='all'"),
        ({"rank_pattern": {"q(": 2}}, "not a regular expression"),
        ({"r": "eight"}, "must be positive numbers"),
        ({"rank_pattern": [2]}, "must be positive numbers"),
    ],
)
def test_other_kinds_are_refused_by_name(folder, config, message):
    rewrite(folder, config)
    with pytest.raises(UsageError, match=message):
        load_peft(folder, SITES[:4])


def test_one_error_lists_every_mismatch(folder):
    prefix = "base_model.model."
    zeros = np.zeros((2, 2), np.float32)
    rewrite(folder, tensors={
        prefix + "encoder.layer_0.query.lora_A.weight": zeros,
        prefix + "encoder.layer_0.value.lora_B.weight": None,
        prefix + "encoder.layer_0.fc1.lora_A.weight": None,
        prefix + "encoder.layer_0.fc1.lora_B.weight": None,
        prefix + "encoder.layer_7.query.lora_A.weight": zeros,
        prefix + "embeddings.weight": zeros,
        "encoder.layer_0.query.weight": zeros,
    })  # fmt: skip
    with pytest.raises(UsageError, match="6 mismatches") as caught:
        load_peft(folder, SITES[:4])
    for part in (
        "layer_0.query: lora_A, lora_B are [(2, 2), (16, 2)], expected [(2, 16), (16, 2)]",
        "layer_0.value: lora_A, lora_B are [(2, 16), 'missing']",
        "layer_0.fc1: lora_A, lora_B are ['missing', 'missing']",
        "'encoder.layer_7.query' has an adapter but is not among the sites",
        "unexpected key 'base_model.model.embeddings.weight'",
        "unexpected key 'encoder.layer_0.query.weight'",
    ):
        assert part in str(caught.value)


def test_rank_of_the_configuration_must_be_that_of_the_tensors(folder):
    rewrite(folder, {"rank_pattern": {}, "r": 4})
    with pytest.raises(UsageError, match="4 mismatches"):
        load_peft(folder, SITES[:4])


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_missing_and_truncated_files(folder, name):
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[:-7])
    with pytest.raises(UsageError, match="cannot be read"):
        load_peft(folder, SITES[:4])
    (folder / name).unlink()
    with pytest.raises(UsageError, match=f"has no {name}"):
        load_peft(folder, SITES[:4])
    shutil.rmtree(folder)
    with pytest.raises(UsageError, match="has no adapter_config.json and no adapter_model.safetensors"):
        load_peft(folder, SITES[:4])


def test_missing_head_is_a_mismatch(folder):
    torch_paths = {site.path: site.path.replace("/", ".") for site in SITES[:4]}
    torch_paths |= {"head/dense": "head.dense", "head/out": "head.out"}
    assert "head/out/kernel" in load_peft(folder, SITES[:4], torch_paths=torch_paths)[2]
    rewrite(folder, tensors={"base_model.model.head.out.weight": None})
    with pytest.raises(UsageError, match="head.out.weight is missing"):
        load_peft(folder, SITES[:4], torch_paths=torch_paths)


class Pictures(nn.Module):
    """An embedding, a convolution, attention's kernels of three axes, and a linear layer."""

    @nn.compact
    def __call__(self, ids):
        x = nn.Embed(20, 8, name="words")(ids)
        x = nn.Conv(8, (3,), name="window")(x)
        x = nn.DenseGeneral((2, 4), name="query")(x).reshape(*ids.shape, 8)
        return nn.Dense(8, name="fc1")(x)


@pytest.mark.parametrize("target, what", [("words", "an embedding"), ("window", r"a kernel of shape \(3, 8, 8\)")])
def test_embeddings_and_convolutions_are_refused(target, what, tmp_path):
    model, ids = Pictures(), jnp.ones((2, 5), jnp.int32)
    params = model.init(jax.random.key(0), ids)["params"]
    call = lambda params: model.apply({"params": params}, ids)  # noqa: E731
    for targets in ["fc1", "query"], ["fc1", target]:
        sites = find_sites(params, targets, call=call)
        adapters, masks = init_lora(jax.random.key(0), sites, {site.path: 2 for site in sites})
        if target not in targets:
            save_peft(adapters, masks, tmp_path / "linear", params=params, task_type=None)
            continue
        with pytest.raises(UsageError, match=f"'{target}' lies on {what}.* merge the adapters") as caught:
            save_peft(adapters, masks, tmp_path / "other", params=params, task_type=None)
    assert "\n" not in str(caught.value) and [path.name for path in tmp_path.iterdir()] == ["linear"]
