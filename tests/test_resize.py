"""Resizing a PEFT folder: against brute force over singular values in float64, and PEFT itself where it is installed."""

import itertools
import json
import re
import warnings

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

import jaxprune as jp
from jaxprune.command import main
from jaxprune.peft.names import CONFIG, PREFIX, TENSORS

SIZES = {"layer.0.query": (6, 9), "layer.0.fc1": (9, 5), "layer.1.query": (6, 9), "layer.1.fc1": (9, 5)}


def write(folder, ranks, seed=0, dora=False, rslora=False, dtype=np.float32, decay=0.5, head=True):
    """Write a folder as PEFT would, with mixed ranks and alphas; returns {module: s A B} in float64."""
    rng, tensors, products = np.random.default_rng(seed), {}, {}
    config = {
        "peft_type": "LORA", "r": 3, "lora_alpha": 4, "target_modules": ["query", "fc1"], "task_type": "SEQ_CLS",
        "rank_pattern": {name: rank for name, rank in ranks.items()}, "alpha_pattern": {"fc1": 7},
        "use_rslora": rslora, "use_dora": dora, "modules_to_save": ["classifier"] if head else None, "bias": "none",
        "base_model_name_or_path": "some/model", "lora_dropout": 0.1,
    }  # fmt: skip
    for name, (d_in, d_out) in SIZES.items():
        if not (rank := ranks.get(name, 0)):
            continue
        a = (rng.normal(size=(rank, d_in)) * decay ** np.arange(rank)[:, None]).astype(dtype)
        b = rng.normal(size=(d_out, rank)).astype(dtype)
        tensors |= {f"{PREFIX}{name}.lora_A.weight": a, f"{PREFIX}{name}.lora_B.weight": b}
        if dora:
            tensors[f"{PREFIX}{name}.lora_magnitude_vector"] = rng.random(d_out).astype(dtype)
        alpha = 7 if "fc1" in name else 4
        scale = alpha / np.sqrt(rank) if rslora else alpha / rank
        products[name] = scale * a.T.astype(np.float64) @ b.T.astype(np.float64)
    if head:
        tensors[f"{PREFIX}classifier.weight"] = rng.normal(size=(2, 9)).astype(np.float32)
    folder.mkdir(parents=True)
    save_file(tensors, folder / TENSORS)
    (folder / CONFIG).write_text(json.dumps(config))
    return products


def read(folder):
    """Return {module: A B} of a folder in which alpha is the rank everywhere, its config and its tensors."""
    config, tensors = json.loads((folder / CONFIG).read_text()), load_file(folder / TENSORS)
    assert config["rank_pattern"] == config["alpha_pattern"] and not config["use_rslora"]
    assert config["r"] == config["lora_alpha"] == max(config["rank_pattern"].values())
    assert config["target_modules"] == sorted(config["rank_pattern"])
    found = {}
    for name, rank in config["rank_pattern"].items():
        a, b = (tensors[f"{PREFIX}{name}.lora_{part}.weight"].astype(np.float64) for part in "AB")
        assert len(a) == rank
        found[name] = a.T @ b.T
    return found, config, tensors


def tails(products):
    """Return {module: what is lost at each rank}."""
    return {
        name: np.append(np.cumsum(np.square(np.linalg.svd(x, compute_uv=False))[::-1])[::-1], 0)
        for name, x in products.items()
    }


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data(), st.booleans(), st.booleans())
def test_no_ranks_within_the_budget_lose_less(tmp_path_factory, data, dora, rslora):
    folder = tmp_path_factory.mktemp("resize")
    ranks = {name: data.draw(st.integers(0, 4)) for name in SIZES}
    ranks[data.draw(st.sampled_from(list(SIZES)))] = 3
    weights = data.draw(st.sampled_from([None, {name: 10.0**i for i, name in enumerate(SIZES)}]))
    products = write(folder / "old", ranks, data.draw(st.integers(0, 99)), dora, rslora)
    cost = lambda name, rank: rank * sum(SIZES[name]) + (SIZES[name][1] if dora and rank else 0)  # noqa: E731
    full = sum(cost(name, ranks[name]) for name in products)
    least = sum(cost(name, 1) for name in products) if dora else min(cost(name, 1) for name in products)
    budget = data.draw(st.integers(least, full))
    done = jp.resize(folder / "old", folder / "new", budget=budget, importance=weights)
    lost, weight = tails(products), weights or dict.fromkeys(SIZES, 1.0)
    plans = itertools.product(*(range(1 if dora else 0, ranks[name] + 1) for name in products))
    within = [p for p in plans if any(p) and sum(cost(n, r) for n, r in zip(products, p, strict=True)) <= budget]
    total = lambda plan: sum(weight[n] * lost[n][r] for n, r in zip(products, plan, strict=True))  # noqa: E731
    plan = tuple(done.ranks[name] for name in products)
    assert plan in within and total(plan) == pytest.approx(min(map(total, within)), rel=1e-6, abs=1e-9)
    assert done.params == sum(cost(n, r) for n, r in zip(products, plan, strict=True)) and done.params_before == full
    found, _, tensors = read(folder / "new")
    energy = {name: lost[name][0] for name in products}
    for name, rank in done.ranks.items():
        distance = np.square(products[name] - found.get(name, 0)).sum()
        assert distance == pytest.approx(lost[name][rank], rel=1e-4, abs=1e-9 * energy[name])
        assert done.kept[name] == pytest.approx(1 - lost[name][rank] / energy[name], abs=1e-6)
        key = f"{PREFIX}{name}.lora_magnitude_vector"
        assert (key in tensors) == (dora and rank > 0)
    unweighted = sum(lost[n][r] for n, r in zip(products, plan, strict=True)) / sum(energy.values())
    assert done.energy == pytest.approx(1 - unweighted, abs=1e-6)


