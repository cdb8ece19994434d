"""G2R2: numbers worked out by hand, exact S against dense gradients, and what pruning does to modules."""

import functools
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp
from jaxprune.methods.g2r2 import _averaged as averaged
from jaxprune.methods.g2r2 import _corrected as corrected
from jaxprune.schedules import cubic
from jaxprune.scores import redundancy
from jaxprune.sites import flatten, layer_of, split
from tests.tower import FORMS, sites_of, tower

# x, delta, A and B of the worked example; G = x^T delta, with s = 1.
X = jnp.array([[1.0, 2], [0, 1]])
DELTA = jnp.array([[0.1, -0.2, 0], [0.3, 0, 0.1]])
A = jnp.array([[1.0], [2]])
B = jnp.array([[0.5, -1, 2]])
DA = jnp.array([[0.25], [0.85]])
DB = jnp.array([[1.1, -1, 0.2]])


def loss_fn(apply, batch, key):
    return jnp.mean(jnp.square(apply(batch["x"]) - batch["y"]))


def with_key(apply, batch, key):
    """The same loss of a model whose adapters drop out."""
    return loss_fn(lambda x: apply(x, rngs={"dropout": key}), batch, key)


@functools.lru_cache
def setting(form="plain", accumulate=1, loss_fn=loss_fn, **settings):
    """Return everything for a run of G2R2 on a tower."""
    model, params, x = tower(form)
    batch = {"x": x, "y": jnp.sin(jnp.arange(8.0)).reshape(4, 2)}
    if accumulate > 1:
        batch = jax.tree.map(lambda leaf: leaf.reshape(accumulate, -1, *leaf.shape[1:]), batch)
    method = jp.g2r2(**{"rank": 3, "warmup": 4, "progressive": 4, "interval": 1, **settings})
    sites, forward, optimizer = sites_of(form), jp.attach(model), optax.adam(1e-2)
    context = jp.Context(jax.random.key(3), params, sites, forward, loss_fn)
    start = method.start(context)
    state = jp.init_state(jax.random.key(4), start.adapters, start.masks, optimizer, method)
    step = jp.make_step(forward, loss_fn, optimizer, method, accumulate=accumulate, donate=False)
    return types.SimpleNamespace(**locals())


def run(s, steps, state=None):
    state = s.state if state is None else state
    decisions = {}
    for _ in range(steps):
        state, _ = s.step(s.params, state, s.batch)
        state, decisions[int(state.step)] = jp.prune(state, s.method, s.optimizer, s.context)
    return state, {number: decision for number, decision in decisions.items() if decision}


def dense_sensitivities(s, adapters, batch):
    """Return sum |G o AB| of every module in float64, G from the dense gradients of merged kernels, G_W = G / s."""
    masks = {path: jnp.ones(a.rank) for path, a in adapters.items()}
    merged = jp.merge(s.params, adapters, masks)
    plain = lambda params: loss_fn(lambda x: s.model.apply({"params": params}, x), batch, None)  # noqa: E731
    gradient = flatten(jax.jit(jax.grad(plain))(merged))
    found = {}
    for path, lora in adapters.items():
        product = np.asarray(lora.a, np.float64) @ np.asarray(lora.b, np.float64)
        module, index = split(path)
        dense = lora.scale * np.asarray(layer_of(gradient[module + "/kernel"], index), np.float64)
        found[path] = np.abs(dense * product).sum()
    return found


