"""A method that is new: one file and one line (its import), and command line, run, presets and comparison have it."""

from __future__ import annotations

import importlib.util
import inspect
import json
import sys

import pytest

import jaxprune as jp
from experiments import presets
from experiments.run import comparison
from experiments.run.config import RunConfig
from experiments.run.flags import parse_run
from experiments.run.loop import run
from jaxprune.methods import METHODS
from tests import test_methods

FILE = '''
"""LoRA that forgets: at one event every site keeps its components of largest norm."""

from typing import Annotated

from jaxprune.checks import Count, OneOf, Rank, Share
from jaxprune.methods.base import Method
from jaxprune.methods.lora import lora
from jaxprune.methods.registry import register
from jaxprune.scores import component_norms
from jaxprune.surgery import Decision, trim


@register(paper="Nobody 2030, On Forgetting", defaults={"learning_rate": 0.02, "rank": 3})
def forgetful(
    *,
    total_steps: Count,
    rank: Rank = 8,
    at: Share = 0.5,
    stay: Count | None = None,
    order: Annotated[str, OneOf(("largest", "smallest"))] = "largest",
    seed: int = 0,
    loud: bool = False,
) -> Method:
    """Train LoRA, and forget in the middle.

    Args:
      total_steps: of the run.
      rank: components at each site.
      at: share of the run after which
        `stay` are kept.
      stay: components that stay; None for half of them.
      order: which stay.
      seed: of nothing.
      loud: whether to say so.
    """
    kept = stay or rank // 2

    def decide(state, adapters, masks, step, context):
        return state, Decision(trim(component_norms(dict(adapters)), masks, dict.fromkeys(masks, kept)))

    return lora(rank=rank)._replace(decide=decide, events=(max(1, int(at * total_steps)),), name="forgetful")
'''


