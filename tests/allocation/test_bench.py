"""The benchmark command runs and reports what it measured."""

import re
import subprocess
import sys

import pytest

from experiments import bench
from jaxprune import UsageError


def test_allocate_prints_a_row_per_solver_and_shape(capsys, tmp_path):
    table = tmp_path / "table.txt"
    arguments = ["allocate", "--instances", "2", "--solvers", "HIGHS", "DP", "--output", str(table)]
    bench.run(arguments)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:6]]
    assert [row[:2] for row in rows] == [["72", "HIGHS"], ["72", "DP"], ["224", "HIGHS"], ["224", "DP"]]
    assert all(row[5] == "2/2" and float(row[6]) <= 1e-9 for row in rows)
    assert "HIGHS" in table.read_text()


@pytest.mark.parametrize("extra", [[], ["--prune"]])
def test_time_budget_agrees_with_the_chain_of_layers(capsys, extra):
    pytest.importorskip("pulp")  # its CBC calls a plan best that is up to 2e-4 from it, with or without a time budget
    arguments = ["--instances", "1", "--solvers", "PuLP", "DP", "--time-budget", "0.75", *extra]
    bench.run(["allocate", *arguments])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[2:6]]
    assert all(row[5] == "1/1" and float(row[6]) <= (1e-9 if row[1] == "DP" else 1e-3) for row in rows)


@pytest.mark.parametrize("flags, message", [("--solvers Nope", "Nope"), ("--instances 0", "instances 0")])
def test_bad_flags_are_refused(flags, message):
    with pytest.raises(UsageError, match=message):
        bench.run(["allocate", *flags.split()])


def test_an_unknown_benchmark_is_one_line_and_status_2():
    done = subprocess.run(
        [sys.executable, "-m", "experiments.bench", "alocate"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and not done.stdout
    assert re.fullmatch(
        r"experiments.bench: error: benchmark 'alocate' is not known; nearest names: allocate.*\n", done.stderr
    )