def test_the_worked_example():
    np.testing.assert_allclose(X.T @ DELTA, [[0.1, -0.2, 0], [0.5, -0.4, 0.1]], rtol=1e-6)
    np.testing.assert_allclose(X.T @ DELTA @ B.T, DA, rtol=1e-6)
    np.testing.assert_allclose(A.T @ (X.T @ DELTA), DB, rtol=1e-6)
    assert redundancy.sensitivity(X, DELTA, A, B) == pytest.approx(1.95)
    assert 2 * 3 / redundancy.sensitivity(X, DELTA, A, B) == pytest.approx(3.0769, rel=1e-4)
    assert redundancy.as_written_a(A, B, DA, DB) == pytest.approx(5.85)
    assert redundancy.as_written_b(A, B, DA, DB) == pytest.approx(3.90)
    assert redundancy.free(A, B, DA, DB) == pytest.approx(1.95)
    norm = np.linalg.norm
    assert redundancy.bound(X, DELTA, A, B) == pytest.approx(norm(X.T @ DELTA) * norm(A @ B))
    # At r = 1 the two sides are k and d times the Taylor scores of single factors, whose product is the ablation's.
    assert redundancy.as_written_a(A, B, DA, DB) == pytest.approx(3 * np.abs(A * DA).sum())
    assert redundancy.as_written_b(A, B, DA, DB) == pytest.approx(2 * np.abs(B * DB).sum())
    product = (2 / np.abs(A * DA).sum()) * (3 / np.abs(B * DB).sum())
    assert 6 / redundancy.factors(A, B, DA, DB) == pytest.approx(product)


def test_the_schedule():
    assert [cubic(t, 0, 3, 1, 0.2) for t in range(4)] == pytest.approx([1, 0.437, 0.230, 0.2], abs=5e-4)
    llama = [cubic(t, 4000, 8000, 1, 0.2) for t in range(4000, 8001, 1000)]
    assert llama == pytest.approx([1, 0.538, 0.300, 0.213, 0.200], abs=5e-4)


def test_the_tangent_gradient_is_the_projection():
    rng = np.random.default_rng(0)
    a, b, g = (rng.normal(size=shape) for shape in ((7, 3), (3, 5), (7, 5)))
    on_a = a @ np.linalg.pinv(a)
    on_b = np.linalg.pinv(b) @ b
    projected = on_a @ g + g @ on_b - on_a @ g @ on_b
    assert (projected * (a @ b)).sum() == pytest.approx((g * (a @ b)).sum())
    given = [jnp.asarray(v, jnp.float32) for v in (a, b, g @ b.T, a.T @ g)]
    assert redundancy.tangent(*given) == pytest.approx(np.abs(projected * (a @ b)).sum(), rel=1e-4)


@pytest.mark.parametrize("rows", [5, 512, 513, 1500])
def test_blocks_of_rows_add_up(rows):
    rng = np.random.default_rng(rows)
    x, delta, a, b = (rng.normal(size=shape) for shape in ((4, rows), (4, 3), (rows, 2), (2, 3)))
    expected = np.abs((x.T @ delta) * (a @ b)).sum()
    assert redundancy.sensitivity(*map(jnp.asarray, (x, delta, a, b))) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_exact_equals_dense_gradients(form):
    """What the backward pass reduced is what the dense gradient of the product gives, and training is left alone."""
    s = setting(form, warmup=50, progressive=1, beta1=0.0)
    state = s.state
    for _ in range(3):
        before = state
        state, _ = s.step(s.params, state, s.batch)
    for path, expected in dense_sensitivities(s, before.adapters, s.batch).items():
        np.testing.assert_allclose(state.method_state.sites[path].sensitivity, expected, rtol=2e-4)
        entries = before.adapters[path].a.shape[0] * before.adapters[path].b.shape[1]
        np.testing.assert_allclose(state.method_state.sites[path].smooth, entries / expected, rtol=2e-4)
    if form not in ("plain", "scan_of_remat"):
        return
    plain = jp.make_step(s.forward, loss_fn, s.optimizer, donate=False)
    other, _ = plain(s.params, before._replace(method_state=()), s.batch)
    for left, right in zip(jax.tree.leaves(state.adapters), jax.tree.leaves(other.adapters), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-5, atol=1e-7)


