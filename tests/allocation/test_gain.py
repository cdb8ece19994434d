"""Measured gains: the tables by their formulas, plans against brute force, and shares of energy."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxprune.allocation import allocate, captured_energy, rank_problem
from jaxprune.errors import UsageError
from tests.allocation.test_allocate import EXACT, brute_force, sites_of

SITES = sites_of([(4, 6), (8, 3), (5, 5)], "qfq")
SPECTRA = {"layer_0/q": [3.0, 1.0], "layer_1/f": [1.0, 2.0, 0.5, 0.0], "layer_2/q": [0.1]}
SCORES = [1.0, 4.0, 2.0]


def test_tables_by_their_formulas():
    energy = rank_problem(None, SITES, 10**4, range(5), gain="energy", spectra=SPECTRA)
    np.testing.assert_allclose(energy.scale * energy.value, [
        [0, 9, 10, 10, 10], [0, 4, 5, 5.25, 5.25], [0, 0.01, 0.01, 0.01, 0.01],
    ])  # fmt: skip
    effective = rank_problem(SCORES, SITES, 10**4, range(5), gain="effective", spectra=SPECTRA)
    shares = [[0.9, 0.1], [4 / 5.25, 1 / 5.25, 0.25 / 5.25], [1.0]]
    for row, score, share in zip(effective.value, SCORES, shares, strict=True):
        rank = math.exp(-sum(p * math.log(p) for p in share))
        expected = [score * (1 - math.exp(-r / rank)) for r in range(5)]
        np.testing.assert_allclose(effective.scale * row, expected, rtol=1e-12)
    # Of n equal singular values the effective rank is n: at n = min(d_in, d_out) that is the paper's gain.
    flat = {s.path: [2.0] * min(s.d_in, s.d_out) for s in SITES}
    same = rank_problem(SCORES, SITES, 10**4, range(5), gain="effective", spectra=flat)
    np.testing.assert_allclose(same.value, rank_problem(SCORES, SITES, 10**4, range(5)).value, rtol=1e-12)


@st.composite
def measured(draw):
    count = draw(st.integers(2, 4))
    dims = st.sampled_from([3, 4, 7, 16])
    shapes = draw(st.lists(st.tuples(dims, dims), min_size=count, max_size=count))
    types = draw(st.lists(st.sampled_from("qf"), min_size=count, max_size=count))
    sites = sites_of(shapes, types)
    value = st.one_of(st.just(0.0), st.floats(1e-6, 1e3))
    spectra = {s.path: draw(st.lists(value, min_size=1, max_size=6)) for s in sites}
    spectra[sites[0].path][0] = draw(st.floats(1e-6, 1e3))  # one at least is above 0
    scores = draw(st.lists(st.floats(1e-6, 1e3), min_size=count, max_size=count))
    gain = draw(st.sampled_from(["effective", "energy"]))
    roomy = rank_problem(scores, sites, 10**6, range(5), gain=gain, spectra=spectra)
    return scores, sites, spectra, gain, draw(st.integers(roomy.smallest_budget(), sum(s.cost(4) for s in sites)))


@settings(max_examples=50, deadline=None)
@given(measured())
def test_gains_and_plans(case):
    scores, sites, spectra, gain, budget = case
    problem = rank_problem(scores, sites, budget, range(5), gain=gain, spectra=spectra)
    steps = np.diff(problem.value, axis=1)
    assert (problem.value[:, 0] == 0).all() and (steps >= 0).all() and (np.diff(steps, axis=1) <= 1e-12).all()
    plan = allocate(scores, sites, budget, ranks=range(5), gain=gain, spectra=spectra, solver="DP")
    assert plan.objective == pytest.approx(problem.scale * brute_force(problem), rel=1e-9)
    if gain == "energy":
        whole = math.fsum(s**2 for spectrum in spectra.values() for s in spectrum)
        assert plan.objective <= whole * (1 + 1e-12)
        assert captured_energy(plan.ranks, spectra) == pytest.approx(plan.objective / whole, rel=1e-9)
        # No other ranks within the budget that keep every type capture more.
        best = max(
            captured_energy(dict(zip(plan.ranks, ranks, strict=True)), spectra)
            for ranks in itertools.product(range(5), repeat=len(sites))
            if sum(s.cost(r) for s, r in zip(sites, ranks, strict=True)) <= budget
            and {s.type for s, r in zip(sites, ranks, strict=True) if r} == {s.type for s in sites}
        )
        assert captured_energy(plan.ranks, spectra) == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize("solver", EXACT)
@pytest.mark.parametrize("gain", ["effective", "energy"])
def test_every_solver_reads_the_table(gain, solver):
    rng = np.random.default_rng(2)
    sites = sites_of([(8, 8), (8, 16)] * 4, "qf" * 4)
    spectra = {s.path: np.sort(rng.lognormal(sigma=2, size=8))[::-1] for s in sites}
    kept = dict(gain=gain, spectra=spectra, ranks=range(5))
    plans = [allocate([1.0] * 8, sites, 300, solver=name, **kept) for name in (solver, "DP")]
    assert plans[0].gap == 0 and plans[0].objective == pytest.approx(plans[1].objective, rel=1e-9)


def test_shares_of_energy():
    assert captured_energy({"layer_0/q": 1, "layer_1/f": 2, "layer_2/q": 0}, SPECTRA) == pytest.approx(14 / 15.26)
    assert captured_energy({}, SPECTRA) == 0.0 and captured_energy(dict.fromkeys(SPECTRA, 9), SPECTRA) == 1.0


WRONG = {
    "no spectra": (dict(gain="energy"), "spectra None cannot be used: expected what gradient_spectra returns"),
    "a list": (dict(gain="energy", spectra=[[1.0]] * 3), "spectra .* cannot be used"),
    "a site without": (dict(gain="effective", spectra={"layer_0/q": [1.0]}), "no spectrum for layer_1/f, layer_2/q"),
    "spectra for nothing": (dict(spectra=SPECTRA), "spectra go with gain 'effective' or 'energy'"),
    "a gain misspelt": (dict(gain="enegry", spectra=SPECTRA), "gain 'enegry' is not known; .*nearest: energy"),
    "a number": (
        dict(gain="energy", spectra={**SPECTRA, "layer_0/q": 3.0}),
        "spectrum at 'layer_0/q' is 3.0; expected a list",
    ),
    "nothing": (dict(gain="energy", spectra={**SPECTRA, "layer_0/q": []}), "expected a list of singular values"),
    "text": (dict(gain="energy", spectra={**SPECTRA, "layer_0/q": ["a"]}), "expected a list of singular values"),
    "negative": (dict(gain="energy", spectra={**SPECTRA, "layer_0/q": [-1.0]}), "none negative, .* at layer_0/q$"),
    "NaN": (dict(gain="energy", spectra={**SPECTRA, "layer_0/q": [1, math.nan]}), "must be finite"),
    "too large": (dict(gain="energy", spectra={**SPECTRA, "layer_0/q": [1e200]}), "must be finite"),
    "all zero": (dict(gain="energy", spectra=dict.fromkeys(SPECTRA, [0.0])), "no importance is finite and above 0"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_input(kind):
    given, message = WRONG[kind]
    with pytest.raises(UsageError, match=message) as caught:
        allocate(SCORES, SITES, 500, **given)
    assert "\n" not in str(caught.value)


def test_wrong_input_to_shares():
    with pytest.raises(UsageError, match="every singular value is 0"):
        captured_energy({}, {"a": [0.0]})
    with pytest.raises(UsageError, match="ranks name 1 paths that are not sites, first 'b'"):
        captured_energy({"b": 1}, {"a": [1.0]})
    with pytest.raises(UsageError, match="rank -1 at a cannot be used"):
        captured_energy({"a": -1}, {"a": [1.0]})
    with pytest.raises(UsageError, match="scores None cannot be used"):
        allocate(None, SITES, 500)
