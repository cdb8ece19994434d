"""Wrong input to the library: each kind is one line that says what was given, before anything is computed or written."""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import FrozenDict

import jaxprune as jp
from jaxprune import report
from jaxprune.allocation import TimeModel, rank_problem
from jaxprune.models import EncoderConfig, init_classifier, save_classifier
from jaxprune.peft import load_peft, save_peft
from jaxprune.sites import Site, flatten
from tests.tower import loss_fn, tower

NAN, INF, HUGE = math.nan, math.inf, 10**400
MODEL, PARAMS, X = tower()
SITES = jp.find_sites(PARAMS)
PATH = SITES[0].path
RANKS = {site.path: 2 for site in SITES}
SCORES = {site.path: 1.0 + i for i, site in enumerate(SITES)}
KEY = jax.random.key(0)
ADAPTERS, MASKS = jp.init_lora(KEY, SITES, RANKS)
FORWARD = jp.attach(MODEL)
ADAM = optax.adamw(1e-3)
ARRAY = np.ones((2, 3), np.float32)


def refused(call, message):
    with pytest.raises(jp.UsageError, match=message) as caught:
        call()
    said = str(caught.value)
    assert said.isprintable() and len(said) < 700, said


def with_leaf(value, *, key="x"):
    """Return the tower's parameters with one more entry in the first module."""
    return {**PARAMS, "layer_0": {**PARAMS["layer_0"], key: value}}


TREES = {
    "a list": ([1, 2], "the parameters are a list; expected nested dicts"),
    "None": (None, "the parameters are None"),
    "an array": (ARRAY, "the parameters are a ndarray"),
    "an nnx state": (nnx.State({"a": nnx.Param(jnp.ones(3))}), "a State; .*to_pure_dict"),
    "a mapping that JAX does not know": (types.MappingProxyType({"a": ARRAY}), "are a mappingproxy"),
    "all variables": ({"params": PARAMS}, r"pass variables\['params'\]"),
    "all variables with statistics": ({"params": PARAMS, "batch_stats": {"a": ARRAY}}, r"pass variables\['params'\]"),
    "a list inside": (with_leaf([ARRAY]), "hold a list at 'layer_0/x'"),
    "a tuple inside": (with_leaf((ARRAY,)), "hold a tuple at 'layer_0/x'"),
    "an empty list inside": (with_leaf([]), "hold a list at 'layer_0/x'"),
    "None inside": (with_leaf(None), "hold None at 'layer_0/x'"),
    "text inside": (with_leaf("text"), "hold a str at 'layer_0/x'"),
    "a Python number inside": (with_leaf(1.5), "hold a float at 'layer_0/x'"),
    "a boxed leaf": (with_leaf(nn.Partitioned(ARRAY, (None, None))), "hold a Partitioned at 'layer_0/x'"),
    "an integer key": (with_leaf(ARRAY, key=1), "the key 1 below 'layer_0'; expected text"),
    "a key with a slash": (with_leaf(ARRAY, key="a/b"), "the key 'a/b' below 'layer_0'"),
    "an empty key": (with_leaf(ARRAY, key=""), "the key '' below 'layer_0'"),
    "a key of two lines": (with_leaf(None, key="a\nb"), r"hold None at 'layer_0/a\\nb'"),
}
TAKERS = {
    "find_sites": jp.find_sites,
    "attach": lambda params: FORWARD(params, ADAPTERS, MASKS, X),
    "merge": lambda params: jp.merge(params, ADAPTERS, MASKS),
    "init_weights": lambda params: jp.init_weights(params, "bias"),
    "to_dora": lambda params: jp.to_dora(ADAPTERS, params),
    "gradient_spectra": lambda params: jp.gradient_spectra(FORWARD, loss_fn, params, SITES, [], key=KEY),
    "site_scores": lambda params: jp.site_scores("weight", FORWARD, loss_fn, params, SITES, []),
}