def test_exact_in_a_plain_function():
    """A merged kernel has a dense gradient anyway; it gives the same S."""
    s = setting("scan", warmup=50, progressive=1, beta1=0.0)
    function = jp.attach_function(lambda params, x: s.model.apply({"params": params}, x))
    step = jp.make_step(function, loss_fn, s.optimizer, s.method, donate=False)
    state = other = s.state
    for _ in range(3):
        state, other = s.step(s.params, state, s.batch)[0], step(s.params, other, s.batch)[0]
    for path, known in state.method_state.sites.items():
        np.testing.assert_allclose(other.method_state.sites[path].sensitivity, known.sensitivity, rtol=1e-3)


def test_accumulation_averages_microbatches():
    s = setting(accumulate=2, warmup=50, progressive=1, beta1=0.0)
    state, _ = s.step(s.params, s.state, s.batch)
    after, _ = s.step(s.params, state, s.batch)
    parts = [dense_sensitivities(s, state.adapters, jax.tree.map(lambda v: v[i], s.batch)) for i in range(2)]  # noqa: B023
    for path, known in after.method_state.sites.items():
        np.testing.assert_allclose(known.sensitivity, np.mean([part[path] for part in parts], axis=0), rtol=2e-4)


def test_dropout_is_measured_as_it_fell():
    """|<A, dA>| = |<G, AB>| never exceeds S; with another dropout pattern than the gradients' it would at some site."""
    exact, below = (
        run(setting(loss_fn=with_key, dropout=0.5, warmup=50, progressive=1, beta1=0.0, score=score), 3)[
            0
        ].method_state.sites
        for score in ("exact", "free")
    )
    for path in exact:
        assert 0 < below[path].sensitivity <= exact[path].sensitivity * (1 + 1e-4)


@pytest.mark.parametrize("score", ["tangent", "as_written", "as_written_b", "free", "factors"])
def test_scores_of_the_factors_at_every_layer_of_a_scan(score):
    s = setting("scan", score=score, warmup=50, progressive=1, beta1=0.0)
    number = lambda leaf: jnp.arange(1.0, leaf.size + 1).reshape(leaf.shape)  # noqa: E731
    ones = jax.tree.map(lambda leaf: jnp.sin(jnp.square(number(leaf))), s.state.adapters)
    grads = jax.tree.map(lambda leaf: jnp.cos(jnp.square(number(leaf)) + 1), ones)
    observed = jax.jit(s.method.observe)(s.state.method_state, ones, s.state.masks, grads, 4, None)
    kernel = {"as_written": "as_written_a"}.get(score, score)
    for path, known in observed.sites.items():
        expected = getattr(redundancy, kernel)(ones[path].a, ones[path].b, grads[path].a, grads[path].b)
        np.testing.assert_allclose(known.sensitivity, expected, rtol=1e-3)


def replay(values, entries, beta1, beta2, robust):
    """Follow equations 7 to 10 in plain numbers."""
    smooth = spread = mean = count = 0.0
    for value in values:
        count += 1
        mean = beta1 * mean + (1 - beta1) * value
        now = entries / (mean / (1 - beta1**count)) if robust else entries / value
        smooth = beta1 * smooth + (1 - beta1) * now
        spread = beta2 * spread + (1 - beta2) * abs(now - smooth / (1 - beta1**count))
    return smooth, spread


@pytest.mark.parametrize("robust", [False, True])
def test_averages_skip_what_cannot_be_measured(robust):
    s = setting(score="tangent", warmup=50, progressive=1, robust=robust)
    values = [0.5, 0.0, 2.0, np.nan, 1e-3, np.inf]
    known = s.state.method_state.sites["layer_0/fc1"]
    for value in values:
        known = averaged(known, jnp.float32(value), jnp.ones(3), 96, 0.85, 0.95, robust)
    assert (int(known.count), int(known.skipped)) == (3, 3)
    smooth, spread = replay([0.5, 2.0, 1e-3], 96, 0.85, 0.95, robust)
    assert float(known.smooth) == pytest.approx(smooth, rel=1e-5)
    assert float(known.uncertainty) == pytest.approx(spread, rel=1e-4)
    dead = averaged(known, jnp.float32(1.0), jnp.zeros(3), 96, 0.85, 0.95, robust)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(a == b), dead, known))


