"""The program of a pruning event against the paper's small example and brute force on its formula."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.bench.allocate import instance, llama_3_8b, roberta_base
from jaxprune.allocation import Problem, component_problem, prune_problem, solve, step_time
from jaxprune.errors import UsageError
from jaxprune.sites import Site

pytestmark = pytest.mark.usefixtures("count_flops")

EXACT = ("CBC", "GLPK_MI", "HIGHS", "DP")


def loss(ranks, now, importance, momentum, stability):
    """Equations 7 to 9 as they stand, a site at rank 0 losing nothing."""
    terms = [
        x * ((c - r) / c + momentum * abs(r - c) - stability * (r == c))
        for x, r, c in zip(importance, ranks, now, strict=True)
        if c
    ]
    return math.fsum(terms)


def candidates(sites, now, allowed, budget, time_budget=1.0):
    """Every plan of a pruning event, by the definition of its constraints."""
    types = {s.type for s, c in zip(sites, now, strict=True) if c}
    choices = [[r for r in {*allowed, c} if r <= c] for c in now]
    for ranks in itertools.product(*choices):
        cost = sum(r * (s.d_in + s.d_out) for s, r in zip(sites, ranks, strict=True))
        kept = {s.type for s, r in zip(sites, ranks, strict=True) if r}
        if cost <= budget and kept == types and step_time(ranks, sites) <= time_budget:
            yield ranks


@pytest.mark.parametrize("solver", ("auto", *EXACT))
def test_small_example_of_the_specification(solver):
    shape = {"q": (1, 1), "f": (2, 3)}  # 2 and 5 parameters a rank
    sites = tuple(Site(f"layer_{i}/{t}", *shape[t], i, t) for i, t in enumerate("qfqf"))
    problem = prune_problem([4, 1, 2, 0.5], sites, [4, 2, 4, 1], 14, ranks=[0, 1, 2, 4])
    plan = solve(problem, solver=solver)
    assert list(plan.ranks.values()) == [4, 1, 0, 0]
    assert plan.objective == pytest.approx(3.75, abs=1e-12) and plan.gap == 0
    ranked = sorted(
        (loss(r, [4, 2, 4, 1], [4, 1, 2, 0.5], 0.1, 0.05), r) for r in candidates(sites, [4, 2, 4, 1], [0, 1, 2, 4], 14)
    )
    assert ranked[0][1] == (4, 1, 0, 0) and ranked[1] == (pytest.approx(3.775), (4, 0, 0, 1))


@st.composite
def events(draw):
    count = draw(st.integers(1, 5))
    dims = st.sampled_from([3, 8, 33])
    drawn = st.tuples(dims, dims, st.integers(0, 2), st.sampled_from("qk"))
    sites = tuple(
        Site(f"layer_{k}/{kind}{i}", d_in, d_out, k, kind)
        for i, (d_in, d_out, k, kind) in enumerate(draw(st.lists(drawn, min_size=count, max_size=count)))
    )
    now = draw(st.lists(st.integers(0, 5), min_size=count, max_size=count).filter(any))
    importance = draw(st.lists(st.floats(1e-3, 1e3), min_size=count, max_size=count))
    allowed = draw(st.sampled_from([None, [0, 1, 2], [0, 1, 4]]))
    weights = draw(st.sampled_from([(0.1, 0.05), (0.0, 0.0), (0.9, 0.15)]))
    aim = draw(st.sampled_from(list(candidates(sites, now, allowed or range(6), 10**9))))
    budget = sum(r * (s.d_in + s.d_out) for s, r in zip(sites, aim, strict=True)) + draw(st.integers(0, 50))
    time = draw(st.sampled_from([None, min(1.0, math.ceil(step_time(aim, sites) * 10**6) / 10**6)]))
    return importance, sites, now, budget, allowed, weights, time


@settings(max_examples=60, deadline=None)
@given(events(), st.sampled_from([2.0**-30, 3.0, 1e12]))
def test_every_solver_against_brute_force(case, factor):
    importance, sites, now, budget, allowed, (momentum, stability), time = case
    feasible = set(candidates(sites, now, allowed or range(6), budget, time or 2))
    best = min(loss(ranks, now, importance, momentum, stability) for ranks in feasible)
    options = dict(ranks=allowed, momentum=momentum, stability=stability, time_budget=time)
    for solver in EXACT:
        plan = solve(prune_problem(importance, sites, now, budget, **options), solver=solver)
        ranks = tuple(plan.ranks.values())
        assert ranks in feasible and plan.gap == 0, solver
        assert all(r <= c for r, c in zip(ranks, now, strict=True)) and plan.cost <= budget
        tolerance = 1e-9 * max(importance)
        assert plan.objective == pytest.approx(best, rel=1e-9, abs=tolerance)
        assert loss(ranks, now, importance, momentum, stability) == pytest.approx(best, rel=1e-9, abs=tolerance)
    scaled = solve(prune_problem([factor * x for x in importance], sites, now, budget, **options), solver="DP")
    assert scaled.objective == pytest.approx(factor * best, rel=1e-9, abs=factor * tolerance)


@settings(max_examples=60, deadline=None)
@given(events(), st.data())
def test_components_against_brute_force_on_their_values(case, data):
    _, sites, now, budget, _, (momentum, stability), time = case
    values = {
        s.path: data.draw(st.lists(st.floats(0, 10), min_size=c, max_size=c).filter(lambda x: not x or max(x) > 1e-3))
        for s, c in zip(sites, now, strict=True)
    }

    def lost(ranks):
        total = 0.0
        for s, r, c in zip(sites, ranks, now, strict=True):
            worth = sorted(values[s.path])
            total += sum(worth[: c - r]) + sum(worth) * (momentum * (c - r) - stability * (r == c))
        return total

    feasible = set(candidates(sites, now, range(6), budget, time or 2))
    best = min(map(lost, feasible))
    prices = dict(momentum=momentum, stability=stability, time_budget=time)
    problem = component_problem(values, sites, budget, **prices)
    for solver in EXACT:
        plan = solve(problem, solver=solver)
        ranks = tuple(plan.ranks.values())
        assert ranks in feasible and plan.gap == 0, solver
        for found in (plan.objective, lost(ranks)):
            assert found == pytest.approx(best, rel=1e-9, abs=1e-9 * max(map(sum, values.values())))
    if not momentum:  # the loss falls in ever smaller steps
        for row, c in enumerate(now):
            kept = problem.value[row, : np.searchsorted(problem.ranks, c) + 1]
            gains = np.diff(kept) / np.diff(problem.ranks[: len(kept)])
            assert (gains >= 0).all() and (np.diff(gains) <= 1e-9).all()


def test_components_of_one_site_may_be_worth_more_than_another_site():
    """Graded plans: the paper's rule, by the same importances, takes a whole site or leaves it."""
    sites, values = sites_of("qq"), {"layer_0/q": [4.0, 3.0, 0.2, 0.1], "layer_1/q": [3.0, 2.0, 0.1, 0.1]}
    plan = solve(component_problem(values, sites, 16 * 4))
    assert list(plan.ranks.values()) == [2, 2] and plan.objective == pytest.approx(0.5)
    assert list(solve(prune_problem([7.3, 5.2], sites, [4, 4], 16 * 4)).ranks.values()) == [4, 0]


