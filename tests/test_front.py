"""What a user meets first: help, names, imports, and reprs that fit a terminal."""

import dataclasses
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import optax
import pytest

import jaxprune as jp
from jaxprune import adapters as kinds
from jaxprune.sites import site_at

SITES = [site_at(f"layer_{layer}/fc1", 384, 1536) for layer in range(6)]
RANKS = {site.path: 8 for site in SITES}


def test_the_example_of_help_runs(capsys):
    (example,) = re.findall(r":\n\n((?:    .*\n)+)\nPrinting", jp.__doc__)
    assert len(example.splitlines()) <= 10 and max(map(len, example.splitlines())) <= 100
    exec(textwrap.dedent(example), {})
    assert "Plan(2 of 2 sites" in (said := capsys.readouterr().out) and "TrainState(step 1: 2 Lora" in said


def test_help_names_every_room():
    rooms = [module.name for module in pkgutil.iter_modules(jp.__path__) if module.ispkg]
    assert len(rooms) > 7 and not [name for name in rooms if not re.search(rf"^    {name} ", jp.__doc__, re.M)]


def test_names():
    names: dict = {}
    exec("from jaxprune import *", names)
    assert names.keys() - {"__builtins__"} == set(jp.__all__) >= {"Lora", "find_sites", "dplora", "UsageError"}
    assert not [name for name in jp.__all__ if inspect.ismodule(getattr(jp, name))]
    assert re.fullmatch(r"\d+\.\d+\.\d+", jp.__version__) and {"__version__", *jp.__all__} <= set(dir(jp))
    with pytest.raises(AttributeError, match="'jaxprune' has no attribute 'lroa'"):
        jp.lroa  # noqa: B018


def test_the_import_is_light():
    heavy = "transformers datasets cvxpy orbax matplotlib tokenizers sklearn tyro torch".split()
    code = f"import sys, jaxprune; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_no_module_is_hidden_by_another_name():
    found = [module.name for module in pkgutil.walk_packages(jp.__path__, "jaxprune.")]
    found = [name for name in found if name != "jaxprune.__main__"]
    for name in found:
        importlib.import_module(name)
    hidden = [
        name for name in found if getattr(sys.modules[name.rpartition(".")[0]], name.rpartition(".")[2]) is not sys.modules[name]
    ]  # fmt: skip
    assert len(found) > 50 and not hidden


def every_kind():
    key = jax.random.key(0)
    params = {f"layer_{i}": {"fc1": {"kernel": jnp.ones((384, 1536)), "bias": jnp.ones(1536)}} for i in range(6)}
    lora, _ = jp.init_lora(key, SITES, RANKS)
    dora = jp.to_dora(lora, params)
    one = next(iter(lora.values()))
    made = [lora, dora, kinds.to_lorafa(lora), kinds.init_vera(key, SITES, rank=8), jp.init_weights(params, "bias")]
    made += [make(key, SITES, RANKS)[0] for make in (kinds.init_gated, kinds.init_svd, kinds.init_bottleneck)]
    made += [{"": kinds.mask_channels(next(iter(dora.values())), heads=12)}, {"": kinds.SharedLora.of(one, ("a", "b"))}]
    return {type(adapter).__name__: adapter for tree in made for adapter in tree.values()}


@pytest.mark.parametrize("name", [n for n, kind in vars(kinds).items() if dataclasses.is_dataclass(kind)])
def test_an_adapter_is_one_line(name):
    adapter = every_kind()[name]
    shapes = jax.eval_shape(lambda: adapter)
    for one in (adapter, shapes, jax.tree.map(lambda _: True, adapter)):
        text = repr(one)
        assert text.startswith(f"{name}(") and len(text) <= 80 and "\n" not in text
    assert repr(shapes) == repr(adapter)


def test_an_adapter_says_its_sizes():
    lora = every_kind()["Lora"]
    assert repr(lora) == "Lora(384 -> 1536, rank 8, scale 2.0, dropout 0.0)"


def test_a_state_is_a_few_lines():
    adapters, masks = jp.init_lora(jax.random.key(0), SITES, RANKS)
    masks["layer_0/fc1"] = masks["layer_0/fc1"].at[:3].set(0)
    state = jp.init_state(jax.random.key(1), adapters, masks, optax.adamw(1e-3))
    said = repr(state)
    assert (
        "step 0: 6 Lora" in said
        and "45 of 48 components live, 86,400 parameters in adapters, 0 in weights" in said
        and "0.7 MiB" in said
    )
    shapes = jax.eval_shape(lambda: state)
    jax.tree.map(lambda leaf: leaf.delete(), state)  # as donating does
    for unread in (shapes, state):
        assert "step ?: 6 Lora" in repr(unread) and "? of 48 components live, ? parameters" in repr(unread)
    assert repr(jp.TrainState(0, {}, None, 0, 0, None, None)).startswith("TrainState(adapters=0,")  # type: ignore[arg-type]
    assert max(map(len, said.splitlines())) <= 80 and len(said.splitlines()) <= 5
    whole = repr(jp.init_state(jax.random.key(1), {}, {}, optax.adamw(1e-3), weights={"head/bias": jnp.ones(3)}))
    assert "step 0: no adapters" in whole and "3 in weights" in whole


def test_a_plan_in_a_terminal_and_in_a_notebook(tmp_path):
    plan = jp.allocate({site.path: 1.0 + site.layer for site in SITES}, SITES, budget=60_000)
    text = repr(plan)
    assert "of 6 sites" in text and "of 60,000 parameters" in text and len(text) <= 160
    page = plan._repr_html_()
    assert page.count("<tr>") == 7 and f">{max(plan.ranks.values())}</td>" in page and "<th>fc1</th>" in page
    shown = plan.plot(tmp_path / "ranks.png")._repr_png_()  # type: ignore[attr-defined]
    assert shown[:24] == (tmp_path / "ranks.png").read_bytes()[:24]  # a PNG of the same size
    jp.uniform_plan(SITES, 0).plot()
    assert "no rank" in repr(jp.uniform_plan(SITES, 0))


def test_what_methods_pass_around_prints_no_arrays():
    adapters, masks = jp.init_lora(jax.random.key(0), SITES, RANKS)
    plan, params = jp.uniform_plan(SITES, 8), {"head": {"kernel": jnp.ones((100, 100))}}
    method = jp.dplora(total_steps=200, events=30, target=0.5)
    given = [
        jp.Start(adapters, {}, masks, plan, params),
        jp.Context(jax.random.key(0), params, SITES, print, print, [params]),
        jp.Decision(masks, report={"solver": "CBC", "seconds": 0.5}),
        method,
        SITES[0],
    ]
    for one in given:
        assert len(repr(one)) < 300 and "Array" not in repr(one) and "\n" not in repr(one), one
    assert repr(SITES[1]) == "Site('layer_1/fc1', 384 -> 1536, layer 1, type 'fc1')"
    assert "name='dplora'" in repr(method) and "penalty" not in repr(method)