def test_an_average_reaches_back_as_many_steps_whatever_the_interval():
    """Ten steps between measurements weigh as ten steps: beta^10, without the bias of an average that began at 0."""
    s = setting(interval=10, warmup=60, progressive=10, delay=15)
    assert [n for n in range(80) if s.method.probes.when(n)] == [21, 31, 41, 51, 61]
    state, path = s.state.method_state, "layer_0/fc1"
    for value in (0.5, 2.0, 1.0):
        measured = dict.fromkeys(state.sites, jnp.float32(value))
        state = s.method.observe(state, s.state.adapters, s.state.masks, None, 11, measured)
    now = 96 / np.array([0.5, 2.0, 1.0])
    weights = 0.85 ** np.array([20, 10, 0])
    smooth, _ = corrected(state.sites[path], (0.85**10, 0.95**10))
    assert smooth == pytest.approx((weights * now).sum() / weights.sum(), rel=1e-5)


def test_with_one_measurement_the_larger_average_goes():
    assert gone(decided(setting(final=0.5), 8, smooth=[6, 1, 5, 2, 4, 3], uncertainty=[0.0] * 6)) == [0, 2, 4]


def decided(s, step, **columns):
    """Decide on a state whose modules, in the order of the tower, have the given statistics."""
    columns = {"smooth": range(1, 7), "uncertainty": [1.0] * 6, "count": [1] * 6, **columns}
    sites = {
        path: known._replace(**{name: jnp.asarray(column[i]) for name, column in columns.items()})
        for i, (path, known) in enumerate(sorted(s.state.method_state.sites.items()))
    }
    state = s.state.method_state._replace(sites=sites)
    _, decision = s.method.decide(state, s.state.adapters, s.state.masks, step, s.context)
    return decision


def gone(decision):
    """Return the numbers of the modules that a decision masks."""
    paths = [f"layer_{i}/fc{j}" for i in range(3) for j in (1, 2)]
    assert all(not mask.any() for mask in decision.masks.values())
    return sorted(paths.index(path) for path in decision.masks)


def test_decisions():
    s = setting(final=0.5)
    mixed = {"smooth": [1, 2, 3, 4, 5, 6], "uncertainty": [60, 1, 20, 1, 1, 1]}
    assert gone(decided(s, 8, **mixed)) == [0, 2, 5]
    assert gone(decided(setting(final=0.5, combine="none"), 8, **mixed)) == [3, 4, 5]
    assert gone(decided(setting(final=0.5, combine="div"), 8, **mixed)) == [3, 4, 5]
    spread = {**mixed, "uncertainty": [0.01, 0.1, 3, 9, 9, 1]}
    assert gone(decided(setting(final=0.5, combine="div"), 8, **spread)) == [0, 1, 5]
    # p(6) = .5 + .5 / 8 of six modules are 3.4, so that four stay; of equals the later goes.
    assert gone(decided(s, 6, smooth=[1] * 6)) == [4, 5]
    assert gone(decided(s, 6, smooth=[1, np.inf, 1, 1, 1, 1])) == [1, 5]
    # One module is always left, and nothing goes before all were measured.
    assert gone(decided(setting(final=1e-6), 8)) == [1, 2, 3, 4, 5]
    assert decided(s, 6, count=[1, 1, 0, 1, 1, 1]) is None
    late = decided(s, 8, count=[1, 1, 0, 1, 1, 1])
    assert late.masks == {} and "1 modules could not be measured" in late.report["status"]


