"""The benchmark of pruning events, small."""

import re

from experiments import bench


def test_it_runs_and_says_what_it_timed(capsys):
    assert bench.main("event --shapes roberta-base --rank 2 --events 2 --ratio 0.5 --solver DP".split()) == 0
    said = capsys.readouterr().out
    assert "72 sites of rank 2, 2 events to 50% of the parameters" in said
    median, longest = (float(found) for found in re.search(r"takes (\S+) s \(median; longest (\S+)\)", said).groups())
    assert 0 < median == longest


def test_one_event_cannot_be_timed(capsys):
    assert bench.main(["event", "--events", "1"]) == 2
    assert "expected 2 or more" in capsys.readouterr().err