def test_auto_does_not_stall_where_hundreds_of_ranks_are_nearly_as_good():
    """Components of random factors, on which a tree search takes minutes: `auto` proves the optimum all the same."""
    rng, sites = np.random.default_rng(0), llama_3_8b()
    values = {s.path: np.sort(1 + 0.1 * rng.random(16)) for s in sites}
    budget = sum(s.cost(16) for s in sites) * 6 // 10
    plan = solve(component_problem(values, sites, budget))
    assert plan.solver == "DP" and plan.gap == 0 and "DP, chosen by auto," in plan.status
    assert "CBC" not in plan.status  # nor is one tried first
    few = solve(prune_problem([1.0, 2.0], sites_of("qq"), [2, 2], 48))
    assert few.solver != "DP" and few.gap == 0


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_components_without_a_usable_value_are_one_line(value):
    with pytest.raises(UsageError, match=r"^the components of layer_1/k have values that are negative or not finite$"):
        component_problem({"layer_0/q": [1.0], "layer_1/k": [value, 1.0]}, sites_of("qk"), 99)


@pytest.mark.parametrize("make", [roberta_base, llama_3_8b])
@pytest.mark.parametrize("tau", [None, 0.75])
def test_solvers_agree_at_real_size(make, tau):
    for seed in range(2):
        problem = instance(make(), np.random.default_rng(seed), tau, prune=True)
        found = {name: solve(problem, solver=name, time_limit=10) for name in EXACT}
        assert found["HIGHS"].gap == found["DP"].gap == 0
        for plan in found.values():
            if plan.gap == 0:
                assert plan.objective == pytest.approx(found["DP"].objective, rel=1e-9)
            assert plan.cost <= plan.budget and step_time(plan.ranks, problem.sites) <= (tau or 1)


def sites_of(types):
    return tuple(Site(f"layer_{i}/{t}", 8, 8, i, t) for i, t in enumerate(types))


