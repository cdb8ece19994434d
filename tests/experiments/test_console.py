"""What people read: lines folded to a terminal, waits said before they begin, and the device that computes."""

import jax
import pytest

from experiments.run.console import Waits, laid_out
from experiments.run.device import device, idle_accelerator
from jaxprune.errors import UsageError


def test_lines_fit_a_terminal_and_stay_whole_in_a_file():
    text = "a path /with/a-name/of-many/parts and " + "words " * 20
    lines = laid_out("loading", text, 40).splitlines()
    assert lines[0].startswith("loading    a path") and all(line.startswith(" " * 11) for line in lines[1:])
    assert max(map(len, lines)) <= 40 and "/with/a-name/of-many/parts" in " ".join(lines).split()
    assert " ".join(" ".join(lines).split()) == " ".join(f"loading {text}".split())
    assert laid_out("step 1,000,000", "x" * 500, None) == f"step 1,000,000 {'x' * 500}"


def test_a_wait_is_said_once_unless_it_is_long(capsys, monkeypatch):
    now = iter([0.0, 1.0, 10.0, 13.0, 20.0, 20.1, 30.0, 30.1])
    monkeypatch.setattr("experiments.run.console.time.perf_counter", lambda: next(now))
    waits, said = Waits(), []
    for _ in range(4):
        with waits.announced("pruning", "now"):
            said.append(capsys.readouterr().out)  # before it begins
    assert said == ["pruning    now\n", "", "pruning    now\n", ""]


def test_an_idle_accelerator_is_named(tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    root = tmp_path / "[odd]"
    (root / "dev").mkdir(parents=True)
    assert idle_accelerator("cpu", str(root)) == ""
    (root / "dev" / "nvidiactl").touch()  # of the driver, without a GPU
    assert idle_accelerator("cpu", str(root)) == ""
    (root / "dev" / "nvidia0").touch()
    assert idle_accelerator("gpu", str(root)) == ""
    assert (
        'an NVIDIA GPU is in this machine, and JAX DOES NOT USE IT; install what it needs: pip install -e ".[cuda]"'
        in (idle_accelerator("cpu", str(root)))
    )
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert idle_accelerator("cpu", str(root)).endswith("as JAX_PLATFORMS=cpu says")
    (root / "dev" / "nvidia0").unlink()
    (root / "dev" / "accel0").touch()
    assert idle_accelerator("cpu", str(root)).startswith("a TPU is in this machine")


def test_a_device_that_is_not_there_is_one_line(monkeypatch):
    assert device().startswith("cpu, ")

    def none():
        raise RuntimeError("Unable to initialize backend 'cuda':\nno device")

    monkeypatch.setattr(jax, "devices", none)
    with pytest.raises(UsageError, match="no device to compute on .Unable to .*; set JAX_PLATFORMS=cpu"):
        device()