@pytest.mark.parametrize("taker", TAKERS)
@pytest.mark.parametrize("kind", TREES)
def test_wrong_parameter_trees(kind, taker):
    tree, message = TREES[kind]
    refused(lambda: TAKERS[taker](tree), message)


def allocate(scores=SCORES, sites=SITES, budget=None, **settings):
    return lambda: jp.allocate(scores, sites, budget, **settings)


def scores(values):
    return allocate(values)


def plan(ranks, **settings):
    return lambda: jp.init_lora(KEY, SITES, ranks, **settings)


def site(**changed):
    return lambda: jp.default_budget([dataclasses.replace(SITES[0], **changed)])


ALLOCATION = {
    "no sites": (allocate(sites=[]), "there are no sites"),
    "one site": (allocate(sites=SITES[0]), r"sites Site\(.* cannot be used: expected a list of Site"),
    "sites of text": (allocate(sites="layer"), "sites 'layer' cannot be used"),
    "sites that are None": (allocate(sites=None), "sites None cannot be used"),
    "sites that are paths": (allocate(sites=[PATH]), r"sites \['layer_0/fc1'\] cannot be used"),
    "a site without inputs": (site(d_in=0), "sizes that are whole numbers above 0"),
    "a site of text": (site(d_out="x"), "sizes that are whole numbers above 0"),
    "a site beyond all sizes": (site(d_out=10**30), "sizes that are whole numbers above 0"),
    "a negative layer": (site(layer=-1), "a layer number, 0 or more"),
    "ranks of one number": (allocate(ranks=5), "ranks 5 cannot be used: expected distinct whole numbers"),
    "half a rank": (allocate(ranks=[0, 1.5]), "ranks .* cannot be used"),
    "a rank of NaN": (allocate(ranks=[0, NAN]), "ranks .* cannot be used"),
    "a rank beyond 64 bits": (allocate(ranks=[0, 10**30]), "ranks .* cannot be used"),
    "ranks without end": (allocate(ranks=range(10**30)), r"ranks range\(0, 10000.* cannot be used"),
    "ranks of truth values": (allocate(ranks=[False, True]), "ranks .* cannot be used"),
    "ranks of text": (allocate(ranks=["0", "8"]), "ranks .* cannot be used"),
    "a budget of NaN": (allocate(budget=NAN), "budget nan cannot be used"),
    "an infinite budget": (allocate(budget=INF), "budget inf cannot be used"),
    "a budget of text": (allocate(budget="1000"), "budget '1000' cannot be used"),
    "a budget of True": (allocate(budget=True), "budget True cannot be used"),
    "a budget of many digits below 0": (allocate(budget=-(10**5000)), "budget <a whole number of about 5000 digits>"),
    "scores of text": (scores("abcdef"), "scores 'abcdef' cannot be used: expected a mapping"),
    "scores in a set": (scores({1.0, 2.0}), "scores {1.0, 2.0} cannot be used"),
    "scores that are None": (scores(None), "scores None cannot be used"),
    "scores of one number": (scores(1.0), "scores 1.0 cannot be used"),
    "scores in a column": (scores(np.ones((6, 1))), r"scores have shape \(6, 1\), expected \(6,\)"),
    "complex scores": (scores([1j] * 6), "scores must be numbers, one for each site, got 1j at layer_0/fc1"),
    "no usable score": (scores([NAN] * 6), "no importance is finite and above 0"),
    "a time limit of NaN": (allocate(time_limit=NAN), "time_limit nan cannot be used: expected seconds"),
    "a time limit of text": (allocate(time_limit="60"), "time_limit '60' cannot be used"),
    "no time limit": (allocate(time_limit=None), "time_limit None cannot be used"),
    "a negative time limit": (allocate(time_limit=-1), "time_limit -1 cannot be used"),
    "no solver": (allocate(solver=None), "solver None is not known"),
    "a solver's number": (allocate(solver=5), "solver 5 is not known"),
    "a time budget of NaN": (allocate(time_budget=NAN), "time budget nan cannot be used"),
    "a time budget of 0": (allocate(time_budget=0), "time budget 0 cannot be used"),
    "a time budget of 2": (allocate(time_budget=2), "time budget 2 cannot be used"),
    "a time budget of text": (allocate(time_budget="0.5"), "time budget '0.5' cannot be used"),
    "a time budget of True": (allocate(time_budget=True), "time budget True cannot be used"),
    "no time model": (allocate(time_budget=0.9, time_model="flops"), "time model 'flops' cannot be used"),
    "half a time": (lambda: TimeModel(1.5, 1, 1), "forward time 1.5 cannot be used"),
    "no problem": (lambda: jp.solve(SCORES), "problem .* cannot be solved"),
    "a momentum of NaN": (lambda: jp.prune_problem(SCORES, SITES, RANKS, 99, momentum=NAN), "momentum nan"),
    "stability of text": (lambda: jp.prune_problem(SCORES, SITES, RANKS, 99, stability="x"), "stability 'x'"),
    "current ranks of None": (lambda: jp.prune_problem(SCORES, SITES, None, 99), "ranks None cannot be used"),
    "a current rank of True": (lambda: jp.prune_problem(SCORES, SITES, [True] * 6, 99), "rank True at layer_0/fc1"),
    "an unknown current rank": (lambda: jp.step_time({**RANKS, "no": 1}, SITES), "not sites, first 'no'"),
    "a uniform rank of NaN": (lambda: jp.uniform_plan(SITES, NAN), "rank nan at layer_0/fc1"),
    "a uniform rank beyond 64 bits": (lambda: jp.uniform_plan(SITES, 10**30), "rank 10000.* cannot be used"),
    "a uniform rank of text": (lambda: jp.uniform_plan(SITES, "8"), "rank '8' at layer_0/fc1"),
}  # fmt: skip