def test_successive_events_only_go_down_and_the_dead_stay_dead():
    rng = np.random.default_rng(0)
    sites = roberta_base()
    ranks = {s.path: 16 for s in sites}
    for budget in (2_000_000, 1_000_000, 400_000, 100_000):
        importance = {path: rng.lognormal() for path, rank in ranks.items() if rank}  # none for sites at rank 0
        plan = solve(prune_problem(importance, sites, ranks, budget))
        assert set(plan.ranks) == set(ranks) and plan.cost <= budget
        assert all(plan.ranks[path] <= rank for path, rank in ranks.items())
        ranks = plan.ranks
    assert 0 in ranks.values() and {s.type for s in sites if ranks[s.path]} == {s.type for s in sites}


def test_room_for_all_leaves_all_as_it_is():
    plan = solve(prune_problem([1.0, 2.0, 3.0], sites_of("qqk"), [3, 0, 5], 10**6))
    assert list(plan.ranks.values()) == [3, 0, 5] and plan.objective == pytest.approx(-0.05 * 4)


def test_a_type_without_a_live_site_needs_none():
    plan = solve(prune_problem([1.0, math.nan, 2.0], sites_of("qkq"), [2, 0, 2], 16))
    assert list(plan.ranks.values()) == [0, 0, 1] and plan.warnings == ()


def test_a_rank_outside_the_set_may_only_be_kept():
    problem = prune_problem([1.0, 1.0], sites_of("qq"), [3, 5], 16 * 8, ranks=[0, 2, 4])
    assert list(problem.ranks) == [0, 2, 3, 4, 5]
    assert np.isfinite(problem.value).tolist() == [[True, True, True, False, False], [True, True, False, True, True]]
    assert list(solve(problem).ranks.values()) == [3, 5]


def test_a_time_budget_alone_removes_the_bottom():
    sites = tuple(Site(f"layer_{i}/q", 300, 300, i, "q") for i in range(4))
    plan = solve(prune_problem([9.0, 1.0, 1.0, 1.0], sites, [8] * 4, 10**9, time_budget=0.7))
    assert list(plan.ranks.values()) == [0, 0, 8, 8]
    assert plan.time is not None and plan.time <= 0.7 and "ends at layer 2" in plan.status


def test_broken_importances_are_replaced_and_said():
    plan = solve(prune_problem([1.0, math.nan, math.inf], sites_of("qqq"), [2, 2, 2], 16 * 4), solver="DP")
    assert list(plan.ranks.values()) == [2, 0, 2] and len(plan.warnings) == 2 and "layer_1/q" in plan.status
    equal = solve(prune_problem([1.0] * 3, sites_of("qqq"), [2, 2, 2], 16 * 4))  # told apart by nothing but order
    assert list(equal.ranks.values()) == [2, 2, 0]


@pytest.mark.parametrize(
    ("importance", "current", "budget", "kwargs", "message"),
    [
        ([1.0, 1.0], [0, 0], 99, {}, "every site is at rank 0"),
        ([0.0, 0.0], [1, 1], 99, {}, "no importance is finite and above 0"),
        ([math.nan, 5.0], [1, 0], 99, {}, "no importance is finite and above 0"),
        ([-1.0, 5.0], [1, 0], 99, {}, "negative at layer_0/q"),
        ({"layer_1/k": 1.0}, [1, 1], 99, {}, "no score for layer_0/q"),
        ([1.0], [1, 1], 99, {}, "got 1 scores for 2 sites"),
        ([1.0, 1.0], {"layer_0/q": 1}, 99, {}, "no rank for layer_1/k"),
        ([1.0, 1.0], [1, -1], 99, {}, "rank -1 at layer_1/k"),
        ([1.0, 1.0], [1, 2], 31, {}, "raise the budget to 32"),
        ([1.0, 1.0], [4, 4], 95, {"ranks": [0, 3]}, "raise the budget to 96"),
        ([1.0, 1.0], [4, 4], 99, {"ranks": [1, 3]}, "0 among them"),
        ([1.0, 1.0], [4, 4], 99, {"momentum": -1}, "momentum -1"),
        ([1.0, 1.0], [4, 4], 99, {"stability": math.nan}, "stability nan"),
        ([1.0, 1.0], [4, 4], 99, {"time_budget": 0.01}, "forward pass alone takes 0.07143, .* raise it to"),
    ],
)
def test_wrong_input_is_one_clear_line(importance, current, budget, kwargs, message):
    with pytest.raises(UsageError, match=message) as caught:
        prune_problem(importance, sites_of("qk"), current, budget, **kwargs)
    assert "\n" not in str(caught.value)


def test_nothing_allowed_above_rank_0_is_an_error():
    value = np.array([[0.0, -np.inf]])
    with pytest.raises(UsageError, match="no site may take a rank above 0"):
        Problem(sites_of("q"), np.array([0, 1]), value, np.array([[0, 16]]), 99)
