"""The benchmark of extraction, small: both models agree, and the numbers of parameters are those of the widths."""

import re

from experiments import bench


def test_it_runs_and_says_what_it_timed(capsys):
    assert bench.main("extract --layers 1 --batch 2 --length 4 --runs 1 --ratio 0.25".split()) == 0
    said = capsys.readouterr().out
    d, norms = 768, 2 * 2 * 768
    widths = {"before": (d, d, 4 * d), "after": (3 * d // 4, 3 * d // 4, 3 * d)}
    for name, (pairs, values, hidden) in widths.items():
        inner = 2 * pairs * (d + 1) + values * (d + 1) + d * (values + 1) + hidden * (d + 1) + d * (hidden + 1)
        assert f"{inner + norms:,} in the encoder" in next(line for line in said.splitlines() if line.startswith(name))
    assert float(re.search(r"difference of a logit: (\S+)", said)[1]) < 1e-5


def test_bad_flags_are_one_line(capsys):
    assert bench.main(["extract", "--ratio", "1.5"]) == 2
    assert bench.main(["extract", "--runs", "0"]) == 2
    assert capsys.readouterr().err.count("\n") == 2