def step_with(**changed):
    settings = {"forward": FORWARD, "loss_fn": loss_fn, "optimizer": ADAM, "method": None, **changed}
    return lambda: jp.make_step(**settings)


def state():
    return jp.init_state(KEY, ADAPTERS, MASKS, ADAM)


def taken(batch=None, **changed):
    """Take a step."""
    return lambda: step_with(donate=False, **changed)()(PARAMS, state(), batch or {"x": X})


def used_twice():
    step, first = step_with()(), state()
    first = jax.tree.map(jnp.copy, first)
    step(PARAMS, first, {"x": X})
    return jp.fit(step, PARAMS, first, [{"x": X}], total_steps=1, progress=False)


def fit(**changed):
    settings = {"state": state(), "batches": [], "total_steps": 1, "progress": False, **changed}
    return lambda: jp.fit(step_with()(), PARAMS, **settings)


ADAPTING = {
    "half a rank": (plan({PATH: 1.5}), "must be whole numbers, 0 or more, got 1.5 at 'layer_0/fc1'"),
    "a rank of True": (plan({PATH: True}), "got True at 'layer_0/fc1'"),
    "a rank of NaN": (plan({PATH: NAN}), "got nan at"),
    "a rank that would fill the memory": (plan({PATH: 10**30}), "rank 10000.* over 100 times the size of its 8 by 12 kernel"),
    "ranks of no mapping": (plan([2] * 6), r"cannot be used: expected \{site path: rank\}"),
    "ranks of unknown sites": (plan({"layer_9/fc1": 2}), "not sites, first 'layer_9/fc1'; .* such as layer_"),
    "an integer for a path": (plan({5: 2}), "not sites, first 5"),
    "an alpha of 0": (plan(RANKS, alpha=0), "alpha 0 cannot be used: expected a number above 0"),
    "an alpha of NaN": (plan(RANKS, alpha=NAN), "alpha nan cannot be used"),
    "an infinite alpha": (plan(RANKS, alpha=INF), "alpha inf cannot be used"),
    "an alpha beyond float32": (plan(RANKS, alpha=1e300), r"alpha 1e\+300 cannot be used"),
    "an alpha of many digits": (plan(RANKS, alpha=HUGE), "alpha 1000.* cannot be used"),
    "a scale of text": (plan(RANKS, scale="2"), "scale '2' cannot be used"),
    "a dropout of 1": (plan(RANKS, dropout=1), "dropout 1 cannot be used: expected a rate of 0 or more and below 1"),
    "a dropout of NaN": (plan(RANKS, dropout=NAN), "dropout nan cannot be used"),
    "a negative dropout": (plan(RANKS, dropout=-1), "dropout -1 cannot be used"),
    "a number for a key": (lambda: jp.init_lora(0, SITES, RANKS), r"key 0 is no random key; pass jax.random.key\(seed\)"),
    "many keys": (lambda: jp.init_lora(jax.random.split(KEY, 3), SITES, RANKS), "is no random key"),
    "no targets": (lambda: jp.find_sites(PARAMS, []), r"targets \[\] cannot be used"),
    "targets of None": (lambda: jp.find_sites(PARAMS, None), "targets None cannot be used"),
    "numbers for targets": (lambda: jp.find_sites(PARAMS, [1]), r"targets \[1\] cannot be used"),
    "a target without end": (lambda: jp.find_sites(PARAMS, "(" * 5000), "not a regular expression"),
    "a target repeated too often": (lambda: jp.find_sites(PARAMS, "a{9999999999}"), "not a regular expression"),
    "an exclusion that is no expression": (lambda: jp.find_sites(PARAMS, exclude="("), "exclude '.' is not a regular"),
    "everything excluded": (lambda: jp.find_sites(PARAMS, exclude=""), "leaves out every kernel"),
    "kernels of integers": (lambda: jp.find_sites({"a": {"kernel": np.ones((2, 3), np.int8)}}), "is int8 of shape"),
    "kernels without inputs": (lambda: jp.find_sites({"a": {"kernel": np.ones((0, 3))}}), r"float64 of shape \(0, 3\)"),
    "a pattern of None": (lambda: jp.init_weights(PARAMS, None), "pattern None is not a regular expression"),
    "a pattern that is none": (lambda: jp.init_weights(PARAMS, "("), "pattern '.' is not a regular expression"),
    "adapters in a list": (lambda: jp.merge(PARAMS, [1], {}), r"adapters \[1\] cannot be used"),
    "masks of None": (lambda: FORWARD(PARAMS, ADAPTERS, None, X), "masks None cannot be used"),
    "an array for an adapter": (lambda: jp.merge(PARAMS, {PATH: ARRAY}, {}), "the adapter at 'layer_0/fc1' is array"),
    "a mask of another length": (
        lambda: FORWARD(PARAMS, ADAPTERS, {**MASKS, PATH: jnp.ones(3)}, X),
        r"the mask at 'layer_0/fc1' is of shape \(3,\), expected shape \(2,\)",
    ),
    "a list for a mask": (lambda: jp.merge(PARAMS, ADAPTERS, {**MASKS, PATH: [1, 1]}), r"is \[1, 1\], expected shape"),
    "an adapter of another site": (
        lambda: jp.merge(PARAMS, {PATH: ADAPTERS["layer_0/fc2"]}, {}),
        r"factors of shapes \(12, 2\) and \(2, 8\), which do not fit the kernel of shape \(8, 12\)",
    ),
    "a weight of another shape": (
        lambda: jp.with_weights(PARAMS, {"head/bias": jnp.ones(3)}),
        r"the weight at 'head/bias' has shape \(3,\), expected \(2,\)",
    ),
    "a class for a model": (lambda: jp.attach(nn.Dense), "expected an instance of a flax.linen.Module"),
    "an nnx model": (lambda: jp.attach(nnx.Linear(2, 3, rngs=nnx.Rngs(0))), "through attach_function"),
    "a method that the model lacks": (lambda: jp.attach(MODEL, method="encod"), "method 'encod' is none of the model's"),
    "no function": (lambda: jp.attach_function(MODEL.init(KEY, X)), "cannot be called"),
    "an unhashable score": (lambda: jp.site_scores([], FORWARD, loss_fn, PARAMS, SITES, []), r"score \[\] is not known"),
    "one batch for many": (
        lambda: jp.site_scores("absolute", FORWARD, loss_fn, PARAMS, SITES, {"x": X}), "expected a list of batches",
    ),
    "scores of other sites": (
        lambda: jp.site_scores("weight", FORWARD, loss_fn, PARAMS, [Site("no", 2, 2, 0, "no")], []), "site 'no' is not in",
    ),
    "no optimizer": (step_with(optimizer=1e-3), "optimizer 0.001 cannot be used: expected an Optax chain"),
    "a method's factory": (step_with(method=jp.lora), r"such as jaxprune.lora\(\)"),
    "no loss function": (step_with(loss_fn=None), "loss_fn None cannot be called"),
    "half a microbatch": (step_with(accumulate=1.5), "accumulate 1.5 cannot be used"),
    "too few microbatches": (taken(accumulate=3), "needs a leading axis of that length"),
    "many losses": (taken(loss_fn=lambda apply, batch, key: apply(batch["x"])), r"an array of shape \(4, 2\); expected a number"),
    "a state of an unknown adapter": (lambda: jp.init_state(KEY, {"a": 1}, {}, ADAM), "the adapter at 'a' is 1"),
    "a state without a key": (lambda: jp.init_state(0, ADAPTERS, MASKS, ADAM), "key 0 is no random key"),
    "steps of text": (fit(total_steps="9"), "total_steps '9' cannot be used"),
    "no number of steps": (fit(total_steps=NAN), "total_steps nan cannot be used"),
    "no batches": (fit(batches=None), "batches None cannot be used"),
    "one batch to fit": (fit(batches={"x": X}), "expected a list of batches"),
    "no state": (fit(state=ADAPTERS), "expected what init_state returns"),
    "a state used twice": (used_twice, "donated to a step before; go on with the state that the step returned"),
}  # fmt: skip


