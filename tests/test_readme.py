"""The README's Python runs as written."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_python_blocks(number, capsys):
    exec(compile(BLOCKS[number], f"README block {number}", "exec"), {"__name__": "readme"})
    assert "Optimal" in capsys.readouterr().out


def test_there_is_an_example():
    assert BLOCKS


@pytest.mark.parametrize("command", ["experiments.glue", "experiments.bench"])
def test_help_of_each_command_is_there(command, capsys):
    import runpy
    import sys
    from unittest import mock

    with mock.patch.object(sys, "argv", [command, "--help"]), mock.patch.dict("os.environ", GLIBC_TUNABLES="x=1"):
        with pytest.raises(SystemExit) as stop:
            runpy.run_module(command, run_name="__main__", alter_sys=True)
    assert stop.value.code == 0 and "usage" in capsys.readouterr().out
