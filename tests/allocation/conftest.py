"""What the tests of allocation share."""

import pytest

from jaxprune.allocation import FLOPS, clock


@pytest.fixture(scope="module")
def count_flops():
    """For tests that work times out by hand, in FLOPs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clock, "MEASURED", FLOPS)
        yield
