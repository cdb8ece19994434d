"""Allocation against brute force, the paper's small example, and what is asked of wrong input."""

import itertools
import math
import re
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.bench.allocate import instance, llama_3_8b, roberta_base
from jaxprune.allocation import (
    SOLVERS,
    Problem,
    allocate,
    default_budget,
    knapsack,
    rank_problem,
    relax,
    solve,
    uniform_plan,
)
from jaxprune.errors import UsageError
from jaxprune.sites import Site

EXACT = ("CBC", "GLPK_MI", "HIGHS", "DP")


def sites_of(shapes, types):
    named = enumerate(zip(shapes, types, strict=True))
    return tuple(Site(f"layer_{i}/{name}", d_in, d_out, i, name) for i, ((d_in, d_out), name) in named)


def brute_force(problem):
    """Best worth over every combination of ranks, by the definition of the program."""
    best = -math.inf
    for choice in itertools.product(range(len(problem.ranks)), repeat=len(problem.sites)):
        cost = sum(int(problem.cost[i, k]) for i, k in enumerate(choice))
        alive = {s.type for s, k in zip(problem.sites, choice, strict=True) if problem.ranks[k] > 0}
        if cost <= problem.budget and alive == {s.type for s in problem.sites}:
            best = max(best, math.fsum(problem.value[i, k] for i, k in enumerate(choice)))
    return best


@pytest.mark.parametrize("solver", SOLVERS)
def test_small_example_of_the_specification(solver):
    sites = sites_of([(1, 1), (2, 3), (1, 1), (2, 3)], "qfqf")
    ranks = np.array([0, 1, 2, 4])
    gain = np.array([4, 1, 2, 0.5])[:, None] * (1 - np.exp(-ranks / 8))
    plan = solve(Problem(sites, ranks, gain, np.array([2, 5, 2, 5])[:, None] * ranks, 20), solver=solver)
    assert list(plan.ranks.values()) == [4, 1, 2, 0]
    assert plan.objective == pytest.approx(2.1337789, abs=1e-7)
    assert plan.gap == 0 and plan.status.startswith("Optimal") and plan.solver in plan.status
    assert plan.cost == 17 and plan.budget == 20
    assert ("auto" in plan.status) == (solver == "auto")


@pytest.mark.parametrize("solver", EXACT)
def test_pruning_example_of_the_specification(solver):
    """A pruning event: minimise a loss with a bonus for staying, no rank above the present one."""
    sites = sites_of([(1, 1), (2, 3), (1, 1), (2, 3)], "qfqf")
    ranks, now = np.array([0, 1, 2, 4]), np.array([4, 2, 4, 1])[:, None]
    loss = np.array([4, 1, 2, 0.5])[:, None] * ((now - ranks) / now + 0.1 * abs(ranks - now) - 0.05 * (ranks == now))
    value = np.where(ranks <= now, -loss, -np.inf)
    plan = solve(Problem(sites, ranks, value, np.array([2, 5, 2, 5])[:, None] * ranks, 14), solver=solver)
    assert list(plan.ranks.values()) == [4, 1, 0, 0]
    assert plan.objective == pytest.approx(-3.75, abs=1e-12) and plan.gap == 0


@pytest.mark.parametrize("solver", EXACT)
@pytest.mark.parametrize("seed", range(6))
def test_general_tables_against_brute_force(solver, seed):
    """Any values (a pruning loss, not concave), forbidden ranks, rank 0 not free, types that bind."""
    rng = np.random.default_rng(seed)
    types = "aabbc" if seed % 2 else "abcde"
    sites = sites_of([(3, 5)] * 5, types)
    ranks = np.array([0, 1, 3, 4])
    cost = np.sort(rng.integers(0, 40, (5, 4)), axis=1)
    value = -rng.random((5, 4)) * (1 + 4 * (ranks > 0))  # a positive rank is mostly bad: the type constraint binds
    value[rng.random((5, 4)) < 0.25] = -np.inf
    value[:, 1] = -rng.random(5)
    roomy = Problem(sites, ranks, value, cost, 10**6)
    for budget in {roomy.smallest_budget(), roomy.smallest_budget() + 17, 10**6}:
        problem = Problem(sites, ranks, value, cost, budget)
        plan = solve(problem, solver=solver)
        assert plan.gap == 0
        assert plan.objective == pytest.approx(brute_force(problem), rel=1e-12)
        assert plan.cost <= budget


