"""Checkpoints: what is kept, what is refused, and that a damaged disk, a full one or a kill costs no whole checkpoint."""

import contextlib
import errno
import logging
import math
import os
import random
import resource
import shutil
import subprocess
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp
from tests.experiments import refusals
from tests.test_methods import METHODS

CHAIN = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))


def state_of(number: int, size: int = 0) -> jp.TrainState:
    """Make a state that is a function of the number of its step; `size` adds so many numbers that do not compress."""
    draw = np.random.default_rng(number).standard_normal
    sites = {"layer_0/fc1": (12, 20), "layer_1/fc2": (20, 12)}
    adapters = {
        path: jp.Lora(jnp.asarray(draw((d_in, 2)), jnp.float32), jnp.asarray(draw((2, d_out)), jnp.float32), scale=2.0)
        for path, (d_in, d_out) in sites.items()
    }
    masks = {path: jnp.ones(2) for path in sites}
    state = jp.init_state(jax.random.key(number), adapters, masks, CHAIN)
    noise = {"noise": jnp.asarray(draw(size), jnp.float32)} if size else ()
    return state._replace(step=jnp.int32(number), method_state=noise)


def noisy(size: int) -> jp.Method:
    """Make the method whose state `state_of` adds."""
    return jp.Method(jp.lora().start, init=lambda adapters, masks: {"noise": jnp.zeros(size)})


def bits(state: jp.TrainState) -> list[tuple]:
    leaves = jax.tree.leaves(state._replace(key=jax.random.key_data(state.key)))
    return [(leaf.shape, str(leaf.dtype), np.asarray(leaf).tobytes()) for leaf in leaves]


