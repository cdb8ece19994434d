"""Worked numbers of the specification, each computed here from its formula in NumPy, and by the library."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from jaxprune.allocation import prune_problem, solve
from jaxprune.methods.sora import shrink
from jaxprune.schedules import bezier, cubic, event_steps
from jaxprune.scores import redundancy
from jaxprune.scores.surgeon import Factor, damped_inverse, surgery_score
from jaxprune.sites import site_at


def de_casteljau(t):
    """Return the point of the curve with control values 0, .2, .8, 1 at t, by repeated interpolation."""
    points = [0.0, 0.2, 0.8, 1.0]
    while len(points) > 1:
        points = [(1 - t) * a + t * b for a, b in itertools.pairwise(points)]
    return points[0]


def test_bezier_and_budgets():
    curve = [de_casteljau(n / 10) for n in range(11)]
    np.testing.assert_allclose(
        curve, [0, 0.0712, 0.1616, 0.2664, 0.3808, 0.5, 0.6192, 0.7336, 0.8384, 0.9288, 1], atol=1e-12
    )
    np.testing.assert_allclose([bezier()(n / 10) for n in range(11)], curve, atol=1e-12)
    # RoBERTa-base costs 165,888 parameters a rank; the first allocation under 1,263,000 takes 1,262,592.
    budgets = [math.floor(1_262_592 * (1 - 0.6 * share)) for share in curve[1:]]
    assert budgets == [1208654, 1140171, 1060779, 974114, 883814, 793513, 706849, 627457, 558974, 505036]


@pytest.mark.parametrize(
    ("rows", "epochs", "warmup", "printed"),
    [(2490, 63, 0.111, (942, 1339, 1736, 4516)), (8551, 67, 0.071, (2790, 4307, 5823, 16439))],
)
def test_steps_of_events(rows, epochs, warmup, printed):
    total = epochs * math.ceil(rows / 32)
    delay = int(warmup * total)
    steps = tuple(int(delay + n * (total - delay) / 11) for n in range(1, 11))
    assert (*steps[:3], steps[-1]) == printed
    assert event_steps(10, total, delay) == jp.dplora(total_steps=total, delay=delay).events == steps


def gains(importance, sides, ranks):
    """Return I (1 - exp(-r / min(d_in, d_out))), equation 2."""
    return [[i * (1 - math.exp(-r / min(side))) for r in ranks] for i, side in zip(importance, sides, strict=True)]


def test_the_gain_saturates_with_the_smaller_side():
    """Of two sites with one importance and one cost, the oblong one gains more from a first rank: its smaller side is shorter."""
    sides = [(8, 8), (12, 4)]
    sites = [site_at(f"layer_{i}/fc", *side) for i, side in enumerate(sides)]
    plan = jp.allocate([1.0, 1.0], sites, 16, ranks=(0, 1), solver="DP")
    assert plan.ranks == {"layer_0/fc": 0, "layer_1/fc": 1}
    assert plan.objective == pytest.approx(1 - math.exp(-1 / 4))


@pytest.mark.parametrize("seed", range(3))
def test_stage_one_is_the_best_by_enumeration(seed):
    """Sides that differ; every plan within the budget is tried by hand."""
    rng, ranks = np.random.default_rng(seed), (0, 1, 2, 4)
    sides, importance = [(4, 12), (12, 4), (6, 6), (3, 9)], rng.uniform(0.5, 4, 4)
    sites = [site_at(f"layer_{i}/{'fqfq'[i]}", *side) for i, side in enumerate(sides)]
    table, best = gains(importance, sides, ranks), (-1.0, ())
    for chosen in itertools.product(range(4), repeat=4):
        cost = sum(ranks[c] * sum(side) for c, side in zip(chosen, sides, strict=True))
        if cost <= 70 and any(chosen[0::2]) and any(chosen[1::2]):
            best = max(best, (sum(row[c] for row, c in zip(table, chosen, strict=True)), chosen))
    plan = jp.allocate(importance, sites, 70, ranks=ranks, solver="DP")
    assert plan.objective == pytest.approx(best[0])
    assert tuple(plan.ranks.values()) == tuple(ranks[c] for c in best[1])


def test_stage_one_and_two_of_the_worked_example():
    """Costs of 2 and 5 a rank and M = 8 stand in the ratio of sites of 8 x 8 and 8 x 32."""
    importance, sides = (4, 1, 2, 0.5), [(8, 8), (8, 32)] * 2
    sites = [site_at(f"layer_{i // 2}/{'qf'[i % 2]}", *side) for i, side in enumerate(sides)]
    plan = jp.allocate(importance, sites, 20 * 8, ranks=(0, 1, 2, 4), solver="DP")
    assert tuple(plan.ranks.values()) == (4, 1, 2, 0)
    by_hand = sum(i * (1 - math.exp(-r / 8)) for i, r in zip(importance, (4, 1, 2, 0), strict=True))
    assert plan.objective == pytest.approx(by_hand) and by_hand == pytest.approx(2.1337789, abs=1e-7)

    now, after = (4, 2, 4, 1), (4, 1, 0, 0)
    problem = prune_problem(importance, sites, now, 14 * 8, ranks=(0, 1, 2, 4), momentum=0.1, stability=0.05)
    plan = solve(problem, solver="DP")
    lost = [(c - r) / c + 0.1 * abs(r - c) - 0.05 * (r == c) for c, r in zip(now, after, strict=True)]
    assert tuple(plan.ranks.values()) == after
    assert plan.objective == pytest.approx(np.dot(importance, lost)) and np.dot(importance, lost) == pytest.approx(3.75)


def test_g2r2():
    x, delta = np.array([[1, 2], [0, 1.0]]), np.array([[0.1, -0.2, 0], [0.3, 0, 0.1]])
    a, b = np.array([[1.0], [2]]), np.array([[0.5, -1, 2]])
    dense = x.T @ delta
    np.testing.assert_allclose(dense, [[0.1, -0.2, 0], [0.5, -0.4, 0.1]])
    grad_a, grad_b = dense @ b.T, a.T @ dense
    np.testing.assert_allclose(grad_a.ravel(), [0.25, 0.85])
    np.testing.assert_allclose(grad_b.ravel(), [1.1, -1, 0.2])
    exact = np.abs(dense * (a @ b)).sum()
    assert exact == pytest.approx(1.95) and (a * grad_a).sum() == pytest.approx(1.95)
    assert 6 / exact == pytest.approx(3.0769, rel=1e-4)
    of_a = np.abs((grad_a @ (1 / b)) * (a @ b)).sum()
    of_b = np.abs(((1 / a) @ grad_b) * (a @ b)).sum()
    assert (of_a, of_b) == (pytest.approx(5.85), pytest.approx(3.90))
    given = [jnp.asarray(v, jnp.float32) for v in (a, b, grad_a, grad_b)]
    assert redundancy.sensitivity(*(jnp.asarray(v, jnp.float32) for v in (x, delta, a, b))) == pytest.approx(exact)
    assert redundancy.as_written_a(*given) == pytest.approx(of_a, rel=1e-5)
    assert redundancy.as_written_b(*given) == pytest.approx(of_b, rel=1e-5)
    left = [0.2 + 0.8 * (1 - n / 3) ** 3 for n in range(4)]
    np.testing.assert_allclose(left, [1, 0.437, 0.230, 0.2], atol=5e-4)
    np.testing.assert_allclose([cubic(n, 0, 3, 1.0, 0.2) for n in range(4)], left)
    llama = [cubic(n, 4000, 8000, 1.0, 0.2) for n in (4000, 5000, 6000, 7000, 8000)]
    np.testing.assert_allclose(llama, [1, 0.538, 0.300, 0.213, 0.200], atol=1e-3)


def released_score(value, grad, damping, curvature=1.0):
    """Return 1/2 |(F - H^-1 g)_j|^2 / [H^-1]_jj with H = curvature g g^T + damping I, in float64."""
    inverse = np.linalg.inv(curvature * grad @ grad.T + damping * np.eye(len(grad)))
    return 0.5 * np.square(value - inverse @ grad).sum(1) / np.diag(inverse)


def test_prunedloras_worked_example():
    value, grad = np.array([[1, 0], [2, 1], [0, 1.0]]), np.array([[0.5, 0], [0, 0.5], [0.2, 0.1]])
    by_hand = released_score(value, grad, 0.1)
    np.testing.assert_allclose(by_hand, [0.012143, 0.732143, 0.046429], atol=1e-6)
    inverse = np.linalg.inv(grad @ grad.T + 0.1 * np.eye(3))
    np.testing.assert_allclose(np.diag(inverse), [3.571429, 3.035714, 8.75], rtol=1e-6)
    gram, norm = jnp.asarray(grad @ grad.T, jnp.float32), jnp.asarray(np.square(value).sum(1), jnp.float32)
    known = Factor(gram, norm, jnp.asarray(grad @ value.T, jnp.float32))
    found = surgery_score(damped_inverse(gram, jnp.ones(3), 0.0, 0.1), known)
    np.testing.assert_allclose(found, by_hand, rtol=1e-3)


def test_prunedloras_faithful_mode_removes_what_the_released_score_says():
    """Sixty sites of random values and gradients: H is the last step's g g^T plus 1e-6, with the first-order term."""
    rng, rank, sites = np.random.default_rng(0), 6, [site_at(f"layer_{i}/fc", 9, 8) for i in range(60)]
    method = jp.prunedlora(rank=rank, target=4, interval=2, remove=2, score="paper_score")
    adapters, masks = jp.init_lora(jax.random.key(0), sites, dict.fromkeys((s.path for s in sites), rank))

    def drawn(scale):
        return {
            path: jp.Lora(*(jnp.asarray(scale * rng.normal(size=leaf.shape), jnp.float32) for leaf in (x.a, x.b)), 1.0)
            for path, x in adapters.items()
        }

    values, state = drawn(0.1), method.init(adapters, masks)
    observe = jax.jit(method.observe)
    for step in (1, 2):  # only the last step counts
        # Small enough for the damping to matter.
        grads = drawn(1e-3)
        state = observe(state, values, masks, grads, step, None)
    _, decision = method.decide(state, values, masks, 2, None)

    def removed(path, **other):
        a, grad_a, b, grad_b = (np.asarray(getattr(t[path], n), np.float64) for n in "ab" for t in (values, grads))
        score = released_score(a.T, grad_a.T, **other) + released_score(b, grad_b, **other)
        return set(np.argsort(score)[:2].tolist())

    gone = {path: set(np.flatnonzero(np.asarray(mask) == 0).tolist()) for path, mask in decision.masks.items()}
    assert gone == {site.path: removed(site.path, damping=1e-6) for site in sites}
    # What would be another curvature, or another damping, removes something else at many of them.
    for other in (dict(damping=1e-6, curvature=1 / 8), dict(damping=1e-5), dict(damping=0.0)):
        assert sum(gone[site.path] != removed(site.path, **other) for site in sites) > 3, other