@pytest.mark.parametrize("solver", EXACT)
def test_program_that_presolving_alone_settles(solver):
    """GLPK aborts the process on it, unless something is left to choose."""
    sites, no = sites_of([(1, 1)] * 4, "kqkk"), -math.inf
    value = np.array([[0, 0.48, 1.0], [-0.92, 0, no], [0, 0.92, no], [no, 0, no]])
    cost = np.array([[0, 11, 22], [0, 11, 22], [0, 16, 32], [0, 1, 2]])
    problem = Problem(sites, np.array([0, 1, 2]), value, cost, 20)
    plan = solve(problem, solver=solver)
    assert plan.gap == 0 and plan.objective == brute_force(problem)


@pytest.mark.parametrize("solver", EXACT)
def test_every_type_keeps_a_rank_though_it_gains_nothing(solver):
    sites = sites_of([(8, 8)] * 4, "qqff")
    plan = allocate([1.0, 1.0, 0.0, 1e-9], sites, 16 * 5, ranks=[0, 1, 2, 3], solver=solver)
    assert list(plan.ranks.values()) == [2, 2, 0, 1] and plan.cost == 80
    # the budget of one rank for each type
    tight = allocate([1.0, 1.0, 0.0, 1e-9], sites, 16 * 2, ranks=[0, 1, 2, 3], solver=solver)
    assert list(tight.ranks.values()) == [1, 0, 0, 1]


@pytest.mark.parametrize("make", [roberta_base, llama_3_8b])
def test_solvers_agree_at_real_size(make):
    for seed in range(3):
        problem = instance(make(), np.random.default_rng(seed))
        plans = [solve(problem, solver=name, time_limit=10) for name in EXACT]
        proved = [plan for plan in plans if plan.gap == 0]
        assert {"HIGHS", "DP"} <= {plan.solver for plan in proved}
        for plan in proved:
            assert plan.objective == pytest.approx(plans[-1].objective, rel=1e-9)
        for plan in plans:  # from the ranks alone, by the formula
            gain = [
                importance * (1 - math.exp(-plan.ranks[s.path] / min(s.d_in, s.d_out)))
                for s, importance in zip(problem.sites, _importances(problem), strict=True)
            ]
            assert plan.objective == pytest.approx(math.fsum(gain), rel=1e-9)
            assert sum(s.cost(plan.ranks[s.path]) for s in problem.sites) == plan.cost <= plan.budget


def _importances(problem):
    smaller = np.array([min(s.d_in, s.d_out) for s in problem.sites])
    return problem.scale * problem.value[:, -1] / (1 - np.exp(-problem.ranks[-1] / smaller))


@st.composite
def allocations(draw):
    count = draw(st.integers(2, 7))
    dims = st.sampled_from([3, 4, 7, 8, 16, 33])
    shapes = draw(st.lists(st.tuples(dims, dims), min_size=count, max_size=count))
    types = draw(st.lists(st.sampled_from("qkf"), min_size=count, max_size=count))
    scores = draw(st.lists(st.floats(1e-6, 1e3), min_size=count, max_size=count))
    sites = sites_of(shapes, types)
    least = rank_problem(scores, sites, 10**6, range(6)).smallest_budget()
    return scores, sites, draw(st.integers(least, sum(s.cost(5) for s in sites)))


@settings(max_examples=60, deadline=None)
@given(allocations(), st.sampled_from([2.0**-40, 0.25, 2.0**20]))
def test_properties_of_every_plan(case, factor):
    scores, sites, budget = case
    plan = allocate(scores, sites, budget, ranks=range(6), solver="DP")
    assert sum(s.cost(plan.ranks[s.path]) for s in sites) == plan.cost <= budget
    assert {s.type for s in sites if plan.ranks[s.path] > 0} == {s.type for s in sites}
    scaled = allocate([factor * x for x in scores], sites, budget, ranks=range(6), solver="DP")
    assert scaled.ranks == plan.ranks
    assert scaled.objective == pytest.approx(factor * plan.objective, rel=1e-12)
    highs = allocate(scores, sites, budget, ranks=range(6), solver="HIGHS")
    assert highs.gap == 0 and highs.objective == pytest.approx(plan.objective, rel=1e-9)