def test_when_to_prune():
    numbers = lambda **settings: [n for n in range(20) if setting(**settings).method.triggers(n)]  # noqa: E731
    assert numbers() == [5, 6, 7, 8]
    assert numbers(abrupt=True) == [8]
    assert numbers(interval=3, warmup=7, progressive=4) == [10, 11]
    assert numbers(warmup=0.1, progressive=0.2, total_steps=20) == [3, 4, 5, 6]


@pytest.mark.parametrize("form, combine", [("plain", "mul"), ("scan", "div")])
def test_the_most_redundant_modules_go_and_stay_gone(form, combine):
    s = setting(form, combine=combine, final=0.3)
    state, decisions = run(s, 8)
    counts = {number: decision.report["modules"] for number, decision in decisions.items()}
    assert counts == {n: int(np.ceil(cubic(n, 4, 8, 1, 0.3) * 6)) for n in counts}
    assert sum(bool((np.asarray(mask) > 0).any()) for mask in state.masks.values()) == min(counts.values()) == 2
    # Compaction drops them, and training goes on as it would have.
    compact = jp.compacted(state, s.method, s.optimizer)
    assert set(compact.adapters) == {path for path, mask in state.masks.items() if mask.any()}
    assert set(compact.method_state.sites) == set(compact.adapters)
    smaller, _ = s.step(s.params, compact, s.batch)
    whole, _ = s.step(s.params, state, s.batch)
    for path, adapter in smaller.adapters.items():
        np.testing.assert_allclose(adapter.a, whole.adapters[path].a, rtol=1e-5, atol=1e-6)
    # A hundred more steps leave the dead dead: values, gradients and moments.
    for _ in range(100):
        state, _ = s.step(s.params, state, s.batch)
    assert_dead_are_zero(s, state)


def assert_dead_are_zero(s, state):
    grads = jax.grad(lambda a: loss_fn(lambda x: s.forward(s.params, a, state.masks, x), s.batch, None))(state.adapters)
    moments = [
        leaf
        for leaf in jax.tree.leaves(state.opt_state, is_leaf=lambda n: isinstance(n, dict))
        if isinstance(leaf, dict)
    ]
    assert len(moments) == 2
    dead = 0
    for path, mask in state.masks.items():
        gone = np.asarray(mask) == 0
        dead += gone.sum()
        for tree in (state.adapters, grads, *moments):
            assert not np.abs(np.asarray(tree[path].a).T[gone]).any()
            assert not np.abs(np.asarray(tree[path].b)[gone]).any()
    assert dead


def test_random_scores_are_a_function_of_the_seed():
    def drawn(seed):
        s = setting(score="random", seed=seed)
        seen = jax.jit(s.method.observe)(
            s.state.method_state, s.state.adapters, s.state.masks, s.state.adapters, 4, None
        )
        return [float(known.smooth) for known in seen.sites.values()]

    assert drawn(0) == drawn(0) != drawn(1)
    assert len(set(drawn(0))) == 6


def test_only_some_steps_measure():
    s = setting(interval=3, warmup=7, progressive=4)
    state = s.state
    for _ in range(14):
        state, _ = s.step(s.params, state, s.batch)
    assert {int(known.count) for known in state.method_state.sites.values()} == {3}
    assert {int(known.skipped) for known in state.method_state.sites.values()} == {0}