def test_sora():
    gates = np.array([1.2, 1.9, 2.1, 3])
    soft = np.sign(gates) * np.maximum(np.abs(gates) - 1, 0)
    released = gates.copy()
    released[released > 1] -= 1
    released[(released > -1) & (released < 1)] = 0
    np.testing.assert_allclose(soft, [0.2, 0.9, 1.1, 2])
    np.testing.assert_allclose(released, [0, 0, 1.1, 2])
    np.testing.assert_allclose(shrink(jnp.asarray(gates), 1.0, "soft"), soft, rtol=1e-5)
    np.testing.assert_allclose(shrink(jnp.asarray(gates), 1.0, "released"), released, rtol=1e-5)
    assert float(shrink(jnp.float32(1.0), 1.0, "released")) == 1.0


def test_what_a_rank_costs():
    """RoBERTa-base 165,888 parameters a rank and Llama-3-8B 2,621,440: at rank 8, 1.33M and 21.0M."""
    roberta = [(768, 768)] * 4 + [(768, 3072), (3072, 768)]
    llama = [(4096, 4096), (4096, 1024), (4096, 1024), (4096, 4096), *[(4096, 14336)] * 2, (14336, 4096)]
    for layers, sides, cost in ((12, roberta, 165_888), (32, llama, 2_621_440)):
        sites = [site_at(f"layer_{i}/{n}", *side) for i in range(layers) for n, side in enumerate(sides)]
        assert layers * sum(map(sum, sides)) == cost == sum(site.cost(1) for site in sites)
        assert jp.uniform_plan(sites, 8).cost == 8 * cost