@settings(max_examples=40, deadline=None)
@given(allocations())
def test_relaxation_brackets_the_best_plan(case):
    scores, sites, budget = case
    problem = rank_problem(scores, sites, budget, range(4))
    relaxed, best = relax(problem), knapsack(problem)
    assert best is not None and problem.fault(relaxed.choice) is None
    assert problem.worth(relaxed.choice) <= problem.worth(best) * (1 + 1e-12)
    assert problem.worth(best) <= relaxed.bound * (1 + 1e-12)
    if problem.worth(best) > problem.worth(relaxed.choice) * (1 + 1e-9):  # the better plan was not closed off
        assert relaxed.open[np.arange(len(sites)), best].all()


@pytest.mark.parametrize("solver", EXACT)
def test_interchangeable_sites_give_the_earlier_the_larger_rank(solver):
    sites = sites_of([(8, 8)] * 5, "qqqqk")
    shuffled = [sites[i] for i in (3, 4, 1, 0, 2)]
    plan = allocate(dict.fromkeys((s.path for s in sites), 1.0), shuffled, 16 * 7, ranks=[0, 1, 4], solver=solver)
    queries = [plan.ranks[s.path] for s in sites if s.type == "q"]
    assert queries == sorted(queries, reverse=True)
    assert list(plan.ranks) == [s.path for s in shuffled]


@pytest.mark.parametrize("solver", ("auto", *EXACT))
def test_same_input_same_plan(solver):
    problem = instance(roberta_base(), np.random.default_rng(7))
    first, second = (solve(problem, solver=solver) for _ in range(2))
    assert first.ranks == second.ranks and first.objective == second.objective and first.status == second.status


def test_highs_runs_after_an_earlier_solve_with_other_threads():
    import cvxpy

    x = cvxpy.Variable(3, boolean=True)
    cvxpy.Problem(cvxpy.Maximize(np.arange(3) @ x), [np.ones(3) @ x <= 1]).solve(solver="HIGHS")
    assert solve(instance(roberta_base(), np.random.default_rng(0)), solver="HIGHS").gap == 0


def hard_problem():
    """Sixty sites with odd, large, strongly correlated worths and costs: no solver finishes in milliseconds."""
    rng = np.random.default_rng(0)
    sites = sites_of([(2, 3)] * 60, "q" * 60)
    cost = np.sort(rng.integers(10**5, 10**6, (60, 8)) | 1, axis=1)
    cost[:, 0] = 0
    value = cost * (1 + 0.001 * rng.random((60, 8))) / 1e6
    return Problem(sites, np.arange(8), value, cost, int(cost.max(axis=1).sum() * 0.37))


@pytest.mark.parametrize("solver", ("auto", "CBC", "GLPK_MI", "HIGHS"))
@pytest.mark.parametrize("limit", (1e-6, 0.2))
def test_expired_time_limit_returns_a_checked_plan_and_its_gap(solver, limit):
    problem = hard_problem()
    plan = solve(problem, solver=solver, time_limit=limit)
    assert plan.status.startswith("Not proved optimal") and f"time limit of {limit:g} s" in plan.status
    assert 0 < plan.gap < 0.01
    assert plan.seconds < limit + 3
    choice = np.searchsorted(problem.ranks, list(plan.ranks.values()))
    assert problem.fault(choice) is None and plan.cost <= problem.budget


def test_gap_covers_the_true_optimum():
    problem = instance(roberta_base(), np.random.default_rng(3))
    best = solve(problem, solver="DP").objective
    for solver in EXACT:
        early = solve(problem, solver=solver, time_limit=1e-6)
        assert early.objective <= best * (1 + 1e-12) <= early.objective * (1 + early.gap) * (1 + 1e-9)


def test_knapsack_table_too_large_names_bytes_and_other_solvers():
    with pytest.raises(UsageError, match=r"takes [\d,]+ bytes .*'HIGHS', 'CBC' or 'GLPK_MI'"):
        solve(hard_problem(), solver="DP")


