"""Nothing of the user's is lost: whose a folder is, who works in it, and what a run may remove. Real processes, real folders."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from experiments.run.folder import LOCK, MARKER, Folder
from jaxprune import UsageError
from tests.experiments.refusals import FORKS, assert_refused, command

GLUE = "experiments.glue"
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def flags(tiny_bert, tiny_rte) -> list[str]:
    given = dict(model=tiny_bert, data_dir=tiny_rte, task="rte", method="lora", rank=2, batch_size=8, max_length=24)
    return [text for name, value in given.items() for text in (f"--{name.replace('_', '-')}", str(value))]


@pytest.fixture(scope="module")
def finished(flags, tmp_path_factory) -> Path:
    """A folder with a finished run, to be copied."""
    parent = tmp_path_factory.mktemp("finished")
    ended = command(GLUE, [*flags, "--epochs", "1", "--output-dir", "run"], parent)
    assert ended.status == 0, ended.err
    return parent / "run"


@pytest.fixture(scope="module")
def unfinished(finished, tmp_path_factory) -> Path:
    """A folder as a run leaves it that is killed after its last step."""
    folder = shutil.copytree(finished, tmp_path_factory.mktemp("unfinished") / "run")
    made = json.loads((folder / MARKER).read_text())
    for name in ("summary.json", "report.html", "adapter"):
        shutil.rmtree(folder / name) if name == "adapter" else os.remove(folder / name)
        del made["made"][name]
    (folder / MARKER).write_text(json.dumps(made))
    return folder


@pytest.mark.parametrize("flag", ["", "--overwrite", "--resume"])
@pytest.mark.parametrize(
    "name", ["model/model.safetensors", "adapter/a", "checkpoints/12/state", "report.html", "mine.txt"]
)
def test_a_folder_that_no_run_made_is_left_alone(name, flag, flags, tmp_path):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("the only copy")
    given = [*flags, *flag.split(), "--output-dir", "."]
    assert_refused(GLUE, given, tmp_path, rf"--output-dir '.': it holds '{name.split('/')[0]}', which no run made")


def test_the_base_model_in_the_output_folder_is_not_deleted(flags, tiny_bert, tmp_path):
    shutil.copytree(tiny_bert, tmp_path / "model")
    assert_refused(
        GLUE, [*flags, "--model", "model", "--output-dir", "."], tmp_path, r"holds 'model', which no run made"
    )


def test_a_model_that_a_run_made_is_not_deleted_while_it_is_read(flags, finished, tiny_bert, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    made = json.loads((run / MARKER).read_text())
    shutil.copytree(tiny_bert, run / "model")
    made["made"]["model"] = sorted(path.name for path in tiny_bert.iterdir())
    (run / MARKER).write_text(json.dumps(made))
    given = [*flags, "--model", "run/model", "--output-dir", "run", "--overwrite"]
    assert_refused(GLUE, given, tmp_path, r"--model 'run/model' lies in what --overwrite removes")


def test_links_are_not_followed(flags, finished, tmp_path):
    away = tmp_path / "away"
    shutil.copytree(finished, tmp_path / "run")
    shutil.move(tmp_path / "run" / "adapter", away)
    (tmp_path / "run" / "adapter").symlink_to(away)
    for flag in ("--overwrite", "--resume"):
        assert_refused(GLUE, [*flags, flag, "--output-dir", "run"], tmp_path, r"holds 'adapter', now a link")


def test_overwriting_removes_what_the_run_made_and_nothing_else(flags, finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    (run / "notes.txt").write_text("mine")
    (run / "adapter" / "notes.txt").write_text("mine")
    again = [*flags, "--epochs", "1", "--output-dir", "run", "--overwrite"]
    assert_refused(GLUE, again, tmp_path, r"holds 'adapter/notes.txt', which no run made; move it away")
    (run / "adapter" / "notes.txt").unlink()
    (run / "pruning.png").write_text("a run without events has made none")
    assert_refused(GLUE, again, tmp_path, r"holds 'pruning.png', which no run made")
    (run / "pruning.png").unlink()
    (run / ".summary.json.77.new").write_text("left by a process that died")
    before = (run / "summary.json").read_bytes(), {path.name for path in run.iterdir()}
    ended = command(GLUE, again, tmp_path)
    assert ended.status == 0, ended.err
    assert (run / "notes.txt").read_text() == "mine"
    assert before[1] - {path.name for path in run.iterdir()} == {".summary.json.77.new"}
    assert (run / "summary.json").read_bytes() != before[0]


def test_a_finished_run_is_not_replaced(flags, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    given = [*flags, "--epochs", "1", "--output-dir", "run"]
    assert_refused(GLUE, given, tmp_path, r"holds a finished run; pass --overwrite")
    assert_refused(GLUE, [*given, "--resume", "--overwrite"], tmp_path, r"--resume .* --overwrite .*; give one")
    assert_refused(GLUE, [*given, "--resume", "--rank", "3"], tmp_path, r"other settings: --rank was 2, is 3")
    ended = command(GLUE, [*given, "--resume"], tmp_path)
    assert ended.status == 0 and "nothing is left to resume" in ended.out


def test_an_unfinished_run_is_not_begun_anew_and_goes_on(flags, finished, unfinished, tmp_path):
    run = shutil.copytree(unfinished, tmp_path / "run")
    given = [*flags, "--epochs", "1", "--output-dir", "run"]
    assert_refused(
        GLUE, given, tmp_path, r"holds an unfinished run; pass --resume to go on with it, --overwrite to replace"
    )
    with open(run / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": "x"}\n[1]\n\xff\xfe\n{"step": 1e999}\n' + b"[" * 100_000 + b'\n{"step": 3, "lo')
    ended = command(GLUE, [*given, "--resume"], tmp_path)
    assert ended.status == 0, ended.err
    for name in ("score", "metrics", "adapter_params", "steps"):
        then, now = (json.loads((folder / "summary.json").read_text())[name] for folder in (finished, run))
        assert then == now, name
    assert (run / "metrics.jsonl").read_bytes() == (finished / "metrics.jsonl").read_bytes()
    assert (run / "report.html").exists() and (run / "adapter" / "adapter_config.json").exists()


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"{}", b'{"config": 3}', b"\xff\xfe", b"[" * 100_000])
def test_a_damaged_summary_is_made_again(damage, flags, finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    (run / "summary.json").write_bytes(damage)
    ended = command(GLUE, [*flags, "--epochs", "1", "--output-dir", "run", "--resume"], tmp_path)
    assert ended.status == 0 and "summary.json is damaged; it is made again" in ended.out, ended.err
    assert json.loads((run / "summary.json").read_text())["steps"] == 6


@pytest.mark.parametrize(
    "damage", [b"", b"{", b"[]", b"{}", b'{"made": 3}', b'{"made": {"model": 3}}', b"\xff", b"[" * 100_000]
)
def test_a_damaged_marker_is_said(damage, flags, finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    (run / MARKER).write_bytes(damage)
    for flag in ("--overwrite", "--resume"):
        assert_refused(
            GLUE, [*flags, "--output-dir", "run", flag], tmp_path, r"jaxprune.json', the list of .* is damaged"
        )


def test_one_process_works_in_a_folder(flags, tmp_path):
    """The second is refused while the first runs; when that has died, by SIGKILL, its lock is nobody's."""
    given = [*flags, "--epochs", "2000", "--save-steps", "5", "--output-dir", str(tmp_path / "run")]
    first = subprocess.Popen(
        [sys.executable, "-m", GLUE, *given], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        until = time.monotonic() + 120
        while not (tmp_path / "run" / "checkpoints" / "5").exists() and time.monotonic() < until:
            time.sleep(0.05)
        for flag in ("", "--resume", "--overwrite"):
            ended = command(GLUE, [*given, *flag.split()], tmp_path)
            assert ended.status == 2 and re.search(rf"in use by process {first.pid} on .*, since 2", ended.err), (
                ended.err
            )
        assert first.poll() is None
    finally:
        first.kill()
        first.wait()
    assert_refused(GLUE, given, tmp_path, r"holds an unfinished run; pass --resume")
    ended = command(GLUE, [*given, "--resume", "--max-steps", "5"], tmp_path)
    assert ended.status == 2 and "has other settings: --max-steps" in ended.err


def test_a_process_that_died_before_it_made_anything_leaves_a_folder_that_is_empty(tmp_path):
    (tmp_path / LOCK).touch()
    (tmp_path / f".{MARKER}.99999.new").touch()
    with Folder(tmp_path, ("metrics.jsonl",)) as mine:
        mine.check(resume=False, overwrite=False, inputs={})
        mine.begin(clear=True)
        assert {path.name for path in tmp_path.iterdir()} == {LOCK, MARKER}


def _enter(folder: str, barrier, say) -> None:
    with Folder(Path(folder), ("metrics.jsonl", "checkpoints/")) as mine:
        barrier.wait()
        try:
            mine.check(resume=False, overwrite=False, inputs={})
            mine.begin(clear=True)
        except UsageError as error:
            say.put(str(error))
            return
        (mine.own("metrics.jsonl")).write_text(str(os.getpid()))
        say.put("")
        time.sleep(0.2)


def test_of_two_started_together_one_works(tmp_path):
    barrier, say = FORKS.Barrier(2), FORKS.Queue()
    for number in range(20):
        folder = tmp_path / str(number)
        both = [FORKS.Process(target=_enter, args=(str(folder), barrier, say)) for _ in range(2)]
        for one in both:
            one.start()
        said = sorted(say.get(timeout=60) for _ in both)
        assert said[0] == "" and re.search("in use by|another process has begun there", said[1]), said
        for one in both:
            one.join()
        assert (folder / "metrics.jsonl").read_text() in {str(one.pid) for one in both}


def test_two_runs_started_together(flags, tmp_path):
    given = [sys.executable, "-m", GLUE, *flags, "--epochs", "2", "--output-dir", str(tmp_path / "run")]
    both = [
        subprocess.Popen(given, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)
    ]
    said = [one.communicate(timeout=300)[1] for one in both]
    assert sorted(one.returncode for one in both) == [0, 2], said
    (loser,) = (text for one, text in zip(both, said, strict=True) if one.returncode)
    assert re.search("in use by|another process has begun there|holds an? .*finished run", loser.splitlines()[-1])
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps) and json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 12


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    """A small disk of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no disk can be mounted here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_is_one_line_and_the_run_goes_on_when_there_is_room(flags, disk):
    given = [*flags, "--epochs", "100", "--save-steps", "5", "--output-dir", str(disk / "run")]
    run = subprocess.Popen(
        [sys.executable, "-m", GLUE, *given], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    until = time.monotonic() + 120
    while not (disk / "run" / "checkpoints" / "5").exists() and time.monotonic() < until:
        time.sleep(0.02)
    with open(disk / "filler", "wb", buffering=0) as filler, contextlib.suppress(OSError):
        while True:
            filler.write(bytes(4096))
    last = run.communicate(timeout=60)[1].splitlines()[-1]
    assert run.returncode == 2 and last.startswith(f"{GLUE}: error: ") and "No space left on device" in last, last
    (disk / "filler").unlink()
    ended = command(GLUE, [*given, "--resume"], disk)
    assert ended.status == 0 and "resumed    after step" in ended.out, ended.err
    steps = [json.loads(line)["step"] for line in (disk / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps) and steps[-1] == 600
    assert not [path.name for path in (disk / "run").iterdir() if path.name.endswith((".new", ".old"))]


@pytest.mark.parametrize("where", ["/dev/null/run", "file", "file/run", "broken", "locked/run"])
def test_a_place_that_cannot_be_written(where, flags, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "broken").symlink_to(tmp_path / "nowhere")
    (tmp_path / "locked").mkdir()
    if where == "locked/run":
        if os.geteuid() == 0:
            pytest.skip("root may write everywhere")
        (tmp_path / "locked").chmod(0o500)
    assert_refused(GLUE, [*flags, "--output-dir", where], tmp_path, r"cannot be written")


def test_sigterm_before_anything_was_made_leaves_nothing(flags, tmp_path):
    run = subprocess.Popen(
        [sys.executable, "-m", GLUE, *flags, "--output-dir", str(tmp_path / "run")], cwd=ROOT,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    time.sleep(1.5)
    run.send_signal(signal.SIGTERM)
    assert run.communicate(timeout=10)[1] == f"{GLUE}: ended by SIGTERM\n" and run.returncode == 128 + signal.SIGTERM
    assert not (tmp_path / "run").exists()
