"""The presets against the papers' tables and the released scripts, typed a second time: here in the units that are printed."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest

import jaxprune as jp
from experiments.presets import PRESETS, preset
from experiments.presets.table import TASKS
from experiments.run.build import make_method, method_settings
from experiments.run.config import RunConfig
from jaxprune.methods import METHODS

SHORT = dict(zip("learning_rate epochs warmup".split(), ("Learning Rate", "Epochs", "Warmup Steps"), strict=True))
LONG = {
    "learning_rate": "Learning Rate", "epochs": "Epochs", "weight_decay": "Weight Decay", "max_grad_norm": "Max Grad Norm",
    "max_length": "Max Sequence Length", "warmup": "Warmup Steps / Ratio",
}  # fmt: skip
PRUNED = {
    "ema_decay": "Importance EMA Decay",
    "momentum": "Momentum Penalty Weight",
    "recovery_steps": "Recovery Steps",
}

# DPLoRA and OPLoRA. A dash clips nothing.
TABLE_9 = """
Setting                   CoLA     MNLI   MRPC     QNLI     QQP      RTE      SST-2    STS-B
Learning Rate             9.3e-04  2e-4   2.3e-04  4.8e-04  3.3e-04  1.9e-04  4.8e-04  2.9e-04
Epochs                    77       5      50       49       8        53       34       27
Weight Decay              0.378    0.15   0.015    0.283    0.023    0.006    0.378    0.015
Max Grad Norm             1.800    -      1.141    0.450    0.221    1.911    1.800    0.826
Max Sequence Length       256      320    320      128      320      256      256      256
Warmup Steps / Ratio      0.028    3000   0.036    0.022    0.082    0.022    0.060    0.044
Importance EMA Decay      0.054    0.06   0.814    0.976    0.879    0.596    0.054    0.501
Momentum Penalty Weight   0.329    0.09   0.609    0.915    0.473    0.057    0.329    0.660
Recovery Steps            100      500    100      100      100      100      100      100
"""
TABLE_11 = """
Setting               SST-2   QQP    MNLI   QNLI   RTE    MRPC   CoLA   STS-B
Learning Rate         2e-5    2e-5   2e-5   2e-5   1e-5   1e-5   1e-5   1e-5
Epochs                10      5      5      10     20     20     20     20
Warmup Steps          500     2800   3000   1000   100    100    100    100
"""
TABLE_12 = """
Setting          SST-2   QQP     MNLI    QNLI    RTE    MRPC   CoLA    STS-B
Learning Rate    2e-4    2e-4    2e-4    2e-4    1e-4   1e-4   1e-4    1e-4
Pruning Steps    10      10      10      10      5      5      5       5
Budget           1250K   2250K   2500K   1750K   750K   750K   1200K   1000K
Epochs           10      5       5       10      20     20     20      20
Warmup Steps     500     2800    3000    1000    100    100    100     100
Recovery Steps   500     500     500     500     100    100    100     100
"""
# The scripts that DPLoRA was released with.
RELEASED = """
Task    lr      epochs  wd     clip   warmup  beta   gamma  delta  seq  recovery
CoLA    3.7e-4  67      .196   1.177  .071    .041   .089   .026   320  100
MNLI    2.4e-4  27      .435   1.573  .054    .202   .054   .056   128  500
MRPC    4.6e-4  57      .307   1.498  .038    .530   .028   .025   128  100
QNLI    4.8e-4  49      .283   .450   .022    .976   .915   .050   128  100
QQP     4.4e-4  10      .173   .652   .073    .396   .094   .012   128  100
RTE     2.1e-4  63      .198   .870   .111    .744   .083   .015   256  100
SST-2   2.8e-4  38      .482   .932   .029    .030   .392   .052   256  100
STS-B   3.5e-5  67      .093   .670   .092    .979   .066   .033   128  100
"""
# G2R2, table 10; warm-up, pruning and refinement in epochs.
G2R2 = """
Task    batch  epochs  lr      T_w  T_p  T_r
MNLI    8      10      1E-04   1    1    8
SST-2   8      30      1.5E-04 3    3    24
MRPC    16     30      2E-04   3    3    24
CoLA    16     40      3E-04   4    4    32
QNLI    16     10      2E-04   1    1    8
QQP     16     10      1.2E-04 1    1    8
RTE     16     40      4E-04   4    4    32
STS-B   16     40      2E-04   4    4    32
"""
# AdaLoRA's run_debertav3_*.sh.
ADALORA = """
Task    lora_r  lora_alpha  init_warmup  final_warmup  mask_interval  reg_orth_coef  lr      epochs  warmup  wd    seq
RTE     2       32          600          1800          1              0.3            1.2e-3  50      200     0.01  320
MRPC    2       32          600          1800          1              0.1            1e-3    30      0.1     0.01  320
CoLA    3       32          800          3500          10             0.1            8e-4    25      100     0.00  64
MNLI    3       16          8000         50000         100            0.1            5e-4    7       1000    0     256
QNLI    2       32          2000         8000          100            0.1            5e-4    5       500     0.01  512
QQP     2       16          8000         25000         100            0.1            8e-4    5       2000    0.01  320
SST-2   2       16          6000         22000         100            0.1            8e-4    24      1000    0.01  128
STS-B   2       32          800          2000          10             0.3            2.2e-3  25      100     0.1   128
"""


def number(text: str) -> Any:
    """Read a printed number; K stands for thousands."""
    return None if text == "-" else float(text.removesuffix("K")) * (1000 if text.endswith("K") else 1)


def name(task):
    return task.lower().replace("-", "")


def down(table):
    """Read a table whose columns are tasks: {task: {row: number}}."""
    (_, *tasks), *rows = (line.split("  ") for line in table.strip().splitlines())
    tasks, found = [name(t.strip()) for t in tasks if t.strip()], {}
    for setting, *values in rows:
        cells = [value.strip() for value in values if value.strip()]
        for task, cell in zip(tasks, cells, strict=True):
            found.setdefault(task, {})[setting] = number(cell)
    return found


def across(table):
    """Read a table whose rows are tasks: {task: {column: number}}."""
    (_, *columns), *rows = (line.split() for line in table.strip().splitlines())
    return {name(task): dict(zip(columns, map(number, cells), strict=True)) for task, *cells in rows}


def picked(row, names):
    return {setting: row[printed] for setting, printed in names.items()}


# The rule of the paper, where the default is another.
RULE = {"basis": "trained", "loss": "importance"}


@pytest.mark.parametrize("task", TASKS)
def test_the_main_tables(task):
    row = down(TABLE_9)[task]
    oplora = {**picked(row, LONG), "budget": 2.5e6 / 2}  # printed with each parameter counted twice
    assert preset("paper", "oplora", task) == oplora
    assert preset("paper", "dplora", task) == {
        **oplora, **picked(row, PRUNED), **RULE, "events": 10, "prune_ratio": 0.6
    }  # fmt: skip
    full = {"weight_decay": 0.1, "max_grad_norm": None, "max_length": 128}
    assert preset("paper", "full", task) == {**picked(down(TABLE_11)[task], SHORT), **full}


@pytest.mark.parametrize("task", TASKS)
def test_the_tables_of_the_short_runs(task):
    row = down(TABLE_12)[task]
    lora = picked(row, SHORT)
    assert preset("efficiency", "lora", task) == lora
    assert preset("efficiency", "oplora", task) == {**lora, "budget": row["Budget"] / 2}
    pruned = {"budget": row["Budget"] / 2, "events": row["Pruning Steps"], "recovery_steps": row["Recovery Steps"]}
    assert preset("efficiency", "dplora", task) == {**lora, **pruned, **RULE}


@pytest.mark.parametrize("task", TASKS)
def test_the_released_scripts(task):
    row = across(RELEASED)[task]
    names = dict(
        learning_rate="lr", epochs="epochs", weight_decay="wd", max_grad_norm="clip", max_length="seq", warmup="warmup"
    )
    oplora = {**picked(row, names), "budget": 1_263_000, "score": "squared", "train_head": False}
    assert preset("released", "oplora", task) == oplora
    pruned = picked(row, dict(ema_decay="beta", momentum="gamma", stability="delta", recovery_steps="recovery"))
    fixed = {"prune_ratio": 0.6, "events": 10, "importance": "samples", "scaling": "grow"}
    assert preset("released", "dplora", task) == {**oplora, **pruned, **fixed, **RULE}


@pytest.mark.parametrize("task", TASKS)
def test_g2r2(task):
    row, found = across(G2R2)[task], preset("paper", "g2r2", task)
    assert row["T_w"] + row["T_p"] + row["T_r"] == row["epochs"]
    shares = {"g2r2_warmup": row["T_w"] / row["epochs"], "progressive": row["T_p"] / row["epochs"], "final": 0.2}
    assert found == {
        **picked(row, dict(learning_rate="lr", epochs="epochs", batch_size="batch")), "weight_decay": 0.01, "max_length": 512,
        **{name: pytest.approx(share) for name, share in shares.items()},
    }  # fmt: skip


@pytest.mark.parametrize("task", TASKS)
def test_adalora(task):
    row, found = across(ADALORA)[task], preset("paper", "adalora", task)
    names = dict(learning_rate="lr", epochs="epochs", weight_decay="wd", max_length="seq", warmup="warmup")
    names |= dict(init_rank="lora_r", alpha="lora_alpha", tinit="init_warmup", tfinal="final_warmup", interval="mask_interval",
                 orthogonal="reg_orth_coef")  # fmt: skip
    assert found == {**picked(row, names), "target_rank": 1, "weights": "after"}
    scale = row["lora_alpha"] / row["lora_r"]
    assert scale == pytest.approx({"cola": 10.67, "mnli": 5.33, "qqp": 8, "sst2": 8}.get(task, 16), rel=1e-3)


@pytest.mark.parametrize("task", TASKS)
def test_one_row_for_all_tasks(task):
    assert preset("paper", "sora", task) == dict(
        learning_rate=0.0008, batch_size=8, epochs=20, weight_decay=0.1, max_grad_norm=0.1, warmup=0.06,
        penalty=10, threshold=0.0003, prox="released", alpha=16,
    )  # fmt: skip
    assert preset("paper", "prunedlora", task) == dict(
        learning_rate=0.00001, schedule="cosine", warmup=0.05, weight_decay=0.00001,
        rank=128, target=64, interval=10, remove=2, dropout=0.05,
    )  # fmt: skip
    assert preset("paper", "channelmask", task) == dict(
        targets="query,value", learning_rate=0.00005, final_learning_rate=0.00001, schedule="stages", batch_size=8,
        channels="paper_like", learn="paper",
    )  # fmt: skip


def test_a_number_of_components_lies_over_all_that_it_stands_for():
    """A flag --rank wins over what a preset says of single ranks, and a flag of one of those over --rank."""

    def ranks(method, **given):
        config = RunConfig.of(method=method, task="mrpc", preset="paper", **given).resolve()
        settings = method_settings(config, 60_000, 12)
        return tuple(settings[name] for name in ("init_rank", "target_rank", "rank", "target") if name in settings)

    assert (
        ranks("adalora") == (2, 1) and ranks("adalora", rank=6) == (9, 6) and ranks("adalora", target_rank=2) == (2, 2)
    )
    assert ranks("adalora", rank=6, init_rank=7) == (7, 6)
    assert ranks("prunedlora") == (128, 64) and ranks("prunedlora", rank=32) == (32, 16)
    assert ranks("prunedlora", target=32) == (128, 32)
    plain = RunConfig.of(method="prunedlora", target=4).resolve()
    assert method_settings(plain, 100, 12)["rank"] == 16 and method_settings(plain, 100, 12)["target"] == 4


def test_dylora_and_what_there_is():
    assert preset("paper", "dylora", "cola") == dict(learning_rate=0.0004, epochs=80, weight_decay=0.1, alpha=16)
    methods = {preset: sorted(tables) for preset, tables in PRESETS.items()}
    assert methods == {
        "paper": ["adalora", "channelmask", "dplora", "dylora", "full", "g2r2", "lora", "oplora", "prunedlora", "sora"],
        "efficiency": ["dplora", "lora", "oplora"],
        "released": ["dplora", "oplora"],
        **{f"released-{size}": ["dplora", "oplora"] for size in ("1b", "3b", "8b")},
    }
    decoders = {("paper", method) for method in ("dplora", "lora", "oplora")}
    for name, tables in PRESETS.items():
        for method, table in tables.items():
            glue = (
                set(TASKS) if "-" not in name and (name, method) != ("paper", "lora") and method != "dylora" else set()
            )
            assert method == "dylora" or set(table) - {"alpaca"} == glue
            assert ("alpaca" in table) == ((name, method) in decoders or "-" in name)


# Table 15, and what the released scripts set for Llama 3.2 1B and 3B and Llama 3 8B, in the units that are printed there.
TABLE_15 = """
           OPLoRA  DPLoRA   LoRA