def test_infeasible_budget_names_the_smallest_that_fits():
    sites = roberta_base()
    least = 4 * (768 + 768) + 2 * (768 + 3072)
    for solver in EXACT:
        assert allocate([1.0] * 72, sites, least, solver=solver).cost == least
    with pytest.raises(UsageError, match=f"{least:,}"):
        allocate([1.0] * 72, sites, least - 1)
    with pytest.raises(UsageError, match=f"{2 * least:,}"):
        allocate([1.0] * 72, sites, 0, ranks=[0, 2, 4])


TWO = sites_of([(4, 4), (4, 8)], "qk")


@pytest.mark.parametrize(
    ("scores", "sites", "budget", "kwargs", "message"),
    [
        ([1.0], TWO, 99, {}, "got 1 scores for 2 sites"),
        ({"layer_0/q": 1.0}, TWO, 99, {}, "no score for layer_1/k"),
        ([1.0, -1.0], TWO, 99, {}, "negative at layer_1/k"),
        ([0.0, math.nan], TWO, 99, {}, "layer_0/q, layer_1/k"),
        ([math.inf, 0.0], TWO, 99, {}, "no importance is finite and above 0"),
        (["a", "b"], TWO, 99, {}, "must be numbers"),
        ([1.0, 1.0], TWO, -1, {}, "budget -1"),
        ([1.0, 1.0], TWO, 99.5, {}, "budget 99.5"),
        ([1.0, 1.0], TWO, math.nan, {}, "budget nan"),
        ([1.0, 1.0], TWO, 99, {"ranks": [1, 2]}, "0 among them"),
        ([1.0, 1.0], TWO, 99, {"ranks": [0]}, "one above 0"),
        ([1.0, 1.0], TWO, 99, {"ranks": [0, 1, 1]}, "distinct"),
        ([1.0, 1.0], TWO, 99, {"ranks": [0, -1]}, "none negative"),
        ([1.0, 1.0], TWO, 99, {"ranks": [0, 1.5]}, "whole numbers"),
        ([], (), 99, {}, "no site"),
        ([1.0, 1.0], (TWO[0], TWO[0]), 99, {}, "listed twice: layer_0/q"),
        ([1.0, 1.0], TWO, 99, {"solver": "hihgs"}, "nearest names: .*HIGHS"),
        ([1.0, 1.0], TWO, 99, {"time_limit": 0}, "time_limit 0"),
    ],
)
def test_wrong_input_is_one_clear_line(scores, sites, budget, kwargs, message):
    with pytest.raises(UsageError, match=message) as caught:
        allocate(scores, sites, budget, **kwargs)
    assert "\n" not in str(caught.value)


def test_broken_importances_are_replaced_and_said():
    sites = sites_of([(8, 8)] * 4, "qqqq")
    plan = allocate([1.0, math.nan, math.inf, 2.0], sites, 16 * 9, ranks=range(5), solver="DP")
    assert list(plan.ranks.values()) == [1, 0, 4, 4]
    assert "NaN" in plan.status and "layer_1/q" in plan.status and "infinite" in plan.status
    assert len(plan.warnings) == 2


def test_absent_solver_says_how_to_get_it(monkeypatch):
    module = sys.modules["jaxprune.allocation.solving"]
    monkeypatch.setattr(module, "installed", lambda: ("HIGHS",))
    with pytest.raises(UsageError, match=r"CBC is not installed; `pip install cylp`.*HIGHS"):
        allocate([1.0, 1.0], TWO, 99, solver="cbc")
    plan = allocate([1.0, 1.0], TWO, 99)
    assert plan.solver == "HIGHS" and "auto" in plan.status and "CBC is not installed" in plan.status
    monkeypatch.setattr(module, "installed", tuple)
    with pytest.raises(UsageError, match="no mixed-integer solver is installed.*DP"):
        allocate([1.0, 1.0], TWO, 99)


@pytest.mark.parametrize(
    ("rank", "said"), [(3, "spends .* of 40"), (0, "leaves type 'k' without"), (1, "is not the best")]
)
def test_answer_that_breaks_a_constraint_or_is_not_the_best_is_not_believed(monkeypatch, rank, said):
    module = sys.modules["jaxprune.allocation.solving"]
    problem = rank_problem([1.0, 1.0], TWO, 40, range(5))
    lie = module.Answer(np.array([rank, rank]), True, math.inf, None)
    monkeypatch.setattr(module, "milp", lambda *_: lie)
    plan = solve(problem, solver="HIGHS")
    choice = np.array(list(plan.ranks.values()))
    assert re.search(said, plan.status) and problem.fault(choice) is None and plan.status.startswith("Not proved")