def contents(folder: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def one_line(caught, limit=700) -> str:
    line = str(caught.value)
    assert "\n" not in line and len(line) < limit, line
    return line


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A folder with checkpoints of steps 1 and 2, to be copied."""
    folder = tmp_path_factory.mktemp("whole")
    with jp.Checkpoints(folder) as checkpoints:
        for number in (1, 2):
            checkpoints.save(state_of(number), {"step": number})
    return folder


@pytest.fixture
def two(whole, tmp_path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "two"))


def test_every_bit_comes_back(tmp_path):
    """Infinite and tiny numbers, no numbers at all, other kinds of keys, and whatever JSON can hold beside them."""
    extra = {"note": [1, None, math.inf], "name": "n\nl \ud800", "big": 10**400}
    odd = jnp.array([math.nan, -0.0, math.inf, 1e-45, 3.0e38])
    arrays = {"odd": odd, "empty": jnp.zeros((0, 3)), "half": jnp.array([1.5], jnp.bfloat16), "yes": jnp.array(True)}
    method = jp.Method(jp.lora().start, init=lambda *_: jax.tree.map(jnp.zeros_like, arrays))
    for key in (jax.random.key(7), jax.random.key(7, impl="rbg"), jax.random.PRNGKey(7)):
        state = state_of(3)._replace(method_state=arrays, key=key)
        with jp.Checkpoints(tmp_path) as checkpoints:
            checkpoints.save(state, extra)
        checkpoints = jp.Checkpoints(tmp_path)
        assert checkpoints.latest() == 3 and checkpoints.steps() == [3] and checkpoints.extra() == extra
        loaded = checkpoints.restore(CHAIN, method)
        assert jax.tree.structure(loaded) == jax.tree.structure(state) and loaded.key.dtype == key.dtype
        assert bits(loaded) == bits(state)


KEPT = {
    "without scores": (2, {1: None, 2: None, 3: None, 4: None}, [3, 4]),
    "one": (1, {1: None, 2: None, 3: None}, [3]),
    "with scores": (2, {0: 1.0, 1: 9.0, 2: 2.0, 3: 3.0, 4: 4.0}, [1, 3, 4]),
    "the best is among the latest": (2, {1: 1.0, 2: 2.0, 3: 3.0}, [2, 3]),
    "some scores": (1, {1: None, 2: 5.0, 3: None, 4: 1.0, 5: None}, [2, 5]),
    "equal scores": (1, {1: 5.0, 2: 5.0, 3: 1.0}, [2, 3]),
    "NaN is no score": (1, {1: math.nan, 2: 1.0, 3: math.nan}, [2, 3]),
    "infinite scores": (1, {1: math.inf, 2: 1.0, 3: -math.inf}, [1, 3]),
    "all": (10**30, {1: None, 2: 1.0, 3: None}, [1, 2, 3]),
    "one goes back": (1, {5: None, 6: None, 2: None}, [2, 6]),
}


@pytest.mark.parametrize("kind", KEPT)
def test_the_latest_and_the_best_are_kept(kind, tmp_path):
    keep, scores, expected = KEPT[kind]
    with jp.Checkpoints(tmp_path, keep=keep) as checkpoints:
        for number, score in scores.items():
            checkpoints.save(state_of(number), score=score)
    assert jp.Checkpoints(tmp_path).steps() == expected
    assert sorted(path.name for path in tmp_path.iterdir()) == [str(number) for number in expected]


def test_saving_a_step_again_replaces_it(two):
    with jp.Checkpoints(two) as checkpoints:
        checkpoints.save(state_of(5)._replace(step=jnp.int32(2)), {"new": True})
        assert checkpoints.steps() == [1, 2] and checkpoints.extra() == {"new": True}
    assert bits(jp.Checkpoints(two).restore(CHAIN)._replace(step=jnp.int32(5))) == bits(state_of(5))
    assert sorted(path.name for path in two.iterdir()) == ["1", "2"]


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
    data = bytearray(path.read_bytes())
    data[random.Random(path.name).randrange(len(data))] ^= 1
    path.write_bytes(data)


HARM = {"truncated": truncate, "missing": Path.unlink, "emptied": lambda path: path.write_bytes(b""), "flipped": flip}


@pytest.mark.parametrize("kind", HARM)
def test_a_damaged_file_is_found_whichever_it_is(kind, whole, two, caplog):
    names = sorted(str(path.relative_to(whole)) for path in (whole / "2").rglob("*") if path.is_file())
    assert len(names) > 5
    for name in names:
        if (two / name).stat().st_size == 0:
            continue
        HARM[kind](two / name)
        caplog.clear()
        checkpoints = jp.Checkpoints(two)
        assert checkpoints.latest() == 1, name
        assert len(caplog.messages) == 1 and "\n" not in caplog.text.strip() and "step 1 is used" in caplog.text, name
        assert checkpoints.latest() == 1 and len(caplog.messages) == 1, "it is said once"
        shutil.copy2(whole / name, two / name)
    assert jp.Checkpoints(two).latest() == 2


WRONG = {
    "no JSON": b"{",
    "another encoding": b"\xff\xfe{",
    "a list": b"[1]",
    "null": b"null",
    "empty object": b"{}",
    "wrong checksum": b'{"crc32": 1, "checkpoint": {}}',
    "text for a checksum": b'{"crc32": "x", "checkpoint": {}}',
    "nested deep": b"[" * 100_000,
    "a number without end": b'{"crc32": ' + b"9" * 5000 + b', "checkpoint": {}}',
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_description_of_another_shape_is_no_checkpoint(kind, two, caplog):
    (two / "2" / "description.json").write_bytes(WRONG[kind])
    checkpoints = jp.Checkpoints(two)
    assert checkpoints.steps() == [1] and checkpoints.latest() == 1
    assert "description.json is not as it was written" in caplog.text


def test_a_flipped_bit_of_a_description_that_still_reads_is_found(two):
    path = two / "2" / "description.json"
    said = path.read_bytes()
    assert said.count(b'"extra": {"step": 2}') == 1
    path.write_bytes(said.replace(b'"extra": {"step": 2}', b'"extra": {"step": 3}'))
    assert jp.Checkpoints(two).extra() == {"step": 1}


def test_after_a_fallback_extra_and_state_agree_and_the_run_goes_on(two, caplog):
    data = max((two / "2" / "state").rglob("d/*"), key=lambda path: path.stat().st_size)
    flip(data)
    with jp.Checkpoints(two, keep=1) as checkpoints:
        assert checkpoints.extra() == {"step": 1}
        loaded = checkpoints.restore(CHAIN)
        assert bits(loaded) == bits(state_of(1)) and checkpoints.steps() == [1]
        for ask in (checkpoints.extra, lambda step: checkpoints.restore(CHAIN, step=step)):
            with pytest.raises(jp.UsageError, match=r"2' is not whole \(state.*; it has those of steps 1$"):
                ask(2)
        # A damaged one is not among the latest, and is replaced when its step comes again.
        checkpoints.save(loaded._replace(step=jnp.int32(0)))
        assert checkpoints.steps() == [0, 1]
        checkpoints.save(state_of(2))
        assert checkpoints.latest() == 2 and checkpoints.steps() == [2]
    assert len(caplog.messages) == 1
    assert bits(jp.Checkpoints(two).restore(CHAIN)) == bits(state_of(2))


def test_where_none_is_whole_one_line_says_so(two):
    for number in (1, 2):
        (two / str(number) / "description.json").unlink()
    checkpoints = jp.Checkpoints(two)
    assert checkpoints.steps() == []
    for ask in (checkpoints.latest, checkpoints.extra, lambda: checkpoints.restore(CHAIN), checkpoints.latest):
        with pytest.raises(
            jp.UsageError, match=r"description.json is missing\), and so is that of step 1, and .* no whole"
        ):
            ask()
    assert jp.Checkpoints(two / "new").latest() is None
    with pytest.raises(jp.UsageError, match="no checkpoint in .*new'; it has none"):
        jp.Checkpoints(two / "new").extra()


def test_what_is_not_ours_is_left_alone(tmp_path, caplog):
    for name in ("9", "2024", "notes", "007", "٣", "5.orbax-checkpoint-tmp", "-1", "3 (copy)"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text(name)
    for name in ("8", "readme.txt"):
        (tmp_path / name).write_text(name)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "7").symlink_to(tmp_path / "elsewhere")
    before = contents(tmp_path)
    with jp.Checkpoints(tmp_path, keep=1) as checkpoints:
        assert checkpoints.steps() == []
        for number in (1, 2, 3):
            checkpoints.save(state_of(number))
        assert checkpoints.steps() == [3] and contents(tmp_path).items() >= before.items()
        shutil.copytree(tmp_path / "3", tmp_path / "3000")
        assert checkpoints.latest() == 3 and len(caplog.messages) == 1
        assert (
            "3000' is not whole (it was saved as step 3), and so are those of steps 2024, 9, 7; step 3" in caplog.text
        )
        # A name that is needed is freed, not deleted.
        for number in (7, 8, 9):
            checkpoints.save(state_of(number))
        checkpoints.wait()
        shutil.rmtree(tmp_path / "9")
        (tmp_path / "9").mkdir()
        checkpoints.save(state_of(9))
        assert checkpoints.steps() == [9]
    assert sorted(path.name for path in tmp_path.glob("*.aside*")) == ["7.aside", "8.aside", "9.aside", "9.aside-2"]
    assert (tmp_path / "9.aside" / "mine").read_text() == "9" and (tmp_path / "8.aside").read_text() == "8"
    assert sum("is now" in line for line in caplog.messages) == 4


def test_leftovers_of_a_killed_process_are_swept_with_the_next_save(two):
    for name in ("3.jaxprune-tmp", "1.old.jaxprune-tmp"):
        shutil.copytree(two / "2", two / name)
    assert jp.Checkpoints(two).steps() == [1, 2]
    with jp.Checkpoints(two) as checkpoints:
        checkpoints.save(state_of(3))
    assert sorted(path.name for path in two.iterdir()) == ["2", "3"]


def test_a_checkpoint_of_another_method_is_refused(tmp_path):
    with jp.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state_of(1), method=jp.rslora())
        with pytest.raises(
            jp.UsageError, match="1' was saved by method 'rslora', not 'lora'; use the run's own method"
        ):
            checkpoints.restore(CHAIN, jp.lora())
        for method in (None, jp.rslora(), jp.Method(jp.lora().start)):
            assert bits(checkpoints.restore(CHAIN, method)) == bits(state_of(1))
        checkpoints.save(state_of(1), method=jp.Method(jp.lora().start))
        assert bits(checkpoints.restore(CHAIN, jp.lora())) == bits(state_of(1))
        with pytest.raises(jp.UsageError, match="leaves differ, first .opt_state"):
            checkpoints.restore(optax.sgd(1e-2))


def test_methods_have_names_of_their_own():
    names = {kind: make().name for kind, make in METHODS.items()}
    assert names.pop("dora") == "dora+lora" and names.pop("dora_pissa") == "dora+pissa"
    assert names.pop("pissa_niter") == "pissa"
    assert (names.pop("oplora_energy"), names.pop("channelmask_paper")) == ("oplora", "channelmask")
    assert all(name == kind for kind, name in names.items())
    assert jp.with_dora(jp.Method(jp.lora().start)).name == ""


FOLDERS = {
    "empty": ("", "it is no path"),
    "none": (None, "not NoneType"),
    "a number": (3, "not int"),
    "bytes": (b"x", "it is no path"),
    "NUL": ("a\0b", "null byte"),
    "300 characters": ("a" * 300, "name too long"),
    "lone surrogate": ("\ud800", "surrogates"),
    "a file": ("file", "Not a directory"),
    "below a file": ("file/x", "Not a directory"),
    "a link to nothing": ("link", "Not a directory"),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_what_cannot_be_a_folder_is_refused(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("link").symlink_to("nowhere")
    folder, reason = FOLDERS[kind]
    with pytest.raises(jp.UsageError, match=f"cannot hold checkpoints.*{reason}.*choose another") as caught:
        jp.Checkpoints(folder)
    one_line(caught, 300)
    assert sorted(os.listdir()) == ["file", "link"]


REFUSED = {
    **{f"keep {name}": (lambda c, k=value: jp.Checkpoints(c.folder, keep=k), "^keep .* expected a whole number, 1 or more")
       for name, value in {"NaN": math.nan, "0": 0, "-1": -1, "2.5": 2.5, "text": "2\n", "True": True, "None": None,
                           "endless": -(10**5000)}.items()},
    **{f"step {name}": (lambda c, k=value: c.restore(CHAIN, step=k), "^step .* expected a whole number, 0 or more")
       for name, value in {"NaN": math.nan, "2.5": 2.5, "text": "2", "True": True, "-1": -1, "list": [1]}.items()},
    "step that is not there": (lambda c: c.extra(7), "no checkpoint of step 7 in .*; it has those of steps 1, 2"),
    "endless step": (lambda c: c.extra(10**5000), "no checkpoint of step <a whole number of about 5000 digits>"),
    "score text": (lambda c: c.save(state_of(3), score="high"), "score 'high' cannot be used"),
    "endless score": (lambda c: c.save(state_of(3), score=10**400), r"score 1000.*\.\.\.0+ cannot be used"),
    "extra list": (lambda c: c.save(state_of(3), [1]), "extra cannot be saved .it is of type list"),
    "extra object": (lambda c: c.save(state_of(3), {"a": object()}), "extra cannot be saved .*not JSON serializable"),
    "extra endless": (lambda c: c.save(state_of(3), {"a": 10**5000}), "extra cannot be saved .*4300 digits"),
    "no state": (lambda c: c.save({"a": 1}), "a state of type dict cannot be saved; expected a TrainState"),
    "many states": (lambda c: c.save(state_of(3)._replace(step=jnp.arange(2))), r"shape \(2,\).*one run at a time"),
    "half a step": (lambda c: c.save(state_of(3)._replace(step=jnp.float32(2))), "step .*2.*expected a whole number"),
    "step below 0": (lambda c: c.save(state_of(3)._replace(step=jnp.int32(-1))), "step .*-1.*, 0 or more"),
    "gone": (lambda c: c.save(donated()), "was donated to a step and is gone"),
}  # fmt: skip


def donated() -> jp.TrainState:
    state = state_of(3)
    jax.tree.leaves(state.adapters)[0].delete()
    return state


@pytest.mark.parametrize("kind", REFUSED)
def test_wrong_arguments_are_refused_and_nothing_is_written(kind, two):
    act, message = REFUSED[kind]
    before = contents(two)
    with jp.Checkpoints(two) as checkpoints, pytest.raises(jp.UsageError, match=message) as caught:
        act(checkpoints)
    one_line(caught)
    assert contents(two) == before


def test_what_json_cannot_nest_is_refused(two):
    deep: dict = {}
    inner = deep
    for _ in range(100_000):
        inner["a"] = inner = {}
    with jp.Checkpoints(two) as checkpoints, pytest.raises(jp.UsageError, match="extra cannot be saved .*recursion"):
        checkpoints.save(state_of(3), deep)


@contextlib.contextmanager
def small_disk(folder: Path, options: str):
    """Mount a file system in memory, where this process may."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("this process may not mount a file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


MIB = 1 << 20
FULL = (
    r"checkpoint '.*/2' cannot be written \(No space left on device\); free some space or choose another folder; "
    r"the latest whole one is of step 1$"
)
# What Orbax's writes would print after it has given up.
QUIET = pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture
def full(tmp_path):
    """A disk of 4 MiB, 3 of which the checkpoint of step 1 takes."""
    with small_disk(tmp_path / "disk", "size=4m") as disk:
        with jp.Checkpoints(disk / "checkpoints") as checkpoints:
            checkpoints.save(state_of(1, 3 * MIB // 4), {"step": 1})
        yield disk / "checkpoints"
        assert sorted(path.name for path in (disk / "checkpoints").iterdir()) == ["1"], "nothing half-written stays"
        assert bits(jp.Checkpoints(disk / "checkpoints").restore(CHAIN, noisy(3 * MIB // 4))) == bits(
            state_of(1, 3 * MIB // 4)
        )


def save_too_much(checkpoints: jp.Checkpoints) -> None:
    checkpoints.save(state_of(2, 3 * MIB // 4))


@QUIET
@pytest.mark.parametrize("where", ["save", "wait", "steps", "latest", "end"])
def test_a_full_disk_is_said_wherever_it_is_found(where, full):
    checkpoints = jp.Checkpoints(full)
    with pytest.raises(jp.UsageError, match=FULL) as caught, checkpoints:
        save_too_much(checkpoints)
        {"save": lambda: checkpoints.save(state_of(3)), "wait": checkpoints.wait, "steps": checkpoints.steps,
         "latest": checkpoints.latest, "end": lambda: None}[where]()  # fmt: skip
        assert where == "end"
    one_line(caught)
    # It is said once, and with less to write the same object goes on.
    checkpoints.save(state_of(3), {"step": 3})
    assert checkpoints.steps() == [1, 3] and checkpoints.extra() == {"step": 3}
    shutil.rmtree(full / "3")


@QUIET
def test_the_exception_under_way_is_not_hidden(full, caplog):
    with pytest.raises(KeyError, match="mine"), jp.Checkpoints(full) as checkpoints:
        save_too_much(checkpoints)
        raise KeyError("mine")
    assert len(caplog.messages) == 1 and "No space left on device" in caplog.messages[0]


@QUIET
@pytest.mark.parametrize("inodes", [1, 2, 3, 9, 14])
def test_no_space_for_the_folder_itself(inodes, tmp_path):
    with small_disk(tmp_path / "disk", f"nr_inodes={inodes}") as disk:
        with pytest.raises(jp.UsageError, match=r"1' cannot be written \(No space left on device\).*no whole one yet$"):
            with jp.Checkpoints(disk / "a") as checkpoints:
                checkpoints.save(state_of(1))
        assert [path.name for path in disk.rglob("*")] == ["a"][: inodes - 1]


def test_a_folder_that_cannot_be_written(tmp_path):
    with small_disk(tmp_path / "disk", "ro") as disk:
        for folder in (disk, disk / "new"):
            with pytest.raises(jp.UsageError, match=r"1' cannot be written \(Read-only file system\); choose another"):
                jp.Checkpoints(folder).save(state_of(1))


def _save_below_a_limit(folder: str) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, MIB))
    try:
        with jp.Checkpoints(folder) as checkpoints:
            checkpoints.save(state_of(1))
            checkpoints.save(state_of(2, MIB))
    except jp.UsageError as error:
        Path(folder, "said").write_text(str(error))


def test_a_limit_on_files_is_said_in_one_line(tmp_path):
    process = refusals.FORKS.Process(target=_save_below_a_limit, args=(str(tmp_path),))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    said = (tmp_path / "said").read_text()
    assert (
        f"2' cannot be written ({os.strerror(errno.EFBIG)}); choose another folder; the latest whole one is of step 1"
        in said
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "said"]


def _save_in_a_loop(folder: str) -> None:
    checkpoints = jp.Checkpoints(folder, keep=2)
    number = (checkpoints.latest() or 0) + 1
    while True:
        checkpoints.save(state_of(number, 50_000), {"step": number}, score=float(number % 3))
        number += 1


def test_whenever_the_process_is_killed_the_newest_checkpoint_is_whole(tmp_path, caplog):
    rng, newest = random.Random(0), []
    for _ in range(20):
        process = refusals.FORKS.Process(target=_save_in_a_loop, args=(str(tmp_path),))
        process.start()
        last = newest[-1] if newest else 0
        until = time.monotonic() + 60
        while jp.Checkpoints(tmp_path).steps()[-1:] in ([], [last]) and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(0.2 * rng.random())
        process.kill()
        process.join()
        checkpoints = jp.Checkpoints(tmp_path)
        step = checkpoints.latest()
        assert step == checkpoints.steps()[-1] and step > last and checkpoints.extra() == {"step": step}
        assert bits(checkpoints.restore(CHAIN, noisy(50_000))) == bits(state_of(step, 50_000))
        assert len(checkpoints.steps()) <= 4
        newest.append(step)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
