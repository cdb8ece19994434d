"""Allocation under a time budget against brute force on the formula for the step time, and what is said about it."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from experiments.bench.allocate import instance, llama_3_8b, roberta_base
from jaxprune.allocation import (
    TimeModel,
    allocate,
    knapsack,
    make_clock,
    rank_problem,
    relax,
    solve,
    step_time,
)
from jaxprune.errors import UsageError
from jaxprune.sites import Site

pytestmark = pytest.mark.usefixtures("count_flops")

EXACT = ("CBC", "GLPK_MI", "HIGHS", "DP")
RANKS = (0, 1, 4)


def flops(ranks, sites, forward=2, backward=2, own=6):
    """Time of a step by its definition, in plain integers."""
    adapted = [s.layer for s, r in zip(sites, ranks, strict=True) if r > 0]
    total = 0
    for s, r in zip(sites, ranks, strict=True):
        kernel = s.d_in * s.d_out
        total += forward * kernel + own * r * (s.d_in + s.d_out)
        if adapted and s.layer >= min(adapted):
            total += backward * kernel
    return total


def ratio(ranks, sites):
    return Fraction(flops(ranks, sites), flops([16] * len(sites), sites))


def plans(sites):
    """Every plan that keeps a rank above 0 for each type: ranks, parameters, step time."""
    types = {s.type for s in sites}
    for ranks in itertools.product(RANKS, repeat=len(sites)):
        if {s.type for s, r in zip(sites, ranks, strict=True) if r} == types:
            params = sum(r * (s.d_in + s.d_out) for s, r in zip(sites, ranks, strict=True))
            yield ranks, params, ratio(ranks, sites)


def gain(ranks, scores, sites):
    return math.fsum(x * -math.expm1(-r / min(s.d_in, s.d_out)) for x, r, s in zip(scores, ranks, sites, strict=True))


def row_of(layers, kind="q"):
    return tuple(Site(f"layer_{i}/{kind}", 100, 100, i, kind) for i in layers)


@st.composite
def timed(draw):
    """Small sites on a few layers, scores, and budgets within which some plan lies."""
    count = draw(st.integers(2, 6))
    dims = st.sampled_from([3, 8, 33, 80])
    drawn = st.tuples(dims, dims, st.integers(0, 3), st.sampled_from("qk"))
    sites = tuple(
        Site(f"layer_{k}/{kind}{i}", d_in, d_out, k, kind)
        for i, (d_in, d_out, k, kind) in enumerate(draw(st.lists(drawn, min_size=count, max_size=count)))
    )
    scores = draw(st.lists(st.floats(1e-3, 1e3), min_size=count, max_size=count))
    _, params, time = draw(st.sampled_from(list(plans(sites))))
    budget = params + draw(st.integers(0, 400))
    return scores, sites, budget, math.ceil(time * 10**6) / 10**6


@settings(max_examples=40, deadline=None)
@given(timed())
def test_every_solver_against_brute_force(case):
    scores, sites, budget, tau = case
    feasible = [r for r, params, time in plans(sites) if params <= budget and time <= Fraction(str(tau))]
    best = max(gain(ranks, scores, sites) for ranks in feasible)
    for solver in EXACT:
        plan = allocate(scores, sites, budget, ranks=RANKS, time_budget=tau, solver=solver)
        ranks = tuple(plan.ranks.values())
        assert ranks in feasible and plan.gap == 0, solver
        assert plan.objective == pytest.approx(best, rel=1e-9)
        assert plan.time == pytest.approx(float(ratio(ranks, sites)), rel=1e-12) == step_time(plan.ranks, sites)


@settings(max_examples=40, deadline=None)
@given(timed())
def test_relaxation_leaves_every_best_plan_open(case):
    scores, sites, budget, tau = case
    problem = rank_problem(scores, sites, budget, RANKS, clock=make_clock(sites, tau))
    relaxed, best = relax(problem), knapsack(problem)
    assert best is not None and problem.fault(best) is None and problem.fault(relaxed.choice) is None
    assert problem.worth(relaxed.choice) <= problem.worth(best) * (1 + 1e-12)
    worth = {tuple(np.searchsorted(RANKS, r)): gain(r, scores, sites) / problem.scale for r, _, _ in plans(sites)}
    for choice, value in worth.items():
        if problem.fault(np.array(choice)) is None:
            assert value <= relaxed.bound * (1 + 1e-12)
            if value > problem.worth(relaxed.choice) * (1 + 1e-9):
                assert relaxed.open[np.arange(len(sites)), choice].all()
                assert any(stage.fault(np.array(choice)) is None for stage in relaxed.stages)


@settings(max_examples=40, deadline=None)
@given(timed())
def test_smallest_budgets_are_the_smallest(case):
    scores, sites, budget, tau = case
    clock = make_clock(sites, tau)
    least = min(params for _, params, time in plans(sites) if time <= Fraction(str(tau)))
    assert rank_problem(scores, sites, budget, RANKS, clock=clock).smallest_budget() == least
    fastest = min(time for _, params, time in plans(sites) if params <= budget)
    named = math.ceil(fastest * 10**4) / 10**4
    assume(named - 2e-4 > 0)
    with pytest.raises(UsageError, match=f"raise it to {named} or more$") as caught:
        allocate(scores, sites, budget, ranks=RANKS, time_budget=named - 2e-4)
    assert "\n" not in str(caught.value)
    plan = allocate(scores, sites, budget, ranks=RANKS, time_budget=named, solver="DP")
    assert plan.time is not None and plan.time <= named


@pytest.mark.parametrize("make", [roberta_base, llama_3_8b])
@pytest.mark.parametrize("tau", [0.6, 0.8, 0.95])
def test_solvers_agree_at_real_size(make, tau):
    for seed in range(2):
        problem = instance(make(), np.random.default_rng(seed), tau)
        found = {name: solve(problem, solver=name, time_limit=10) for name in EXACT}
        assert found["HIGHS"].gap == found["DP"].gap == 0
        for plan in found.values():
            if plan.gap == 0:
                assert plan.objective == pytest.approx(found["DP"].objective, rel=1e-9)
            exact = ratio(plan.ranks.values(), problem.sites)
            assert exact <= Fraction(str(tau)) and plan.time == pytest.approx(float(exact), rel=1e-12)
            assert sum(s.cost(plan.ranks[s.path]) for s in problem.sites) == plan.cost <= plan.budget


def test_step_time_by_hand():
    sites = row_of([0, 1])  # forward 2 x 20,000, back 20,000 a layer, 1,200 a rank: 118,400 at uniform rank 16
    assert step_time([16, 16], sites) == 1
    assert step_time({"layer_0/q": 0, "layer_1/q": 16}, sites) == (40_000 + 20_000 + 19_200) / 118_400
    assert step_time([16, 0], sites) == (40_000 + 40_000 + 19_200) / 118_400
    assert step_time([0, 0], sites) == 40_000 / 118_400
    slower = TimeModel(forward=2, backward=4, own=60)  # 40,000 + 40,000 a layer + 12,000 a rank
    assert step_time([0, 8], sites, slower) == (40_000 + 40_000 + 96_000) / (120_000 + 384_000)


def test_half_the_adapters_time_ends_back_propagation_early_and_says_so():
    scores = np.random.default_rng(0).lognormal(size=72)
    plan = allocate(scores, roberta_base(), time_budget=0.65)
    lowest = min(s.layer for s in plan.sites if plan.ranks[s.path])
    line = f"Predicted step time {plan.time:.2f} of uniform rank 16; back-propagation ends at layer {lowest}"
    assert lowest >= 8 and line + "." in plan.status and plan.table().splitlines()[-1] == line
    free = allocate(scores, roberta_base())
    assert free.time is None and "step time" not in free.status + free.table()
    assert free.objective > plan.objective
    # with room for uniform rank 16, the time budget changes nothing
    assert allocate(scores, roberta_base(), time_budget=1).objective == free.objective


def test_calibrated_times_change_the_plan():
    scores = np.random.default_rng(0).lognormal(size=72)
    model = TimeModel(forward=20, backward=42, own=200)
    plan = allocate(scores, roberta_base(), time_budget=0.5, time_model=model)
    whole = flops([16] * 72, plan.sites, 20, 42, 200)
    assert plan.time == flops(plan.ranks.values(), plan.sites, 20, 42, 200) / whole <= 0.5
    with pytest.raises(UsageError, match="raise it to 0.51"):  # FLOPs alone do not go that low
        allocate(scores, roberta_base(), time_budget=0.5)


@pytest.mark.parametrize("solver", ("auto", *EXACT))
def test_of_equal_plans_back_propagation_ends_first(solver):
    sites = row_of(range(5)) + row_of(range(5), "k")
    plan = allocate([1.0] * 10, sites, 200 * 4 * 3, ranks=[0, 4], time_budget=1.0, solver=solver)
    ranks = list(plan.ranks.values())
    assert sorted((ranks[:5], ranks[5:])) == [[0, 0, 0, 4, 0], [0, 0, 0, 4, 4]]
    # exchangeable sites above the end: the earlier first
    sites = (*row_of(range(4)), Site("layer_1/k", 100, 100, 1, "k"))
    plan = allocate([1, 1, 1, 1, 9.0], sites, 200 * 4 * 2, ranks=[0, 4], time_budget=1.0, solver=solver)
    assert plan.ranks == {"layer_0/q": 0, "layer_1/q": 4, "layer_2/q": 0, "layer_3/q": 0, "layer_1/k": 4}


def test_a_type_of_the_bottom_layer_keeps_its_rank_though_it_costs_the_time_of_all():
    sites = (Site("layer_0/k", 100, 100, 0, "k"), *row_of(range(1, 4)))
    plan = allocate([1e-6, 1, 1, 1], sites, 10**6, ranks=[0, 8], time_budget=0.9)
    assert plan.ranks["layer_0/k"] == 8
    with pytest.raises(UsageError, match="back-propagation down to layer 0"):
        allocate([1e-6, 1, 1, 1], sites, 10**6, ranks=[0, 8], time_budget=0.6)


SITES = row_of([0, 1])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"time_budget": 0}, "time budget 0 cannot be used"),
        ({"time_budget": 1.01}, "time budget 1.01"),
        ({"time_budget": math.nan}, "time budget nan"),
        ({"time_budget": "half"}, "time budget 'half'"),
        ({"time_budget": 0.5}, r"forward pass alone takes 0\.3378, .* layer 1, 0\.5169; raise it to 0\.5169 or more"),
        ({"time_budget": 0.9, "ranks": [0, 64]}, "allow smaller ranks"),
        ({"time_budget": 0.9, "budget": 100}, "takes at least 200"),
    ],
)
def test_wrong_time_budget_is_one_clear_line(kwargs, message):
    with pytest.raises(UsageError, match=message) as caught:
        allocate([1.0, 1.0], SITES, kwargs.pop("budget", 10**5), **kwargs)
    assert "\n" not in str(caught.value)


def test_wrong_ranks_and_times_are_one_clear_line():
    with pytest.raises(UsageError, match="no rank for layer_1/q"):
        step_time({"layer_0/q": 1}, SITES)
    with pytest.raises(UsageError, match="rank -1 at layer_1/q"):
        step_time([1, -1], SITES)
    with pytest.raises(UsageError, match="rank 1.5 at layer_0/q"):
        step_time(np.array([1.5, 1]), SITES)
    with pytest.raises(UsageError, match="own time 0"):
        TimeModel(2, 2, 0)
    with pytest.raises(UsageError, match="backward time 0.5"):
        TimeModel(2, 0.5, 6)  # pyright: ignore[reportArgumentType]


def test_an_answer_that_takes_too_long_is_a_fault():
    problem = rank_problem([1.0, 1.0], SITES, 10**5, [0, 8], clock=make_clock(SITES, 0.6))
    assert problem.fault(np.array([0, 1])) is None
    assert "over the limit of 0.6" in str(problem.fault(np.array([1, 0])))


def test_a_better_plan_in_another_stage_than_the_relaxation_chose_is_found():
    elsewhere = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        sites = tuple(Site(f"layer_{k}/{t}", 64, 64, k, t) for k in range(8) for t in "qk")
        clock = make_clock(sites, rng.uniform(0.4, 0.8))
        problem = rank_problem(rng.lognormal(size=16), sites, int(rng.uniform(800, 8000)), [0, 3, 7], clock=clock)
        relaxed, best = relax(problem), knapsack(problem)
        assert best is not None and problem.worth(best) <= relaxed.bound * (1 + 1e-12)
        if problem.worth(best) > problem.worth(relaxed.choice) * (1 + 1e-9):
            reach = [min(clock.layer[choice > 0]) for choice in (best, relaxed.choice)]
            elsewhere += reach[0] != reach[1]
            assert relaxed.open[np.arange(16), best].all()
            assert any(stage.fault(best) is None for stage in relaxed.stages)
            for solver in ("CBC", "HIGHS"):
                assert solve(problem, solver=solver).objective == pytest.approx(problem.scale * problem.worth(best))
    assert elsewhere >= 5


def test_the_measured_model_is_near_what_was_measured():
    """Step times of RoBERTa-base size with rank 16 in the top layers alone, relative to all twelve."""
    sites = roberta_base()
    for top, measured in ((2, 0.42), (3, 0.47), (6, 0.67), (9, 0.81)):
        ranks = [16 if site.layer >= 12 - top else 0 for site in sites]
        assert step_time(ranks, sites, TimeModel(4, 9, 40)) == pytest.approx(measured, abs=0.03)
