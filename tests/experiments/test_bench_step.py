"""The benchmark of training steps, small."""

import pytest

from experiments import bench
from jaxprune import UsageError


def test_methods_are_timed_in_turn(capsys):
    bench.run("step --size minilm --batch 1 --length 4 --steps 3 --rank 2 --methods lora bitfit".split())
    head, columns, *rows = capsys.readouterr().out.splitlines()
    assert head == "minilm, 1 x 4 tokens, rank 2, float32, 3 steps each" and columns.endswith("ratio to lora")
    found = {name: [float(x.replace(",", "")) for x in rest] for name, *rest in (row.split() for row in rows)}
    assert list(found) == ["lora", "bitfit"] and found["lora"][4] == 1.0
    for median, low, high, tokens, ratio in found.values():
        assert 0 < low <= median <= high and tokens == pytest.approx(4 / median, rel=0.05)
        assert ratio == pytest.approx(median / found["lora"][0], abs=0.1)


@pytest.mark.parametrize(
    "flags, message", [("--methods lroa", "lroa"), ("--steps 0", "1 or more"), ("--rank 0", "rank 0")]
)
def test_bad_flags_are_refused(flags, message):
    with pytest.raises(UsageError, match=message):
        bench.run(["step", *flags.split()])