def test_the_probe_keeps_no_dense_gradient():
    """Sixteen wide sites: the exact score needs less than one dense gradient beyond what the factors' gradients need."""
    width, layers = 1024, 16
    key = jax.random.key(0)
    params = {f"layer_{i}": {"kernel": jax.random.normal(key, (width, width)) / 32} for i in range(layers)}
    import flax.linen as nn

    class Wide(nn.Module):
        @nn.compact
        def __call__(self, x):
            for i in range(layers):
                x = jnp.tanh(nn.Dense(width, use_bias=False, name=f"layer_{i}")(x))
            return x

    sites, forward, x = jp.find_sites(params), jp.attach(Wide()), jnp.ones((8, width))
    method = jp.g2r2(rank=2, warmup=2, progressive=2, interval=1)
    start = method.start(jp.Context(key, params, sites, forward, loss_fn))

    def loss(adapters, zeros, probed):
        adapters = method.probes.wrap(adapters, zeros) if probed else adapters
        return jnp.sum(forward(params, adapters, start.masks, x))

    def memory(probed):
        grad = jax.jit(jax.grad(loss, argnums=(0, 1)), static_argnums=2)
        compiled = grad.lower(start.adapters, method.probes.zeros(start.adapters), probed).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    one = 4 * width * width
    assert memory(True) - memory(False) < 1.5 * one


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"score": "exat"}, "'exat' is not known.*nearest: exact"),
        ({"combine": "plus"}, "combine 'plus'"),
        ({"final": 0.0}, "final 0.0 is out of range"),
        ({"initial": 0.1}, "0 < final <= initial"),
        ({"beta1": 1.0}, "beta1 1.0"),
        ({"warmup": 0.1}, "give total_steps"),
        ({"warmup": -1}, "warmup -1 is out of range"),
        ({"total_steps": 6}, "take 8 steps, and the run has 6"),
        ({"warmup": 1.5}, "warmup 1.5 is out of range; expected a whole number of steps"),
        ({"progressive": 0}, "at least one step"),
        ({"delay": 8}, "nothing can be measured in the first 8, in which the learning rate warms up"),
        ({"interval": 8}, "measures nothing before pruning ends at step 8; expected 1 to 7"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(jp.UsageError, match=message):
        jp.g2r2(**{"warmup": 4, "progressive": 4, "interval": 1, **settings})


def test_ranks_go_where_least_is_lost():
    """Against brute force over all ranks, with Rhat from the state and singular values in float64."""
    s = setting(unit="ranks", final=0.4)
    start, state, seen = jp.count(s.state.adapters, s.state.masks), s.state, 0
    for number in range(1, 10):
        state, _ = s.step(s.params, state, s.batch)
        before = state
        state, decision = jp.prune(state, s.method, s.optimizer, s.context)
        if not decision or not decision.masks:
            continue
        seen += 1
        budget = int((0.4 if number >= 8 else cubic(number, 4, 8, 1.0, 0.4)) * start)
        energy, worth = {}, {}
        for path, x in before.adapters.items():
            live = np.asarray(before.masks[path]) > 0
            whole = (np.asarray(x.a, np.float64) * live) @ np.asarray(x.b, np.float64)
            energy[path] = np.square(np.linalg.svd(whole, compute_uv=False)[: live.sum()])
            smooth, uncertain = corrected(before.method_state.sites[path], (0.85, 0.95))
            worth[path] = 1 / (smooth * uncertain)

        def lost(ranks, energy=energy, worth=worth):
            shares = [energy[p][r:].sum() / (energy[p].sum() or 1.0) for p, r in zip(energy, ranks, strict=True)]
            return np.dot(list(worth.values()), shares)

        allowed = [range(len(value) + 1) for value in energy.values()]
        kinds = [path.split("/")[-1] for path in energy]
        plans = [
            ranks
            for ranks in itertools.product(*allowed)
            if 20 * sum(ranks) <= budget and {k for k, r in zip(kinds, ranks, strict=True) if r} == set(kinds)
        ]
        found = [int(np.asarray(state.masks[path]).sum()) for path in energy]
        assert tuple(found) in plans and lost(found) == pytest.approx(min(map(lost, plans)), rel=1e-3)
        assert decision.report["modules"] == sum(rank > 0 for rank in found)
    assert seen >= 2 and jp.count(state.adapters, state.masks) <= 0.4 * start
    assert len({int(np.asarray(mask).sum()) for mask in state.masks.values()}) > 1
