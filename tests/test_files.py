import json
import math
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune import report
from jaxprune.errors import UsageError
from jaxprune.report import append_jsonl, write_json
from jaxprune.sites import Site


@pytest.mark.parametrize(
    "write",
    [
        lambda path: report.plot_ranks({}, [Site("a", 2, 2, 0, "a")], path),
        lambda path: report.plot_ranks_before_after({}, {}, [Site("a", 2, 2, 0, "a")], path),
        lambda path: report.plot_pruning([], [], path, metric="accuracy"),
        lambda path: write_json(path, 1),
        lambda path: append_jsonl(path, 1),
    ],
)
def test_unwritable_files_are_errors(tmp_path, write):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot write .*file/x"):
        write(tmp_path / "file" / "x")


def test_drawing_needs_no_display_and_leaves_no_state(tmp_path):
    code = (
        "import sys\nimport jaxprune.report as r\nassert 'matplotlib' not in sys.modules\n"
        "from jaxprune.sites import Site\n"
        f"r.plot_ranks({{'a': 1}}, [Site('a', 2, 2, 0, 'a')], {str(tmp_path / 'x.png')!r})\n"
        f"r.plot_pruning([], [], {str(tmp_path / 'y.png')!r}, metric='accuracy')\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_json_of_numpy_and_jax_values(tmp_path):
    obj = {
        "np": np.float32(0.5), "int": np.int64(3), "flag": np.bool_(True), "array": np.array([[1.0, np.nan]]),
        "jax": jnp.array(2), "nan": math.nan, "inf": -math.inf, "path": tmp_path, "tuple": (1, None, "ü"),
        7: {"x": True},
    }  # fmt: skip
    write_json(tmp_path / "new" / "summary.json", obj)
    assert json.loads((tmp_path / "new" / "summary.json").read_text(), parse_constant=pytest.fail) == {
        "np": 0.5, "int": 3, "flag": True, "array": [[1.0, None]], "jax": 2, "nan": None, "inf": None,
        "path": str(tmp_path), "tuple": [1, None, "ü"], "7": {"x": True},
    }  # fmt: skip


def test_json_keeps_the_old_file_when_writing_fails(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})

    def disk_full(self, content):
        self.touch()
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(UsageError, match="No space left on device"):
        patch.setattr("pathlib.Path.write_bytes", disk_full)
        write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_jsonl_survives_a_torn_line(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    append_jsonl(path, {"step": 1, "loss": np.float32(0.25)})
    append_jsonl(path, {"step": 2, "loss": math.nan})
    with open(path, "a") as file:
        file.write('{"step": 3, "lo')
    append_jsonl(path, {"step": 4})
    lines = path.read_text().splitlines()
    assert [json.loads(line) for line in (*lines[:2], lines[3])] == [
        {"step": 1, "loss": 0.25},
        {"step": 2, "loss": None},
        {"step": 4},
    ]
    assert len(lines) == 4
