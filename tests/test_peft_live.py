"""PEFT folders against Hugging Face PEFT itself, where it is installed: it loads what is written, and what it writes is read."""

import warnings

import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxprune.errors import UsageError
from jaxprune.peft import load_peft, save_peft
from jaxprune.sites import Site
from tests.test_peft import mixed, normal, product

LINEARS = {
    "attention/query": "attention.self.query",
    "attention/key": "attention.self.key",
    "attention/value": "attention.self.value",
    "attention/out": "attention.output.dense",
    "fc1": "intermediate.dense",
    "fc2": "output.dense",
}
MODELS = {
    "bert": ("bert.encoder.layer", {"head/pooler": "bert.pooler.dense", "head/out": "classifier"}),
    "roberta": ("roberta.encoder.layer", {"head/dense": "classifier.dense", "head/out": "classifier.out_proj"}),
    "distilbert": (
        "distilbert.transformer.layer",
        {"head/dense": "pre_classifier", "head/out": "classifier"},
    ),
}
DISTILBERT_LINEARS = {"attention/query": "attention.q_lin", "attention/out": "attention.out_lin", "fc1": "ffn.lin1"}


def torch_model(kind):
    """Build a small random classifier of 12 layers, and name its modules and sites."""
    transformers, torch = pytest.importorskip("transformers"), pytest.importorskip("torch")
    torch.manual_seed(0)
    if kind == "distilbert":
        config = transformers.DistilBertConfig(
            vocab_size=50, dim=16, n_layers=12, n_heads=2, hidden_dim=32, max_position_embeddings=40, num_labels=3
        )
    else:
        config = transformers.AutoConfig.for_model(
            kind, vocab_size=50, hidden_size=16, num_hidden_layers=12, num_attention_heads=2, intermediate_size=32,
            max_position_embeddings=40, num_labels=3, pad_token_id=1,
        )  # fmt: skip
    model = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    # Far from the initialisation, where the logits would hardly depend on the adapters.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    prefix, head = MODELS[kind]
    linears = DISTILBERT_LINEARS if kind == "distilbert" else LINEARS
    torch_paths = {f"encoder/layer_{i}/{k}": f"{prefix}.{i}.{v}" for i in range(12) for k, v in linears.items()}
    weights = dict(model.named_parameters())
    sites = tuple(
        Site(path, weights[f"{name}.weight"].shape[1], weights[f"{name}.weight"].shape[0], 0, path.split("/")[-1])
        for path, name in torch_paths.items()
    )
    return model, sites, {**torch_paths, **head}


def logits(model):
    """In float64, so that only the numbers in the file can make a difference."""
    import torch

    model.double().eval()
    ids = torch.arange(2, 34).reshape(4, 8)
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.numpy()


@pytest.mark.parametrize("kind", list(MODELS))
def test_peft_loads_the_folder_and_computes_the_same(tmp_path, kind):
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    model, sites, torch_paths = torch_model(kind)
    model.save_pretrained(tmp_path / "base")
    (adapters, masks), weights = mixed(sites), {}
    named = dict(model.named_parameters())
    for path in (path for path in torch_paths if path.startswith("head/")):
        d_out, d_in = named[torch_paths[path] + ".weight"].shape
        weights[f"{path}/kernel"], weights[f"{path}/bias"] = normal(d_in, d_out), normal(d_out)
    save_peft(
        adapters,
        masks,
        tmp_path / "adapter",
        weights=weights,
        torch_paths=torch_paths,
        base_model=str(tmp_path / "base"),
    )

    merged = {key: value.double() for key, value in model.state_dict().items()}
    for path, adapter in adapters.items():
        merged[torch_paths[path] + ".weight"] += torch.tensor(product(adapter, masks[path]).T)
    for path, weight in weights.items():
        module, _, leaf = path.rpartition("/")
        value = torch.tensor(np.asarray(weight))
        merged[torch_paths[module] + (".weight" if leaf == "kernel" else ".bias")] = (
            value.T if leaf == "kernel" else value
        )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # Said by transformers about a property that PEFT itself reads.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        with_adapter = peft.PeftModel.from_pretrained(model, tmp_path / "adapter")
        from_base = peft.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter")
    state = load_file(tmp_path / "adapter/adapter_model.safetensors")
    result = with_adapter.load_adapter(tmp_path / "adapter", "default")
    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if "lora_" in key or "modules_to_save" in key]
    live = [path for path in adapters if masks[path].sum()]
    made = {name for name, module in with_adapter.named_modules() if hasattr(module, "lora_A")}
    assert made == {f"base_model.model.{torch_paths[path]}" for path in live}
    assert set(peft.get_peft_model_state_dict(with_adapter)) == set(state)
    got = logits(with_adapter)

    fresh, _, _ = torch_model(kind)
    base = logits(fresh)
    fresh.double().load_state_dict(merged)
    np.testing.assert_allclose(got, logits(fresh), rtol=0, atol=1e-5)
    np.testing.assert_allclose(logits(from_base), logits(fresh), rtol=0, atol=1e-5)
    assert np.abs(got - base).max() > 0.1


@pytest.mark.parametrize("rslora", [False, True])
def test_reads_what_peft_writes(tmp_path, rslora):
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    model, sites, torch_paths = torch_model("roberta")
    config = peft.LoraConfig(
        task_type="SEQ_CLS", r=4, lora_alpha=6, use_rslora=rslora, lora_dropout=0.05,
        target_modules=["query", "intermediate.dense"],
        rank_pattern={"layer.1.attention.self.query": 2, r".*\.1[01]\.intermediate\.dense": 5, "query": 3},
        alpha_pattern={"intermediate.dense": 7},
    )  # fmt: skip
    wrapped = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.copy_(torch.randn_like(parameter))
    wrapped.save_pretrained(tmp_path / "adapter")
    adapters, masks, weights = load_peft(tmp_path / "adapter", sites, torch_paths=torch_paths)
    modules = dict(wrapped.named_modules())
    for site in sites:
        module = modules[f"base_model.model.{torch_paths[site.path]}"]
        assert hasattr(module, "lora_A") == (site.path in adapters)
        if site.path in adapters:
            delta = module.get_delta_weight("default").detach().numpy().T
            np.testing.assert_allclose(product(adapters[site.path], masks[site.path]), delta, rtol=0, atol=1e-5)
    assert {a.rank for a in adapters.values()} == {2, 3, 4, 5}
    saved = modules["base_model.model.classifier"].modules_to_save["default"]
    np.testing.assert_array_equal(weights["head/out/kernel"], saved.out_proj.weight.detach().numpy().T)
    np.testing.assert_array_equal(weights["head/dense/bias"], saved.dense.bias.detach().numpy())


def test_refuses_other_kinds_that_peft_writes(tmp_path):
    peft = pytest.importorskip("peft")
    model, sites, torch_paths = torch_model("bert")
    config = peft.AdaLoraConfig(total_step=10, tinit=1, tfinal=2, target_modules=["query"], task_type="SEQ_CLS")
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(UsageError, match="ADALORA"):
        load_peft(tmp_path / "adapter", sites, torch_paths=torch_paths)