def test_what_lies_beside_the_factors_goes_along(tmp_path):
    products = write(tmp_path / "old", dict.fromkeys(SIZES, 4), dtype=ml_dtypes.bfloat16)
    for name, text in (("README.md", "# Card\n"), ("tokenizer.json", "{}")):
        (tmp_path / "old" / name).write_text(text)
    done = jp.resize(tmp_path / "old", tmp_path / "new", ratio=0.5)
    found, config, tensors = read(tmp_path / "new")
    assert config["base_model_name_or_path"] == "some/model" and config["modules_to_save"] == ["classifier"]
    assert config["lora_dropout"] == 0.1
    head = f"{PREFIX}classifier.weight"
    assert tensors[head].tobytes() == load_file(tmp_path / "old" / TENSORS)[head].tobytes()
    assert {value.dtype for key, value in tensors.items() if key != head} == {np.dtype(ml_dtypes.bfloat16)}
    assert (tmp_path / "new/tokenizer.json").read_text() == "{}"
    card = (tmp_path / "new/README.md").read_text()
    assert card.startswith("# Card\n") and f"from {done.params_before:,} to {done.params:,} adapter" in card
    for name, x in found.items():  # bfloat16 has eight bits
        lost = tails(products)[name][done.ranks[name]]
        assert np.square(products[name] - x).sum() == pytest.approx(lost, rel=0.05, abs=1e-4 * np.square(x).sum())
    assert set(done.sites) and {site.type for site in done.sites} == {"query", "fc1"}
    assert re.fullmatch(
        r"Resized\(232 to \d+ parameters at 4 modules, ranks up to \d, [\d.]+ % of the energy kept\)", repr(done)
    )


def test_the_whole_budget_keeps_every_product(tmp_path):
    products = write(tmp_path / "old", dict.fromkeys(SIZES, 3), decay=1e-3)
    done = jp.resize(tmp_path / "old", tmp_path / "new", ratio=1.0)
    for name, x in read(tmp_path / "new")[0].items():
        np.testing.assert_allclose(x, products[name], atol=1e-6 * np.abs(products[name]).max())
    assert done.energy == 1 and done.ranks == done.before and done.plan and done.plan.gap == 0


def test_ranks_may_be_given_by_patterns(tmp_path):
    products = write(tmp_path / "old", dict.fromkeys(SIZES, 4))
    done = jp.resize(tmp_path / "old", tmp_path / "new", rank_pattern={"0.query": 1, "query": 0, "fc1": 9})
    assert done.ranks == {"layer.0.query": 1, "layer.0.fc1": 4, "layer.1.query": 0, "layer.1.fc1": 4}
    found, _, _ = read(tmp_path / "new")
    assert set(found) == set(SIZES) - {"layer.1.query"} and done.plan is None
    distance = np.square(products["layer.0.query"] - found["layer.0.query"]).sum()
    assert distance == pytest.approx(tails(products)["layer.0.query"][1], rel=1e-5)