@pytest.fixture(scope="module")
def forgetful(tmp_path_factory):
    path = tmp_path_factory.mktemp("methods") / "forgetful.py"
    path.write_text(FILE)
    spec = importlib.util.spec_from_file_location("forgetful", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["forgetful"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["forgetful"], METHODS["forgetful"]


def test_it_has_help(forgetful, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stop:
        parse_run(["--method", "forgetful", "--help"], "experiments.glue")
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert stop.value.code == 0
    assert "Train LoRA, and forget in the middle (Nobody 2030, On Forgetting)" in said
    assert "--at FLOAT share of the run after which stay are kept [0.5]" in said
    assert "--stay INT components that stay [half of them]" in said and "--rank INT components at each site [3]" in said
    assert (
        "--order {largest,smallest} which stay [largest]" in said
        and "--loud, --no-loud whether to say so [off]" in said
    )
    # Every run has a seed already; what the run decides is no flag.
    assert "--forgetful-seed INT of nothing [0]" in said and "--total-steps" not in said
    assert "peak learning rate of AdamW [0.02]" in said and "g2r2" not in said
    with pytest.raises(SystemExit):
        parse_run(["--help"], "experiments.glue")
    assert "forgetful Train LoRA, and forget in the middle" in " ".join(capsys.readouterr().out.split())


def test_it_runs(forgetful, tiny_bert, tiny_rte, tmp_path):
    flags = f"--model {tiny_bert} --data-dir {tiny_rte} --task rte --batch-size 8 --max-length 24 --max-steps 4"
    flags += (
        f" --output-dir {tmp_path / 'run'} --method forgetful --rank 4 --stay 1 --forgetful-seed 3 --compact always"
    )
    summary = run(parse_run(flags.split(), "experiments.glue"))
    assert set(summary["ranks"].values()) == {1} and [event["step"] for event in summary["events"]] == [2]
    assert (summary["config"]["learning_rate"], summary["config"]["rank"], summary["config"]["forgetful_seed"]) == (
        0.02,
        4,
        3,
    )
    assert summary["adapter_params"] * 4 == summary["adapter_params_at_start"]
    # The file of settings takes it back.
    again = parse_run(["--config", str(tmp_path / "run" / "config.yaml")], "experiments.glue")
    assert again.settings == {"rank": 4, "stay": 1, "seed": 3} and again.seed == 42
    assert jp.load_run(tmp_path / "run").predict([("one", "two")])


def test_wrong_settings_of_it_are_one_line(forgetful):
    for flags, why in {
        "--at 1.5": "^--at 1.5 is out of range",
        "--order none": "^--order 'none' is not known; expected one of largest, smallest",
        "--interval 3": "^--interval is no setting of forgetful; .*; adalora, g2r2, prunedlora have it",
        "--set loud=3": "^--set loud: 3 cannot be used; expected true or false", "--sty 3": "nearest known: --stay",
    }.items():  # fmt: skip
        with pytest.raises(jp.UsageError, match=why) as caught:
            parse_run(["--method", "forgetful", *flags.split()], "experiments.glue").resolve()
        assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(jp.UsageError, match="^--stay is no setting of lora; .*; forgetful has it$"):
        parse_run(["--method", "lora", "--stay", "1", "--at", "0.5"], "experiments.glue")


def test_a_preset_may_set_everything(forgetful, monkeypatch):
    found = dict(targets="query,value", accumulate=2, dtype="bfloat16", train_head=False, compact="never", stay=1,
                 rank=6, at=0.25, forgetful_seed=7, log_steps=3)  # fmt: skip
    monkeypatch.setitem(presets.PRESETS, "mine", {"forgetful": {"rte": found}})
    config = RunConfig.of(method="forgetful", task="rte", preset="mine", at=0.75).resolve()
    assert config.settings == {"rank": 6, "at": 0.75, "stay": 1, "seed": 7}
    assert (config.targets, config.accumulate, config.dtype, config.train_head) == ("query,value", 2, "bfloat16", False)
    assert (config.compact, config.log_steps, config.seed, config.learning_rate) == ("never", 3, 42, 0.02)


def test_a_comparison_gives_it_its_own_flags_alone(forgetful, tiny_bert, tiny_rte, tmp_path, monkeypatch):
    given = {}

    def fake(glue, log):
        given[glue[glue.index("--method") + 1]] = glue
        log.write_text("it fails\n")
        return 1

    monkeypatch.setattr(comparison, "_run_and_log", fake)
    flags = f"--methods lora bitfit forgetful --tasks rte --model {tiny_bert} --data-dir {tiny_rte}"
    flags += f" --output-dir {tmp_path / 'out'}"
    with pytest.raises(jp.UsageError, match="it fails"):
        comparison.run([*flags.split(), "--rank", "2", "--order=smallest", "--loud", "--epochs", "1"])
    has = {
        name: [flag in text for flag in ("--rank", "--order=smallest", "--loud", "--epochs")]
        for name, text in given.items()
    }
    assert has == {"lora": [True, False, False, True], "bitfit": [False, False, False, True], "forgetful": [True] * 4}
    with pytest.raises(jp.UsageError, match="^--progressive is no setting of lora, bitfit, forgetful; g2r2 has it$"):
        comparison.run([*flags.split(), "--progressive", "0.1"])


def test_it_passes_the_checks_of_all_methods(forgetful, monkeypatch):
    """The suite of `tests/test_methods.py`, every test that takes a method's name."""
    monkeypatch.setitem(
        test_methods.METHODS, "forgetful", lambda: METHODS["forgetful"].factory(total_steps=40, rank=3, stay=1)
    )
    ran = 0
    for test in vars(test_methods).values():
        names = (
            inspect.signature(test).parameters if inspect.isfunction(test) and test.__name__.startswith("test_") else ()
        )
        if "name" in names and set(names) <= {"name", "form"}:
            for form in test_methods.FORMS if "form" in names else (None,):
                test(**({"name": "forgetful"} | ({"form": form} if form else {})))
                ran += 1
    assert ran >= 5


def test_a_factory_checks_what_it_is_given(forgetful):
    with pytest.raises(jp.UsageError, match="^rank 0 is out of range"):
        METHODS["forgetful"].factory(total_steps=4, rank=0)
    assert json.dumps(METHODS["forgetful"].defaults) == '{"learning_rate": 0.02, "rank": 3}'