@pytest.mark.parametrize("kind", ALLOCATION)
def test_wrong_input_of_allocation(kind):
    refused(*ALLOCATION[kind])


@pytest.mark.parametrize("kind", ADAPTING)
def test_wrong_input_of_adapters_and_training(kind):
    refused(*ADAPTING[kind])


def config(**changed):
    """Change adapter_config.json."""

    def damage(folder):
        path = folder / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))

    return damage


def text(content):
    return lambda folder: (folder / "adapter_config.json").write_text(content)


def tensors(change):
    def damage(folder):
        from safetensors.numpy import load_file, save_file

        path = folder / "adapter_model.safetensors"
        save_file({key: np.ascontiguousarray(change(value)) for key, value in load_file(path).items()}, path)

    return damage


def pickled(folder):
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def header(folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes((2**60).to_bytes(8, "little") + path.read_bytes()[8:])


FOLDERS = {
    "deep JSON": (text("[" * 100_000), "cannot be read, a file is damaged"),
    "a list": (text("[]"), "nameless adapter"),
    "a number of 5000 digits": (text('{"r": ' + "9" * 5000 + "}"), "cannot be read"),
    "bytes that are no text": (lambda f: (f / "adapter_config.json").write_bytes(b"\xff\xfe{}"), "cannot be read"),
    "an unhashable kind": (config(peft_type=["LORA"]), "nameless adapter"),
    "half a rank": (config(r=7.5, rank_pattern={}), "r and rank_pattern must be positive numbers, whole ones"),
    "a rank of true": (config(r=True), "must be positive numbers"),
    "an infinite alpha": (config(lora_alpha=INF), "lora_alpha and alpha_pattern must be positive numbers"),
    "an alpha of NaN": (config(lora_alpha=NAN), "must be positive numbers"),
    "an alpha of many digits": (config(lora_alpha=HUGE), "must be positive numbers"),
    "alpha patterns of text": (config(alpha_pattern="x"), "must be positive numbers, got .* and 'x'"),
    "a pattern without end": (config(rank_pattern={"(" * 5000: 2}), "key of rank_pattern .* is not a regular expression"),
    "a pattern repeated too often": (config(rank_pattern={"a{9999999999}": 2}), "is not a regular expression"),
    "a dropout of text": (config(lora_dropout="x"), "dropout 'x' cannot be used"),
    "a dropout of 2": (config(lora_dropout=2), "dropout 2 cannot be used"),
    "targets of a number": (config(target_modules=5), "target_modules is 5; expected a list of module names"),
    "targets of numbers": (config(target_modules=[5]), r"target_modules is \[5\]"),
    "a target that is no expression": (config(target_modules="q("), "target_modules 'q.' is not a regular expression"),
    "exclusions of a dict": (config(exclude_modules={"a": 1}), "exclude_modules is {'a': 1}"),
    "a saved module of text": (config(modules_to_save="classifier"), "modules_to_save is 'classifier'"),
    "DoRA of text": (config(use_dora="no"), "use_dora is 'no'; expected true or false"),
    "a list of a bias": (config(bias=["none"]), r"bias=\['none'\]"),
    "NaN": (tensors(lambda x: x * np.float32(NAN)), "tensors hold NaN or infinity, first 'base_model"),
    "integers": (tensors(lambda x: x.astype(np.int32)), "is of type int32; expected floating-point numbers"),
    "other shapes": (tensors(lambda x: x[..., None]), "does not fit the model, .* mismatches"),
    "a header beyond the file": (header, "cannot be read, a file is damaged"),
    "a pickle": (pickled, "save its adapter_model.bin again with safe_serialization=True"),
}  # fmt: skip


@pytest.mark.parametrize("kind", FOLDERS)
def test_hostile_adapter_folders(kind, tmp_path):
    save_peft(ADAPTERS, MASKS, tmp_path / "adapter", task_type=None)
    damage, message = FOLDERS[kind]
    damage(tmp_path / "adapter")
    refused(lambda: load_peft(tmp_path / "adapter", SITES), message)


def save(adapters=ADAPTERS, masks=MASKS, folder="adapter", **settings):
    return lambda: save_peft(adapters, masks, folder, **{"task_type": None, **settings})


SAVING = {
    "adapters in a list": (save([1]), r"adapters \[1\] cannot be used"),
    "masks of None": (save(masks=None), "masks None cannot be used"),
    "a mask of another length": (save(masks={**MASKS, PATH: np.ones(5)}), r"of shape \(5,\), expected shape \(2,\)"),
    "no folder": (save(folder=None), "folder None cannot be used"),
    "an empty folder": (save(folder=""), "folder '' cannot be used"),
    "a folder of one zero byte": (save(folder="a\0b"), r"folder 'a\\x00b' cannot be used"),
    "a folder that no file system can name": (save(folder="a\ud800"), r"folder 'a\\ud800' cannot be used"),
    "a folder of 300 characters": (save(folder="a" * 300), "cannot write the adapter to .*File name too long"),
    "the root": (save(folder="/"), "^/ holds other files"),
    "the current folder": (save(folder="."), "is the current folder"),
    "a number for a base model": (save(base_model=5), "base_model 5 cannot be used"),
    "a list for a task type": (save(task_type=["SEQ_CLS"]), r"task_type \['SEQ_CLS'\] cannot be used"),
    "an unknown profile": (save(profile=["vllm"]), r"profile \['vllm'\] is unknown"),
    "torch paths of text": (save(torch_paths="x"), "torch_paths 'x' cannot be used"),
    "torch paths of numbers": (save(torch_paths={s.path: 5 for s in SITES}), "has 5 for 'layer_0/fc1'; expected one module"),
    "initial adapters in a list": (save(initial=[1]), r"adapters \[1\] cannot be used"),
    "parameters in a list": (save(params=[1]), "the parameters are a list"),
    "ranks of text to draw": (lambda: report.plot_ranks("x", SITES, "a.png"), "ranks 'x' cannot be used"),
    "half a rank to draw": (lambda: report.plot_ranks({PATH: 1.5}, SITES, "a.png"), "rank 1.5 at 'layer_0/fc1' is wrong"),
    "ranks of layers to draw": (lambda: report.plot_ranks({PATH: [1, 2]}, SITES, "a.png"), r"rank \[1, 2\] at"),
    "a budget to draw": (lambda: report.plot_ranks(RANKS, SITES, "a.png", budget=NAN), "budget nan cannot be used"),
    "events of text": (lambda: report.plot_pruning([], "ab", "a.png", metric="f1"), "events 'ab' cannot be used"),
    "a page of nothing": (lambda: report.write_page(""), "folder '' cannot be used"),
    "a file of 300 characters": (lambda: report.write_json("a" * 300, 1), "cannot write a+.*File name too long"),
    "a file with a zero byte": (lambda: report.append_jsonl("a\0b", 1), r"cannot write a\\x00b"),
}  # fmt: skip


@pytest.mark.parametrize("kind", SAVING)
def test_wrong_input_of_what_writes(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(*SAVING[kind])
    assert not list(tmp_path.iterdir())


def test_what_a_user_may_expect_to_work():
    """FrozenDicts, empty sub-trees and what is huge but right."""
    tree = FrozenDict({**PARAMS, "nothing": {}, "some": {"none": {}}})
    merged = jp.merge(tree, ADAPTERS, MASKS)
    assert jax.tree.structure(merged) == jax.tree.structure(tree)
    assert jp.find_sites(tree) == SITES
    np.testing.assert_array_equal(FORWARD(tree, ADAPTERS, MASKS, X), FORWARD(PARAMS, ADAPTERS, MASKS, X))
    ordered = collections.OrderedDict(PARAMS)
    assert type(jp.merge(ordered, ADAPTERS, MASKS)) is collections.OrderedDict
    digits = {"layer_" + "9" * 5000: {"fc²": {"kernel": ARRAY}}}
    assert jp.find_sites(digits)[0].layer == 0
    assert flatten({"a": {"b": ARRAY}, "c": {}}).keys() == {"a/b"}


@pytest.mark.parametrize("solver", ["CBC", "HIGHS", "GLPK_MI", "DP"])
@pytest.mark.parametrize("budget", [10**30, HUGE])
def test_a_budget_above_all_sites_gives_each_the_largest_rank(solver, budget):
    for time_budget in (None, 1.0):
        found = jp.allocate(
            SCORES, SITES, budget, solver=solver, ranks=range(9), time_limit=1e300, time_budget=time_budget
        )
        assert set(found.ranks.values()) == {8} and found.gap == 0 and found.budget == budget
        assert "Optimal" in found.status and found.table()


def test_costs_beyond_64_bits_are_refused():
    big = [dataclasses.replace(SITES[0], path=str(i), d_in=2**31 - 1, d_out=2**31 - 1) for i in range(2**14 + 1)]
    refused(
        lambda: rank_problem([1.0] * len(big), big, 10**30, ranks=(0, 2**16)),
        "more adapter parameters than 64 bits can count",
    )


def test_a_model_is_saved_with_its_own_configuration_and_name(tmp_path):
    made = EncoderConfig(hidden_size=24, num_heads=2, num_layers=1, vocab_size=50, intermediate_size=8)
    params = init_classifier(made)[1]
    refused(lambda: save_classifier(tmp_path / "a", {}, params), "config {} cannot be used")
    refused(lambda: save_classifier("", made, params), "folder '' cannot be used")
    refused(lambda: save_classifier(tmp_path / "a", made, {"params": params}), "pass variables")
    refused(lambda: save_classifier(tmp_path / "a", made, params, tokenizer=tmp_path / "no"), "is not a folder")
    assert not list(tmp_path.iterdir())
