"""Settings in a file: a run's own come back as they were, flags win, and what is wrong is one line."""

import dataclasses

import pytest
import yaml

from experiments.run.cli import parse
from experiments.run.comparison import CompareConfig
from experiments.run.config import RunConfig, offered
from experiments.run.flags import parse_run
from experiments.run.settings import _with_default, flags
from experiments.run.settings_file import written
from jaxprune.errors import UsageError
from tests.experiments.refusals import assert_refused

COMMANDS = (
    "",
    "--method lora --rank 4 --task rte --seed 7 --no-train-head --targets query,value --warmup 0.1 --dtype bfloat16",
    "--method dplora --preset paper --task mrpc --data-dir some/where --save-steps 9 --tensorboard --budget-schedule early "
    "--prune-ratio 0.7 --ranks 0 1 4 --per-sample --solver dp",
    "--method channelmask --learn paper --temperatures 1 0.5 --channels query value --no-shared",
    "--method g2r2 --preset paper --task sst2 --set score=tangent combine=none --learning-rate 1e-5 --g2r2-warmup 3 --warmup 2",
    "--method lora --task rte --model no --targets re:^a:\\s#b$ --max-steps 1000000000000000000000000000000",
)


@pytest.mark.parametrize("command", COMMANDS)
def test_what_was_written_is_read_back(command, tmp_path):
    given = parse_run([*command.split(), "--output-dir", str(tmp_path), "--overwrite"], "glue")
    path = tmp_path / "config.yaml"
    path.write_bytes(written(given, given.resolve()))
    again = parse_run(["--config", str(path)], "glue")
    assert again == dataclasses.replace(given, output_dir=None, overwrite=False)
    # Every setting stands in the file; those that were not given as comments.
    lines = [line.removeprefix("# ").partition(":")[0] for line in path.read_text().splitlines()[1:]]
    assert set(lines) >= {*offered("experiments.glue"), *flags(given.entry)} - {
        "config",
        "output_dir",
        "overwrite",
        "resume",
    }


def test_flags_beside_a_file_win(tmp_path):
    path = tmp_path / "my settings.yaml"
    path.write_text("method: dora\nlearning_rate: 1e-2\nrank: 3\ntrain_head: false\nset: [a=1, b=2]\nalpha:\n")
    found = parse_run(["--rank=5", f"--config={path}", "--train-head", "--set", "c=3"], "glue")
    assert (found.method, found.learning_rate, found.settings, found.train_head) == ("dora", 0.01, {"rank": 5}, True)
    assert found.set == ("c=3",) and found.config is None
    assert parse_run(["--config", str(path)], "glue").set == ("a=1", "b=2")
    # By either name of a flag, and of another method its own settings.
    path.write_text("method: dplora\nprune_ratio: 0.5\nlora_dropout: 0.1\nranks: [0, 1, 4]\nper_sample: true\n")
    found = parse_run([f"--config={path}", "--target", "0.7", "--no-per-sample"], "glue")
    assert found.settings == {"target": 0.7, "dropout": 0.1, "ranks": (0, 1, 4), "per_sample": False}
    assert parse(CompareConfig, [], "compare").seeds == (42,)  # a command without such a flag


WRONG = {
    "rank: [1": r"cannot be read as YAML \(while parsing a flow sequence",
    "rank: 1\n\trank: 2": "cannot be read as YAML",
    "- rank": "holds .'rank'.; expected lines such as",
    "just words": "holds 'just words'; expected lines such as",
    "rnak: 4": "'rnak' is no setting; nearest: rank",
    "3: 4": "3 is no setting",
    "output_dir: there": "'output_dir' belongs to one run and goes on the command line",
    "rank: {a: 1}": "rank is .'a': 1.; expected one value",
    "set: [1, 2]": r"--set '1' is not understood",
    "interval: 3": r"--config 'wrong.yaml': --interval is no setting of oplora; nearest of its own: .*; adalora, g2r2",
    "ranks: [1, {}]": "ranks is .1, {}.; expected one value, or a list of values",
    "rank: many": r"many is no int.*these flags were added: '--rank=many'",
    "learning_rate: .nan": "--learning-rate nan",
    "rank: -3": "--rank -3",
    "rank: true": "--rank",
    "method: dplra": "--method 'dplra' is not known; .*nearest: dplora",
    "method: 3": "--method 3 is not known",
    "train_head: 3": "train-head",
    "model: !!python/object:os.system {}": "cannot be read as YAML",
}


@pytest.mark.parametrize("text", WRONG)
def test_a_wrong_file_is_one_line(text, tmp_path):
    (tmp_path / "wrong.yaml").write_text(text)
    assert_refused("experiments.glue", ["--config", "wrong.yaml"], tmp_path, WRONG[text])


def test_a_file_that_is_none_is_one_line(tmp_path):
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "long.yaml").write_text(f"seed: {'9' * 5000}")
    (tmp_path / "deep.yaml").write_text("[" * 5000)
    for path, why in {
        "nowhere.yaml": "No such file", ".": "Is a directory", "bytes": "cannot be read as YAML",
        "long.yaml": "--config 'long.yaml'", "deep.yaml": "cannot be read as YAML",
    }.items():  # fmt: skip
        assert_refused("experiments.glue", ["--config", path], tmp_path, why)
    with pytest.raises(UsageError, match="config 'x' is for the command line"):
        RunConfig.of(config="x").resolve()  # pyright: ignore


def test_the_file_is_yaml_for_others_too(tmp_path):
    given = RunConfig.of(method="dora", set=("a=1",), targets="re:x#y", init="pissa", lora_dropout=0.1)
    said = {"method": "dora", "set": ["a=1"], "targets": "re:x#y", "init": "pissa", "dropout": 0.1}
    assert yaml.safe_load(written(given, given)) == said


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a price; None for 0.1, or 0 where there is none", "a price [0.1, or 0 where there is none]"),
        ("a price. None for 0.5 / steps. It falls", "a price [0.5 / steps]. It falls"),
    ],
)
def test_help_says_what_none_stands_for(text, said):
    """A number has a point in it that ends no sentence."""
    assert _with_default(text, None) == said