def test_the_command(tmp_path, capsys):
    write(tmp_path / "run/adapter", dict.fromkeys(SIZES, 4))
    with pytest.raises(SystemExit) as stop:
        main(["resize", str(tmp_path / "run"), "--ratio", "0.5", "--output", str(tmp_path / "new")])
    said = capsys.readouterr().out
    assert stop.value.code == 0 and "parameters," in said and "largest rank" in said and "for vLLM" in said
    assert said.count(" -> ") == 4 and max(map(len, said.splitlines()[:-1])) <= 80
    with pytest.raises(SystemExit):
        main(["resize", str(tmp_path / "run"), "--rank-pattern", '{".*": 2}', "--output", str(tmp_path / "two")])
    assert set(read(tmp_path / "two")[1]["rank_pattern"].values()) == {2}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "^give one of ratio, budget and rank_pattern; got none$"),
        ({"ratio": 0.5, "budget": 9}, "^give one of ratio, budget and rank_pattern; got ratio and budget$"),
        ({"ratio": 0}, "^ratio 0 is out of range; expected a share of the 232 parameters, above 0 to 1$"),
        ({"ratio": "half"}, "^ratio 'half' is out of range"),
        ({"budget": 2.5}, "^budget 2.5 cannot be used: expected a whole number of parameters, of 232$"),
        ({"budget": 3}, "^no plan fits a budget of 3 adapter parameters: .* raise the budget to 14 or more$"),
        ({"rank_pattern": {}}, "^rank_pattern .* cannot be used: expected {expression: rank}$"),
        ({"rank_pattern": {"qery": 2}}, "^rank_pattern: 'qery' matches no module; nearest names: "),
        ({"rank_pattern": {"(": 2}}, "^key of rank_pattern '\\(' is not a regular expression"),
        ({"rank_pattern": {".*": -1}}, "^rank -1 of '.\\*' cannot be used"),
        ({"rank_pattern": {".*": 0}}, "^rank_pattern leaves no module above rank 0"),
        ({"ratio": 0.5, "importance": {"layer/0/query": 1.0}}, "^importance has no entry for 'layer.0.fc1'; nearest"),
        (
            {"ratio": 0.5, "importance": dict.fromkeys(SIZES, -1.0)},
            "^importance -1.0 of 'layer.0.fc1' cannot be used",
        ),
    ],
)
def test_wrong_input_is_one_line_and_nothing_is_written(tmp_path, arguments, message):
    write(tmp_path / "old", dict.fromkeys(SIZES, 4))
    with pytest.raises(jp.UsageError, match=message) as caught:
        jp.resize(tmp_path / "old", tmp_path / "new", **arguments)
    assert "\n" not in str(caught.value) and not (tmp_path / "new").exists()


def test_folders_that_are_no_lora_of_linear_layers_are_one_line(tmp_path):
    write(tmp_path / "dora", dict.fromkeys(SIZES, 2), dora=True)
    with pytest.raises(jp.UsageError, match="^DoRA module 'layer.0.query' would have rank 0"):
        jp.resize(tmp_path / "dora", tmp_path / "new", rank_pattern={"query": 0})
    with pytest.raises(jp.UsageError, match="raise the budget"):
        jp.resize(tmp_path / "dora", tmp_path / "new", budget=30)
    write(tmp_path / "zero", dict.fromkeys(SIZES, 2), decay=0.0)
    tensors = {k: np.zeros_like(v) for k, v in load_file(tmp_path / "zero" / TENSORS).items()}
    save_file(tensors, tmp_path / "zero" / TENSORS)
    with pytest.raises(jp.UsageError, match="^every product s A B in the folder is zero"):
        jp.resize(tmp_path / "zero", tmp_path / "new", ratio=0.5)
    tensors[f"{PREFIX}layer.0.query.lora_embedding_A"] = np.zeros((2, 5), np.float32)
    save_file(tensors, tmp_path / "zero" / TENSORS)
    with pytest.raises(jp.UsageError, match="'layer.0.query' has .*lora_embedding_A .* of a linear layer$"):
        jp.resize(tmp_path / "zero", tmp_path / "new", ratio=0.5)
    with pytest.raises(jp.UsageError, match="has no adapter_config.json"):
        jp.resize(tmp_path, tmp_path / "new", ratio=0.5)


def test_peft_loads_what_is_written_and_computes_the_same(tmp_path):
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    from tests.test_peft_live import torch_model

    model, _, _ = torch_model("bert")
    config = peft.LoraConfig(
        task_type="SEQ_CLS", r=4, lora_alpha=6, use_rslora=True, target_modules=["query", "intermediate.dense"],
        rank_pattern={"query": 3},
    )  # fmt: skip
    wrapped = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter))
    wrapped.save_pretrained(tmp_path / "old")
    before = {
        name: x.get_delta_weight("default") for name, x in wrapped.named_modules() if hasattr(x, "get_delta_weight")
    }
    done = jp.resize(tmp_path / "old", tmp_path / "new", ratio=0.1)
    fresh, _, _ = torch_model("bert")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        loaded = peft.PeftModel.from_pretrained(fresh, tmp_path / "new")
    after = {
        name: x.get_delta_weight("default") for name, x in loaded.named_modules() if hasattr(x, "get_delta_weight")
    }
    live = {f"{PREFIX}{name}" for name, rank in done.ranks.items() if rank}
    assert set(after) == live and len(live) < len(before)
    for name, delta in before.items():
        rank = done.ranks[name.removeprefix(PREFIX)]
        whole = delta.double().detach().numpy()
        left = after[name].double().detach().numpy() if name in after else 0 * whole
        sigma = np.linalg.svd(whole, compute_uv=False)
        assert np.square(whole - left).sum() == pytest.approx(np.square(sigma[rank:]).sum(), rel=1e-4, abs=1e-6)