def test_defaults_are_half_of_uniform_rank_16():
    sites = roberta_base()
    assert default_budget(sites) == 8 * 165_888  # RoBERTa-base takes 165,888 per unit of rank
    plan = allocate([1.0 + i for i in range(72)], sites)
    assert plan.budget == 1_327_104 and max(plan.ranks.values()) == 16
    uniform = uniform_plan(sites, 8)
    assert uniform.cost == 1_327_104 and set(uniform.ranks.values()) == {8} and "Uniform" in uniform.status
    with pytest.raises(UsageError, match="rank -1"):
        uniform_plan(sites, -1)


@pytest.mark.parametrize("make", [roberta_base, llama_3_8b])
def test_table_has_a_line_per_layer_and_fits(make):
    plan = allocate(np.random.default_rng(0).lognormal(size=len(make())), make(), solver="DP")
    lines = plan.table().splitlines()
    layers = len({s.layer for s in make()})
    assert len(lines) == layers + 5 and max(map(len, lines)) <= 100
    for layer, line in enumerate(lines[2 : 2 + layers]):
        cells = [0 if c == "." else int(c.replace(",", "")) for c in line.split()]
        ranks = [plan.ranks[s.path] for s in plan.sites if s.layer == layer]
        spent = sum(s.cost(plan.ranks[s.path]) for s in plan.sites if s.layer == layer)
        assert cells == [layer, *ranks, sum(ranks), spent]
    assert lines[-2].split()[-1] == f"{plan.cost:,}" and f"{plan.cost:,} of {plan.budget:,}" in lines[-1]


def test_table_shares_cells_and_shortens_names():
    sites = tuple(Site(f"a{i}/b{j}", 2, 2, i, "q") for i, n in ((0, 2), (1, 3), (2, 1)) for j in range(n))
    plan = uniform_plan(sites, 4)
    lines = [line.split() for line in plan.table().splitlines()]
    assert lines[2][1] == "4+4" and " ".join(lines[3][1:3]) == "sum 12" and lines[4][1] == "4"
    wide = tuple(Site(f"x/{'t' * 20}{i}", 2, 2, 0, f"{i:02}" + "t" * 20) for i in range(10))
    assert max(map(len, uniform_plan(wide, 1).table().splitlines())) <= 100
    assert uniform_plan(wide, 0).table().splitlines()[2].split() == ["0", *["."] * 12]


def test_solvers_print_nothing():
    code = (
        "import numpy as np\nimport jaxprune as jp\nfrom jaxprune.allocation import SOLVERS\nfrom jaxprune.sites import Site\n"
        "sites = [Site(f'layer_{i}/{t}', 40 + 7 * i, 64, i, t) for i in range(12) for t in 'qv']\n"
        "scores = np.random.default_rng(0).lognormal(size=24)\n"
        "for name in SOLVERS:\n    jp.allocate(scores, sites, solver=name)\nprint('mine')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "mine\n", "")


def test_a_solver_that_gives_up_early_says_after_how_long(monkeypatch):
    module = sys.modules["jaxprune.allocation.solving"]

    def gives_up(problem, relaxed, solver, seconds):
        time.sleep(0.2)
        return module.Answer(None, False, math.inf, "returned no solution")

    monkeypatch.setattr(module, "milp", gives_up)
    sites = [Site(f"layer_{i}/q", 64 + 8 * i, 64, i, "q") for i in range(6)]
    scores = [3.0, 1.0, 4.0, 1.5, 5.0, 9.0]
    status = allocate(scores, sites, 3000, solver="CBC", time_limit=60).status
    assert re.search(r"CBC returned no solution after 0\.\d+ s, so this is the plan of the", status), status
    assert "limit" not in status
    status = allocate(scores, sites, 3000, solver="CBC", time_limit=0.1).status
    assert "CBC returned no solution at the time limit of 0.1 s, so" in status
