"""The README's Python runs as written."""

import re
import runpy
import sys
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_python_blocks_run_one_after_the_other(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {"__name__": "readme"}
    said = []
    for number, block in enumerate(BLOCKS):
        exec(compile(block, f"README block {number}", "exec"), names)
        said.append(capsys.readouterr().out)
    assert "Optimal" in said[0] and "adapter parameters left" in said[1] and len(said) == 3
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2  # of three
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    # Its own method kept 4 of 8 components everywhere.
    assert set(adapter.rank for adapter in names["state"].adapters.values()) == {4}


@pytest.mark.parametrize(
    "command",
    ["experiments.glue", "experiments.alpaca", "experiments.mt_bench", "experiments.bench", "experiments.compare"],
)
def test_help_of_each_command_is_there(command, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [command, "--help"])
    monkeypatch.setenv("GLIBC_TUNABLES", "x=1")  # or the command would start Python again
    monkeypatch.delitem(sys.modules, command, raising=False)
    with pytest.raises(SystemExit) as stop:
        runpy.run_module(command, run_name="__main__", alter_sys=True)
    assert stop.value.code == 0 and "usage" in capsys.readouterr().out
