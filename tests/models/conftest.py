"""Model folders shared by the tests."""

from __future__ import annotations

import pytest

from tests.models import tiny


@pytest.fixture(params=tiny.FAMILIES)
def family(request):
    return request.param


@pytest.fixture
def folder(family, tmp_path):
    """A tiny model of each family as a local folder."""
    return tiny.save(tmp_path / family, tiny.CONFIGS[family], tiny.state(family))
