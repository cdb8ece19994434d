import itertools
import json
import math
import multiprocessing
import os
import random
import stat
import subprocess
import sys
import time

import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune import report
from jaxprune.errors import UsageError
from jaxprune.files import append_jsonl, new_folder, write_json, write_whole
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


_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["jaxprune.report"])
NAMES = ("one", "two", "tokenizer*")


def write_folder(folder, text, may_replace=NAMES):
    with new_folder(folder, may_replace, "model") as new:
        for name in ("one", "two"):
            (new / name).write_text(text)


def content(folder):
    """Return what both files hold, after checking that they belong together."""
    texts = {path.read_text() for path in folder.iterdir()}
    assert sorted(path.name for path in folder.iterdir()) == ["one", "two"] and len(texts) == 1
    return texts.pop()


def _write_on(folder, begun):
    for number in itertools.count():
        write_folder(folder, str(number) * 1000)
        begun.set()


def test_a_folder_is_whole_whenever_its_writer_is_killed(tmp_path):
    folder, moments = tmp_path / "model", random.Random(0)
    for _ in range(20):
        begun = _FORKS.Event()
        writer = _FORKS.Process(target=_write_on, args=(folder, begun))
        writer.start()
        assert begun.wait(60)
        time.sleep(moments.uniform(0, 0.02))
        writer.kill()
        writer.join()
        whole = [folder] if folder.exists() else [path for path in tmp_path.iterdir() if path.name.endswith(".old")]
        content(*whole)
    write_folder(folder, "end")
    assert list(tmp_path.iterdir()) == [folder] and content(folder) == "end"


def test_a_writer_killed_between_the_two_renames_loses_nothing(tmp_path):
    folder, gone = tmp_path / "model", subprocess.Popen(["true"])
    gone.wait()
    write_folder(folder, "old")
    folder.rename(tmp_path / f".model.{gone.pid}.old")
    (tmp_path / f".model.{gone.pid}.new").mkdir()
    (tmp_path / f".model.{gone.pid}.new" / ".tmpAb3d").write_text("half")
    mine = tmp_path / f".model.{os.getppid()}.new"  # of a process that runs
    mine.mkdir()
    (tmp_path / ".model.12.old.notes").write_text("a user's")
    with pytest.raises(KeyError), new_folder(folder, NAMES, "model"):
        raise KeyError
    assert content(folder) == "old"
    assert {path.name for path in tmp_path.iterdir()} == {"model", mine.name, ".model.12.old.notes"}


def test_a_folder_with_anything_else_in_it_is_refused(tmp_path):
    def refused(path, message):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(UsageError, match=message):
            write_folder(path, "new")
        assert sorted(tmp_path.rglob("*")) == before

    folder = tmp_path / "model"
    write_folder(folder, "old")
    (tmp_path / "link").symlink_to(folder)
    refused(tmp_path / "link", "link is a link, and what it points to is never replaced")
    (folder / "three").write_text("")
    refused(folder, "holds other files, such as 'three'")
    (folder / "three").rename(tmp_path / "three")
    refused(tmp_path / "three", "three is a file")
    (folder / "tokenizers").mkdir()
    refused(folder, "holds other files, such as 'tokenizers'")
    (folder / "tokenizers").rmdir()
    (folder / "tokenizer.json").symlink_to(tmp_path / "three")
    refused(folder, "holds other files, such as 'tokenizer.json'")
    (folder / "tokenizer.json").unlink()
    assert content(folder) == "old"


def test_files_and_folders_have_the_mode_that_the_umask_leaves(tmp_path):
    from safetensors.numpy import save_file

    for umask in (0o022, 0o027):
        before = os.umask(umask)
        try:
            with new_folder(tmp_path / "model", ["tensors"], "model") as new:
                save_file({"a": np.ones(1)}, new / "tensors")
        finally:
            os.umask(before)
        modes = [stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "model", tmp_path / "model" / "tensors")]
        assert modes == [0o777 & ~umask, 0o666 & ~umask]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 2 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", disk], capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk_leaves_the_old_folder(small_disk):
    from safetensors.numpy import save_file

    def write(size):
        with new_folder(small_disk / "model", ["one", "two"], "model") as new:
            save_file({"a": np.ones(size, np.float32)}, new / "one")
            (new / "two").write_text(str(size))

    write(1000)
    before = {path: path.read_bytes() for path in (small_disk / "model").iterdir()}
    with pytest.raises(UsageError, match="cannot write the model to .*No space left on device") as caught:
        write(10**6)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    assert {path: path.read_bytes() for path in (small_disk / "model").iterdir()} == before
    assert list(small_disk.iterdir()) == [small_disk / "model"]
    with pytest.raises(UsageError, match="cannot write .*No space left on device"):
        write_whole(small_disk / "page", b"x" * 10**7)
    assert list(small_disk.iterdir()) == [small_disk / "model"]