batch      2       2        2
lr         1.0e-4  1.0e-4   1.0e-4
epochs     5       5        5
decay      0.08    0.08     0.08
clip       0.612   0.612    0.612
length     256     256      256
warmup     0.044   0.044    0.044
dropout    0.069   0.069    0.069
parts      16      16       16
budget     40e6    40e6     -
events     -       10       -
p          -       0.8      -
ema        -       0.015    -
momentum   -       0.809    -
recovery   -       100      -
"""
SCRIPTS = """
        batch  parts  lr     epochs  decay  clip   warmup  ema   momentum  stability  dropout  budget
1b      2      8      2.7e-4  5      .141   1.374  .059    .274  .084      .151       .207     5.55e6
3b      4      16     3e-5    18     .037   1.184  .071    .056  .605      .025       .252     11.85e6
8b      1      16     3.4e-5  7      .03    1.287  .073    .147  .296      .07        .179     20.5e6
"""
NAMED = dict(
    lr="learning_rate", epochs="epochs", decay="weight_decay", clip="max_grad_norm", length="max_length", warmup="warmup",
    dropout="dropout", parts="accumulate", budget="budget", events="events", p="target", ema="ema_decay",
    momentum="momentum", stability="stability", recovery="recovery_steps",
)  # fmt: skip


def of_decoders(name, method):
    config = RunConfig.of(preset=name, method=method, task="alpaca").resolve()
    return {**config.settings, **config.plain()}, config


@pytest.mark.parametrize(("column", "method"), [(1, "oplora"), (2, "dplora"), (3, "lora")])
def test_table_15(column, method):
    printed = {line.split()[0]: line.split()[column] for line in TABLE_15.strip().splitlines()[1:]}
    found, config = of_decoders("paper", method)
    assert found["batch_size"] == int(printed.pop("batch")) * int(printed["parts"]) == 32
    assert found["schedule"] == "cosine" and found["template"] == "alpaca"
    # The paper counts each parameter twice.
    expected = {NAMED[row]: float(text) / (2 if row == "budget" else 1) for row, text in printed.items() if text != "-"}
    assert {name: found[name] for name in expected} == expected
    assert {NAMED[row] for row, text in printed.items() if text == "-"}.isdisjoint(config.settings)
    assert config.settings.get("rank") == (8 if method == "lora" else None)
    assert method != "dplora" or RULE.items() <= config.settings.items()


@pytest.mark.parametrize("method", ["oplora", "dplora"])
@pytest.mark.parametrize("size", ["1b", "3b", "8b"])
def test_the_released_scripts_for_decoders(size, method):
    names, *lines = (line.split() for line in SCRIPTS.strip().splitlines())
    (given,) = (dict(zip(names, map(float, line[1:]), strict=True)) for line in lines if line[0] == size)
    found, _ = of_decoders(f"released-{size}", method)
    assert found["batch_size"] == given.pop("batch") * given["parts"]
    pruned = ("ema", "momentum", "stability")
    expected = {NAMED[row]: value for row, value in given.items() if method == "dplora" or row not in pruned}
    assert {name: found[name] for name in expected} == expected
    assert (found["schedule"], found["max_length"], found["score"]) == ("cosine", 512, "squared")
    assert method == "oplora" or (found["target"], found["events"]) == (0.6, 10)
    assert method == "oplora" or RULE.items() <= found.items()


@pytest.mark.parametrize(("layers", "heads", "parameters"), [(6, 12, 165_888), (12, 12, 331_776)])
def test_the_channel_masks_train_as_many_parameters_as_the_slides_say(layers, heads, parameters):
    """DistilBERT and RoBERTa-base with all their linear layers, of which the preset's targets take query and value."""
    sizes = dict(query=(768, 768), key=(768, 768), value=(768, 768), out=(768, 768), fc1=(768, 3072), fc2=(3072, 768))
    params = {f"layer_{i}": {kind: {"kernel": jnp.zeros(size)} for kind, size in sizes.items()} for i in range(layers)}
    config = RunConfig.of(preset="paper", method="channelmask", task="mrpc").resolve()
    targets = config.target_patterns()
    method = jp.channelmask(**method_settings(config, 100, heads))
    context = jp.Context(jax.random.key(0), params, jp.find_sites(params, targets), lambda: None, lambda: None)
    start = method.start(context)
    assert jp.count(start.adapters, start.masks) == parameters


@pytest.mark.parametrize("total", [20, 20_000])
@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_of_the_command_line_is_made_for_a_short_and_a_long_run(method, total):
    made = make_method(RunConfig.of(method=method, task="mrpc").resolve(), total, 12)
    assert all(1 <= step <= total for step in made.events)
    if (
        method == "dplora"
    ):  # in 20 steps, of which one warms up, the first of more would come before anything is measured
        assert len(made.events) == (10 if total > 20 else 8) and made.events[0] >= 3
    if method == "g2r2":  # which measures nothing while the learning rate warms up, 6 % of the run
        assert made.probes and not made.probes.when(int(0.06 * total)) and made.probes.when(2001 if total > 20 else 3)
