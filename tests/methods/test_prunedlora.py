"""PrunedLoRA: what activations measure, and what events do to adapters."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp
from jaxprune.methods.prunedlora import PRUNED_SCORES
from jaxprune.surgery import rotate_adapters, rotate_gradients
from tests.tower import sites_of, tower


def loss_fn(apply, batch, key):
    return jnp.mean(jnp.square(apply(batch["x"]) - batch["y"]))


@functools.lru_cache
def setting(form="plain", **settings):
    """Return everything for a run of PrunedLoRA on a tower."""
    model, params, x = tower(form)
    batch = {"x": x, "y": jnp.sin(jnp.arange(8.0)).reshape(4, 2)}
    method = jp.prunedlora(**{"rank": 6, "target": 3, "interval": 2, "remove": 2, **settings})
    sites, forward, optimizer = sites_of(form), jp.attach(model), optax.adam(1e-2)
    context = jp.Context(jax.random.key(3), params, sites, forward, loss_fn)
    start = method.start(context)
    state = jp.init_state(jax.random.key(4), start.adapters, start.masks, optimizer, method)
    step = jp.make_step(forward, loss_fn, optimizer, method, donate=False)
    return types.SimpleNamespace(**locals())


def inputs(s, adapters, path, x):
    """Return the input of the first fc2, float64."""
    assert path == "layer_0/fc2"
    first, lora = s.params["layer_0"]["fc1"], adapters["layer_0/fc1"]
    kernel = np.asarray(first["kernel"]) + lora.scale * np.asarray(lora.a) @ np.asarray(lora.b)
    return np.tanh(np.asarray(x, np.float64).reshape(-1, 8) @ kernel + np.asarray(first["bias"]))


@pytest.mark.parametrize("score", ["wanda", "sparsegpt_released", "sparsegpt_obs"])
def test_scores_of_activations(score):
    s = setting(score=score)
    state, _ = s.step(s.params, s.state, s.batch)
    lora = state.adapters["layer_0/fc2"]
    a, b = np.asarray(lora.a, np.float64), np.asarray(lora.b, np.float64)
    x = inputs(s, state.adapters, "layer_0/fc2", s.x)
    state, _ = s.step(s.params, state, s.batch)
    found = state.method_state.sites["layer_0/fc2"]
    z = x @ a
    if score == "wanda":
        np.testing.assert_allclose(found, np.sqrt((z**2).mean(0)) * np.linalg.norm(b, axis=1), rtol=1e-4)
    elif score == "sparsegpt_released":
        inverse = np.linalg.inv(x.T @ x / len(x) + 1e-6 * np.eye(12))
        np.testing.assert_allclose(found, np.diag(a.T @ inverse @ a), rtol=2e-2)
    else:
        np.testing.assert_allclose(found["b"].curvature, z.T @ z / len(z), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("form", ["remat", "scan_of_remat"])
def test_activations_are_measured_in_every_form(form):
    s, plain = setting(form, score="sparsegpt_obs"), setting(score="sparsegpt_obs")

    # The same parameters and adapters in every form: those of the plain tower, the parameters stacked where the form is.
    def moved(tree):
        if "scan" not in form:
            return tree
        return {f"layers/{n}[{i}]": tree[f"layer_{i}/{n}"] for n in ("fc1", "fc2") for i in range(3)}

    params = plain.params
    if "scan" in form:
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(params[f"layer_{i}"] for i in range(3)))
        params = {"layers": stacked, "head": params["head"]}
    adapters = {path: lora for path, lora in plain.state.adapters.items()}
    state = jp.init_state(jax.random.key(0), moved(adapters), moved(plain.state.masks), s.optimizer, s.method)
    state, expected = state._replace(step=jnp.int32(1)), plain.state._replace(step=jnp.int32(1))
    state, expected = s.step(params, state, s.batch)[0], plain.step(plain.params, expected, s.batch)[0]
    wanted = moved({path: found["b"].curvature for path, found in expected.method_state.sites.items()})
    for path, curvature in wanted.items():
        np.testing.assert_allclose(state.method_state.sites[path]["b"].curvature, curvature, rtol=1e-4, atol=1e-6)


def gradients(s, state):
    loss = lambda a: loss_fn(lambda x: s.forward(s.params, a, state.masks, x), s.batch, None)  # noqa: E731
    return jax.jit(jax.grad(loss))(state.adapters)


@pytest.mark.parametrize(
    "curvature, compensate, first_order", [("gtg", "A", True), ("fisher", "B", False), ("fisher", "A", True)]
)
def test_an_event_is_what_the_formulas_say(curvature, compensate, first_order):
    """Two steps and an event, replayed in float64 from dense gradients."""
    s = setting(curvature=curvature, compensate=compensate, first_order=first_order)
    middle, _ = s.step(s.params, s.state, s.batch)
    after, _ = s.step(s.params, middle, s.batch)
    pruned, decision = jp.prune(after, s.method, s.optimizer, s.context)
    assert decision.report["removed"] == 2 * 6 and decision.report["skipped"] == 0
    hits = 0
    first, second = gradients(s, s.state), gradients(s, middle)
    for path in middle.adapters:
        total = np.zeros(6)
        inverses = {}
        for name, turn in (("a", True), ("b", False)):
            rows = lambda leaf: np.asarray(leaf.T if turn else leaf, np.float64)  # noqa: B023, E731
            value, *grads = (rows(getattr(tree[path], name)) for tree in (middle.adapters, first, second))
            grams = [g @ g.T for g in grads]
            curved = grams[1]
            if curvature == "fisher":
                curved = (0.09 * grams[0] + 0.1 * grams[1]) / 0.19 / value.shape[1]
            inverses[name] = np.linalg.inv(curved + 0.01 * np.diag(curved).mean() * np.eye(6))
            residual = value - (inverses[name] @ grads[1] if first_order else 0)
            total += 0.5 * (residual**2).sum(1) / np.diag(inverses[name])
        removed = np.sort(np.argsort(total)[:2])
        assert np.flatnonzero(np.asarray(pruned.masks[path]) == 0).tolist() == removed.tolist()
        name, other = compensate.lower(), "b" if compensate == "A" else "a"
        kept = [j for j in range(6) if j not in removed]
        turn = lambda leaf: np.asarray(leaf.T if compensate == "A" else leaf, np.float64)  # noqa: E731
        value, inverse = turn(getattr(after.adapters[path], name)), inverses[name]
        update = -inverse[np.ix_(kept, removed)] @ np.linalg.inv(inverse[np.ix_(removed, removed)]) @ value[removed]
        size, cap = np.linalg.norm(update), np.linalg.norm(value[removed])
        hits += size > cap
        expected = value[kept] + update * min(1, cap / size)
        found = turn(getattr(pruned.adapters[path], name))
        np.testing.assert_allclose(found[kept], expected, rtol=5e-3, atol=1e-5)
        assert not found[removed].any()
        untouched = getattr(after.adapters[path], other), getattr(pruned.adapters[path], other)
        axis = -1 if other == "a" else -2
        np.testing.assert_array_equal(*(np.take(leaf, kept, axis) for leaf in untouched))
    assert decision.report["cap_hits"] == hits


@pytest.mark.parametrize("form, settings", [("scan", {}), ("plain", {"score": "paper_score"})])
def test_events_go_down_to_the_target_and_the_dead_stay_dead(form, settings):
    s = setting(form, **settings)
    state, live = s.state, {}
    for number in range(1, 5):
        state, _ = s.step(s.params, state, s.batch)
        state, decision = jp.prune(state, s.method, s.optimizer, s.context)
        if decision:
            live[number] = {int(mask.sum()) for mask in state.masks.values()}
    assert live == {2: {4}, 4: {3}}
    assert not any(s.method.triggers(number) for number in range(5, 100))
    # Compaction halves the ranks, also of the state, and changes nothing about training.
    small = jp.compacted(state, s.method, s.optimizer)
    assert {adapter.rank for adapter in small.adapters.values()} == {3}
    assert {leaf.shape[-1] for leaf in jax.tree.leaves(small.method_state.sites)} == {3}
    next_small, next_whole = (s.step(s.params, st, s.batch)[0] for st in (small, state))
    left, right = (jp.merge(s.params, st.adapters, st.masks) for st in (next_small, next_whole))
    for one, other in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    for _ in range(100):
        state, _ = s.step(s.params, state, s.batch)
    moments = [
        m for m in jax.tree.leaves(state.opt_state, is_leaf=lambda n: isinstance(n, dict)) if isinstance(m, dict)
    ]
    assert len(moments) == 2
    for tree in (state.adapters, gradients(s, state), *moments):
        for path, mask in state.masks.items():
            dead = np.asarray(mask) == 0
            assert dead.any()
            assert not np.asarray(tree[path].a).T[dead].any()
            assert not np.asarray(tree[path].b)[dead].any()


def observed(**settings):
    """Return a setting with adapters and method state as after two steps, from made-up values, and no training step."""
    s = setting(**settings)
    number = lambda leaf: jnp.arange(1.0, leaf.size + 1).reshape(leaf.shape)  # noqa: E731
    adapters = jax.tree.map(lambda leaf: jnp.sin(jnp.square(number(leaf))), s.state.adapters)
    grads = jax.tree.map(lambda leaf: jnp.cos(jnp.square(number(leaf)) + 1), adapters)
    measured = None
    if s.method.probes:
        zeros = s.method.probes.zeros(adapters)
        measured = jax.tree.map(lambda z: jnp.arange(1.0, 7) * (jnp.eye(6) if z.ndim == 2 else 1.0), zeros)
    state = jax.jit(s.method.observe)(s.state.method_state, adapters, s.state.masks, grads, 2, measured)
    return types.SimpleNamespace(**{**vars(s), "adapters": adapters, "known": state, "masks": s.state.masks})


def test_compaction_between_events_carries_the_curvature_over():
    s = observed()
    state = s.state._replace(adapters=s.adapters, method_state=s.known, step=jnp.int32(2))
    state, _ = jp.prune(state, s.method, s.optimizer, s.context)
    small = jp.compacted(state, s.method, s.optimizer)
    assert {adapter.rank for adapter in small.adapters.values()} == {4}
    ends = []
    for now in (state, small):
        grads = jax.tree.map(lambda leaf: 0.1 * leaf, now.adapters)
        known = jax.jit(s.method.observe)(now.method_state, now.adapters, now.masks, grads, 4, None)
        ends.append(jp.prune(now._replace(method_state=known, step=jnp.int32(4)), s.method, s.optimizer, s.context)[0])
    for path, mask in ends[0].masks.items():
        alive, kept = (np.asarray(end.masks[path]) > 0 for end in ends)
        assert alive.sum() == kept.sum() == 3 and mask.shape == (6,)
        left, right = ends[0].adapters[path].b[alive], ends[1].adapters[path].b[kept]
        np.testing.assert_allclose(left, right, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("score", PRUNED_SCORES)
def test_every_score_decides(score):
    s = observed(score=score)
    _, decision = s.method.decide(s.known, s.adapters, s.masks, 2, None)
    assert all((mask > 0).sum() == 4 for mask in decision.masks.values()) and len(decision.masks) == 6
    assert set(decision.adapters) == (set(s.adapters) if score in ("obs", "sparsegpt_obs") else set())
    if score == "sparsegpt_released":
        assert all(mask.tolist() == [0, 0, 1, 1, 1, 1] for mask in decision.masks.values())


def test_a_gradient_that_is_not_finite_skips_the_site_and_the_next_event_makes_up_for_it():
    s, path = observed(), "layer_1/fc1"
    known = s.known.sites[path]
    broken = {**s.known.sites, path: {**known, "b": known["b"]._replace(norm=jnp.full(6, jnp.nan))}}
    _, decision = s.method.decide(s.known._replace(sites=broken), s.adapters, s.masks, 2, None)
    assert decision.report["skipped"] == 1 and len(decision.masks) == 5
    assert path not in decision.masks and path not in decision.adapters
    _, decision = s.method.decide(s.known, s.adapters, s.masks, 4, None)
    assert all((mask > 0).sum() == 3 for mask in decision.masks.values())


def test_both_factors_can_never_be_adjusted():
    """Each adjustment alone restores the product; both at once overshoot, so no setting asks for them."""
    for wrong in ("both", "AB", "a", "B,A", "full"):
        with pytest.raises(jp.UsageError, match="expected one of none, B, A"):
            jp.prunedlora(compensate=wrong)
    for compensate, changed in (("A", {"a"}), ("B", {"b"}), ("none", set())):
        s = observed(compensate=compensate, curvature="gtg")
        _, decision = s.method.decide(s.known, s.adapters, s.masks, 2, None)
        differs = {
            name
            for path, adapter in decision.adapters.items()
            for name in ("a", "b")
            if not np.array_equal(getattr(adapter, name), getattr(s.adapters[path], name))
        }
        assert differs == changed


def test_the_scale_stays_one():
    s = setting()
    assert {adapter.scale for adapter in s.state.adapters.values()} == {1.0}
    assert {
        adapter.scale
        for adapter in jp.prunedlora(rank=4, target=2, alpha=2)
        .start(jp.Context(jax.random.key(0), s.params, s.sites, s.forward, loss_fn))
        .adapters.values()
    } == {0.5}


def test_a_rank_above_the_kernels_is_allowed():
    s = observed(rank=16, target=3, remove=13)
    _, decision = s.method.decide(s.known, s.adapters, s.masks, 2, None)
    assert decision.report["skipped"] == 0 and decision.report["removed"] == 6 * 13
    assert all(mask.sum() == 3 for mask in decision.masks.values())
    assert all(np.isfinite(adapter.b).all() for adapter in decision.adapters.values())


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"score": "obss"}, "'obss' is not known.*nearest: obs"),
        ({"score": "wanda", "damping": 0.1}, "score 'wanda' has no setting 'damping'"),
        ({"score": "paper_score", "compensate": "B"}, "score 'paper_score' has no setting 'compensate'"),
        ({"curvature": "hessian"}, "curvature 'hessian' is not known"),
        ({"curvature": "act", "compensate": "A"}, "one of B alone"),
        ({"damping": 0.0}, "damping 0.0"),
        ({"target": 200}, "expected 1 to the initial rank, 128"),
        ({"target": 0}, "target 0"),
        ({"interval": 0}, "interval 0"),
        ({"start_step": 9}, "at least the interval, 10"),
        ({"decay": 1.0}, "decay 1.0"),
        ({"total_steps": 319, "interval": 10, "remove": 2}, "takes 320 steps, and the run has 319"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(jp.UsageError, match=message):
        jp.prunedlora(**settings)


def test_the_papers_schedule_lengths():
    for rank, last in ((128, 320), (256, 960), (512, 2240)):
        numbers = [n for n in range(3000) if jp.prunedlora(rank=rank, target=64).triggers(n)]
        assert numbers[-1] == last and len(numbers) == (rank - 64) / 2 and numbers[0] == 10


def test_the_benchmark_prints_what_it_measured(capsys):
    from experiments import bench

    bench.run(["prunedlora", "--rank", "8", "--events", "1"])
    lines = capsys.readouterr().out.splitlines()
    # 8 components of 81,920 values in four trees (values, gradients, two moments) of four bytes.
    assert "take 10 MiB" in lines[0]
    seconds = {line.split()[0]: float(line.split()[2]) for line in lines[1:4]}
    assert set(seconds) == {"observe", "decide", "apply"} and min(seconds.values()) > 0


@pytest.mark.parametrize(
    "settings", [{"score": "paper_score"}, {"curvature": "gtg", "first_order": True, "compensate": "A"}]
)
def test_curvatures_follow_into_the_svd_basis(settings):
    """What is known after an event is what the rotated gradients say, in float64."""
    s = setting(basis="svd", **settings)
    state, _ = s.step(s.params, s.state, s.batch)
    before = state.adapters
    state, _ = s.step(s.params, state, s.batch)
    grads = jax.grad(lambda a: loss_fn(lambda x: s.forward(s.params, a, state.masks, x), s.batch, None))(before)
    after, decision = jp.prune(state, s.method, s.optimizer, s.context)
    assert decision and set(decision.bases) == set(state.adapters)
    turned = rotate_gradients(decision.bases, grads)
    old, new = (rotate_adapters(decision.bases, x) for x in (before, state.adapters))
    for path, known in after.method_state.sites.items():
        for name, factor in known.items():
            rows = lambda tree: np.asarray(tree.a, np.float64).T if name == "a" else np.asarray(tree.b, np.float64)  # noqa: B023, E731
            g, f = rows(turned[path]), rows(old[path])
            for found, expected in ((factor.curvature, g @ g.T), (factor.cross, g @ f.T)):
                np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-4 * np.abs(expected).max())
            np.testing.assert_allclose(factor.norm, np.square(rows(new[path])).sum(axis=1), rtol=1e-4)
    assert {int(mask.sum()) for mask in after.masks.values()} == {4}


def test_the_smallest_singular_values_go():
    s = setting(basis="svd", score="norm")
    state = s.state
    for _ in range(2):
        state, _ = s.step(s.params, state, s.batch)
    after, _ = jp.prune(state, s.method, s.optimizer, s.context)
    for path, x in state.adapters.items():
        whole, new = np.asarray(x.a, np.float64) @ x.b, after.adapters[path]
        sigma = np.linalg.svd(whole, compute_uv=False)
        left = np.asarray(new.a, np.float64) @ new.b
        np.testing.assert_allclose(np.square(whole - left).sum(), np.square(sigma[4:]).sum(), rtol=1e-3, atol=1e-8)
        assert np.linalg.matrix_rank(left, tol=1e-6 * sigma[0]) <= 4


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"score": "taylor2"}, "^score 'taylor2' knows one basis alone"),
        ({"curvature": "act"}, "^a curvature of activations knows one basis alone"),
    ],
)
def test_what_cannot_be_brought_into_another_basis_is_refused(settings, said):
    with pytest.raises(jp.UsageError, match=f'{said}; with basis "svd" expected score obs, paper_score or norm$'):
        jp.prunedlora(rank=6, target=3, basis="svd", **settings)
