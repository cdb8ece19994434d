"""The benchmark of extraction, small: both models agree, and the numbers of parameters are those of the widths."""

import re

import pytest

from experiments import bench
from jaxprune import UsageError


def test_it_runs_and_says_what_it_timed(capsys):
    bench.run("extract --layers 1 --batch 2 --length 4 --runs 1 --ratio 0.25".split())
    said = capsys.readouterr().out
    d, norms = 768, 2 * 2 * 768
    widths = {"before": (d, d, 4 * d), "after": (3 * d // 4, 3 * d // 4, 3 * d)}
    for name, (pairs, values, hidden) in widths.items():
        inner = 2 * pairs * (d + 1) + values * (d + 1) + d * (values + 1) + hidden * (d + 1) + d * (hidden + 1)
        assert f"{inner + norms:,} in the encoder" in next(line for line in said.splitlines() if line.startswith(name))
    assert float(re.search(r"difference of a logit: (\S+)", said)[1]) < 1e-5


@pytest.mark.parametrize(
    "flags, message", [("--ratio 1.5", "ratio 1.5 is out of range"), ("--runs 0", "must be 1 or more")]
)
def test_bad_flags_are_refused(flags, message):
    with pytest.raises(UsageError, match=message):
        bench.run(["extract", *flags.split()])
