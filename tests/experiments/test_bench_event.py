"""The benchmark of pruning events, small."""

import re

import pytest

from experiments import bench
from jaxprune import UsageError


def test_it_runs_and_says_what_it_timed(capsys):
    bench.run("event --shapes roberta-base --rank 2 --events 2 --ratio 0.5".split())
    said = capsys.readouterr().out
    assert "72 sites of rank 2, 2 events to 50% of the parameters" in said
    median, longest = (float(found) for found in re.search(r"takes (\S+) s \(median; longest (\S+)\)", said).groups())
    assert 0 < median == longest


def test_an_event_in_the_svd_basis_and_a_folder_lowered(capsys):
    bench.run("event --shapes roberta-base --rank 2 --events 2 --ratio 0.5 --basis svd --loss components".split())
    assert "72 sites of rank 2, 2 events to 50% of the parameters" in capsys.readouterr().out
    bench.run("resize --shapes roberta-base --rank 4 --ratios 0.5".split())
    said = capsys.readouterr().out
    before, after = (
        int(text.replace(",", "")) for text in re.search(r"rank 4: (\S+) to (\S+) parameters", said).groups()
    )
    assert 0.49 * before < after <= 0.5 * before


def test_one_event_cannot_be_timed():
    with pytest.raises(UsageError, match="expected 2 or more"):
        bench.run(["event", "--events", "1"])
