"""Model folders shared by the tests."""

from __future__ import annotations

import jax
import pytest

from tests.models import tiny


@pytest.fixture(params=tiny.FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def folder(family, tmp_path):
    """A tiny model of each family as a local folder."""
    return tiny.save(tmp_path / family, tiny.CONFIGS[family], tiny.state(family))


@pytest.fixture(autouse=True)
def full_precision():
    """Multiply float32 as float32: an accelerator's default is fewer bits than the tests compare."""
    with jax.default_matmul_precision("highest"):
        yield
