"""The schedules against numbers worked out by hand and by another formula."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxprune.errors import UsageError
from jaxprune.schedules import BUDGETS, bezier, budget_schedule, cubic, event_steps


def test_bezier_at_tenths():
    expected = [0, 0.0712, 0.1616, 0.2664, 0.3808, 0.5, 0.6192, 0.7336, 0.8384, 0.9288, 1]
    np.testing.assert_allclose([bezier()(t / 10) for t in range(11)], expected, atol=1e-12)


def test_budgets_of_ten_events():
    """ALGORITHMS: p = 0.6 of 1,262,592 parameters."""
    left = [math.floor(1_262_592 * (1 - 0.6 * bezier()(event / 10))) for event in range(1, 11)]
    assert left == [1208654, 1140171, 1060779, 974114, 883814, 793513, 706849, 627457, 558974, 505036]


def test_steps_of_the_papers_events():
    rte = event_steps(10, 4914, 545)
    assert rte[:3] == (942, 1339, 1736) and rte[-1] == 4516
    cola = event_steps(10, 17956, 1274)
    assert cola[:3] == (2790, 4307, 5823) and cola[-1] == 16439


@given(st.floats(0, 1), st.floats(0, 1), st.sampled_from(sorted(BUDGETS)))
def test_budget_schedules_rise_from_0_to_1(a, b, name):
    share = budget_schedule(name)
    assert share(0.0) == 0 and share(1.0) == pytest.approx(1)
    assert share(min(a, b)) <= share(max(a, b)) + 1e-12


def test_cubic_of_three_epochs():
    np.testing.assert_allclose([cubic(t, 0, 3, 1.0, 0.2) for t in range(4)], [1, 0.437037, 0.22963, 0.2], atol=1e-5)
    llama = [cubic(t, 4000, 8000, 1.0, 0.2) for t in (4000, 5000, 6000, 7000, 8000)]
    np.testing.assert_allclose(llama, [1, 0.5375, 0.3, 0.2125, 0.2], atol=1e-3)
    assert cubic(10, 20, 20, 1.0, 0.2) == 1.0 and cubic(20, 20, 20, 1.0, 0.2) == 0.2


@pytest.mark.parametrize(("events", "total", "delay"), [(0, 100, 0), (10, 10, 0), (3, 100, 97)])
def test_events_that_do_not_fit(events, total, delay):
    with pytest.raises(UsageError, match="pruning events"):
        event_steps(events, total, delay)


def test_unknown_schedule_names_the_nearest():
    with pytest.raises(UsageError, match="nearest: bezier"):
        budget_schedule("bezir")
