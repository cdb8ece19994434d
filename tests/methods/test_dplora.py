"""DPLoRA's decisions against the paper's equations in float64."""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp
from jaxprune.methods.dplora import gradient_importance
from jaxprune.schedules import bezier, early
from jaxprune.surgery import live, rotate_adapters, svd_bases
from tests.tower import begin, sites_of, tower

SETTINGS = dict(total_steps=24, events=3, target=0.7)


def dplora(ranks=range(5), **settings):
    """The paper's rule, unless the settings say otherwise."""
    rule = dict(basis="trained", loss="importance")
    return jp.dplora(jp.oplora(budget=240, ranks=ranks, solver="DP"), **{**SETTINGS, **rule, **settings})


def loss_fn(apply, batch, key):
    return jnp.mean(jnp.square(apply(batch["x"]) - 1.0))


@functools.lru_cache
def world(form="plain"):
    model, params, x = tower(form)
    forward, sites = jp.attach(model), sites_of(form)
    context = jp.Context(jax.random.key(3), params, sites, forward, loss_fn, [{"x": x}], [{"x": x[:, None]}])
    return params, sites, forward, context, {"x": x}


def train(form="plain", steps=24, **settings):
    """Yield (number, state before the event, state after it, decision) of every step."""
    params, sites, forward, context, batch = world(form)
    method = dplora(**settings)
    start, optimizer = method.start(context), optax.adamw(1e-2)
    state = jp.init_state(jax.random.key(4), start.adapters, start.masks, optimizer, method)
    step = jp.make_step(forward, loss_fn, optimizer, method, donate=False)
    for number in range(1, steps + 1):
        state, _ = step(params, state, batch)
        before = state
        state, decision = jp.prune(state, method, optimizer, context)
        yield number, before, state, decision


def params_of(state):
    return jp.count(state.adapters, state.masks)


@pytest.mark.parametrize("form", ["plain", "scan"])
def test_budgets_are_kept_ranks_fall_and_the_last_one_is_the_target(form):
    states = list(train(form))
    first, last = states[0][1], states[-1][2]
    start = params_of(first)
    events = [(number, before, after) for number, before, after, decision in states if decision]
    assert [number for number, *_ in events] == [6, 12, 18]
    for event, (_, before, after) in enumerate(events, start=1):
        assert params_of(after) <= math.floor(start * (1 - 0.7 * bezier()(event / 3)))
        assert all(live(after.masks)[path] <= rank for path, rank in live(before.masks).items())
    assert params_of(last) <= math.floor(0.3 * start)


def test_importance_is_the_papers_equation_in_float64():
    _, before, _, _ = next(item for item in train() if item[0] == 6)
    params, _, forward, _, batch = world()
    grads = jax.grad(lambda a: loss_fn(lambda x: forward(params, a, before.masks, x), batch, None))(before.adapters)
    found = gradient_importance(grads, before.masks)
    for path, grad in grads.items():
        a, b = np.asarray(grad.a, np.float64), np.asarray(grad.b, np.float64)
        expected = np.sqrt((a**2).mean() * (b**2).mean()) * np.sqrt(a.shape[1])
        np.testing.assert_allclose(found[path], expected, rtol=1e-5)


def factors(sizes, mask):
    """Return gradients of made-up values, and masks with the dead at zero, for {path: (d_in, d_out)}."""
    rng = np.random.default_rng(1)
    grads = {
        path: jp.Lora(jnp.asarray(rng.normal(size=(d_in, len(mask))) * mask, jnp.float32),
                      jnp.asarray(rng.normal(size=(len(mask), d_out)) * mask[:, None], jnp.float32), 1.0)
        for path, (d_in, d_out) in sizes.items()
    }  # fmt: skip
    return grads, {path: jnp.asarray(mask, jnp.float32) for path in sizes}


@pytest.mark.parametrize("norm", ["rms", "frobenius"])
def test_both_readings_of_equation_6_over_live_components_alone(norm):
    mask = np.array([1.0, 0, 1, 0, 0, 1])
    grads, masks = factors({"one": (7, 5)}, mask)
    a, b = (np.asarray(leaf, np.float64) for leaf in (grads["one"].a[:, mask > 0], grads["one"].b[mask > 0]))
    by_name = {
        "rms": np.sqrt((a**2).mean()) * np.sqrt((b**2).mean()) * np.sqrt(3),
        "frobenius": np.sqrt(np.linalg.norm(a) * np.linalg.norm(b)) * np.sqrt(3),
    }
    np.testing.assert_allclose(gradient_importance(grads, masks, norm)["one"], by_name[norm], rtol=1e-6)
    # A compacted site is as important as the masked one.
    small = {"one": jp.Lora(jnp.asarray(a, jnp.float32), jnp.asarray(b, jnp.float32), 1.0)}
    compact = gradient_importance(small, {"one": jnp.ones(3)}, norm)["one"]
    np.testing.assert_allclose(compact, by_name[norm], rtol=1e-6)


def test_small_gradients_keep_their_importance():
    """Mean squares of 1e-26 each: their product is below float32, the product of their roots is not."""
    grads, masks = factors({"one": (7, 5)}, np.ones(3))
    tiny = jax.tree.map(lambda leaf: 1e-13 * leaf, grads)
    whole = gradient_importance(grads, masks)["one"]
    np.testing.assert_allclose(gradient_importance(tiny, masks)["one"], 1e-26 * whole, rtol=1e-5)


def decided(sizes, rank, importance, target=0.5, steps=1, **settings):
    """Decide the first event of a run that starts with `rank` at every site, with what was measured given."""
    sites = [jp.sites.site_at(path, *size) for path, size in sizes.items()]
    method = dplora(events=1, target=target, **settings)
    adapters, masks = jp.init_lora(jax.random.key(0), sites, dict.fromkeys(sizes, rank))
    state = method.init(adapters, masks)
    context = jp.Context(jax.random.key(0), {}, sites, lambda: None, lambda: None)
    total = {path: jnp.float32(value) for path, value in importance.items()}
    after, decision = method.decide(state._replace(total=total, steps=jnp.int32(steps)), adapters, masks, 12, context)
    assert int(after.event) == 1 and set(after.importance) == set(sizes)
    assert all(np.isfinite(value).all() for value in after.importance.values())
    return decision


def test_an_event_never_ends_a_run():
    """Where there is nothing to decide by, or no plan fits, ranks stay and the report says why."""
    alike = {"a/fc1": (4, 4), "b/fc1": (4, 4), "a/fc2": (4, 4)}
    for value in (0.0, np.nan, np.inf):
        decision = decided(alike, 4, dict.fromkeys(alike, value))
        assert decision.masks == {} and decision.report["budget"] == 48 and decision.report["event"] == 1
        assert decision.report["status"].startswith("The ranks stay as they are: no importance is finite and above 0")
    one = decided(alike, 4, {"a/fc1": np.nan, "b/fc1": 1.0, "a/fc2": 2.0})
    assert one.report["budget"] == 48 and set(one.masks) <= set(alike) and one.masks
    # An event may take every rank up to the largest, whatever candidates the start had.
    without_1 = decided(alike, 4, dict.fromkeys(alike, 1.0), ranks=(0, 4))
    assert without_1.masks and without_1.report["status"].startswith("Optimal")
    # One type whose only site left is the large one, so that a rank takes more than the budget.
    uneven = {"a/fc1": (40, 40)}
    left = decided(uneven, 1, {"a/fc1": 1.0}, target=0.9)
    assert left.masks == {} and "needs a rank above 0, which takes at least 80" in left.report["status"]


def test_a_first_event_that_measured_nothing_leaves_no_trace():
    """The first measurement stands alone, whenever it comes."""
    sites = ("a/fc1", "b/fc1")
    method, found = dplora(ema_decay=0.9), [jp.sites.site_at(path, 4, 4) for path in sites]
    adapters, masks = jp.init_lora(jax.random.key(0), found, dict.fromkeys(sites, 4))
    context = jp.Context(jax.random.key(0), {}, found, lambda: None, lambda: None)
    state = method.init(adapters, masks)
    for step, values in ((6, (0.0, 0.0)), (12, (3.0, 5.0)), (18, (4.0, 5.0))):
        total = dict(zip(sites, map(jnp.float32, values), strict=True))
        state, _ = method.decide(state._replace(total=total, steps=jnp.int32(1)), adapters, masks, step, context)
    assert [float(state.importance[path]) for path in sites] == pytest.approx([0.9 * 3 + 0.1 * 4, 5])


def test_the_last_budget_is_checked_before_training():
    with pytest.raises(
        jp.UsageError, match="would leave 23 adapter parameters, and a rank for each type of site takes 40"
    ):
        dplora(target=0.9).start(world()[3])
    dplora(target=0.5, ranks=(0, 4)).start(world()[3])


def test_it_continues_what_only_chooses_ranks():
    """Any such method, and nothing that would prune, project, look or measure beside it: one line each."""
    world_ = begin(jp.dplora(jp.lora(rank=3), total_steps=24, events=3, target=0.5))
    assert set(live(world_.state.masks).values()) == {3} and world_.method.events == (6, 12, 18)
    for first, why in (
        (jp.dplora(total_steps=24), "'dplora' prunes by itself"),
        (jp.sora(total_steps=24), "'sora' prunes by itself"),
        (jp.vera(), "'vera' has a view"),
        (jp.lora()._replace(project=lambda *x: x), "'lora' changes adapters"),
        (jp.lora()._replace(penalty=lambda x: 0.0), "'lora' has a penalty"),
        (jp.lora()._replace(probes=jp.Probes(dict, dict, bool)), "'lora' has probes"),
        (jp.oplora, "function oplora .* cannot be used; expected a method that a factory has made"),
    ):
        with pytest.raises(jp.UsageError, match=f"^first .*{why}") as caught:
            jp.dplora(first, total_steps=24)  # pyright: ignore
        assert len(str(caught.value).splitlines()) == 1


def test_each_sample_has_dropout_of_its_own():
    keys = []

    def noisy(apply, batch, key):
        jax.debug.callback(lambda k: keys.append(tuple(np.asarray(k).ravel().tolist())), jax.random.key_data(key))
        return loss_fn(apply, batch, key)

    params, sites, forward, context, batch = world()
    context = context._replace(loss_fn=noisy, samples=[{"x": batch["x"][:, None]}] * 2)
    method = dplora(importance="samples")
    start = method.start(context._replace(loss_fn=loss_fn))
    method.decide(method.init(start.adapters, start.masks), start.adapters, start.masks, 6, context)
    jax.effects_barrier()
    assert len(set(keys)) == 2 * len(batch["x"])


def test_the_moving_average_and_what_it_measures():
    """I <- beta I + (1 - beta) I_new over the steps since the last event, the first event taking I_new alone."""
    beta, sums, count, expected = 0.25, {}, 0, None
    params, _, forward, _, batch = world()
    previous = None
    for number, _, after, _ in train(ema_decay=beta, steps=12):
        count += 1
        base = previous or _initial()
        grads = jax.grad(lambda a, m=base.masks: loss_fn(lambda x: forward(params, a, m, x), batch, None))(
            base.adapters
        )
        for path, value in gradient_importance(grads, base.masks).items():
            sums[path] = sums.get(path, 0.0) + float(value)
        if number in (6, 12):
            new = {path: value / count for path, value in sums.items()}
            expected = new if expected is None else {p: beta * expected[p] + (1 - beta) * new[p] for p in new}
            for path, value in expected.items():
                np.testing.assert_allclose(after.method_state.importance[path], value, rtol=1e-4)
            sums, count = {}, 0
        previous = after


def _initial():
    _, sites, _, context, _ = world()
    method = dplora()
    start = method.start(context)
    return jp.init_state(jax.random.key(4), start.adapters, start.masks, optax.adamw(1e-2), method)


def test_the_survivors_are_the_components_of_largest_norm():
    for _, before, after, decision in train():
        for path in decision.masks if decision else ():
            lora, mask = before.adapters[path], np.asarray(before.masks[path]) > 0
            norms = np.linalg.norm(lora.a, axis=0) * np.linalg.norm(lora.b, axis=1)
            kept = np.asarray(after.masks[path]) > 0
            assert kept[~mask].sum() == 0
            if kept.any() and (mask & ~kept).any():
                assert norms[kept].min() >= norms[mask & ~kept].max()


def tails(adapters, masks):
    """Return the singular values of s A B of every site in float64, by path."""
    return {
        path: np.linalg.svd(
            x.scale * (np.asarray(x.a, np.float64) * np.asarray(masks[path])) @ np.asarray(x.b, np.float64), compute_uv=False
        )[: int(np.asarray(masks[path]).sum())]
        for path, x in adapters.items()
    }  # fmt: skip


@pytest.mark.parametrize("form", ["plain", "scan"])
def test_the_least_is_lost_where_components_are_singular_values(form):
    """The squared distance of an event is the least of all plans within its budget, by brute force over singular values."""
    seen = 0
    for _, before, after, decision in train(form, basis="svd", loss="components"):
        if not decision:
            continue
        seen += 1
        sigma, ranks = tails(before.adapters, before.masks), live(after.masks)
        lost = sum(np.square(sigma[path][rank:]).sum() for path, rank in ranks.items())
        moved = 0.0
        for path, x in before.adapters.items():
            new = after.adapters[path]
            change = x.scale * (np.asarray(x.a, np.float64) @ x.b - np.asarray(new.a, np.float64) @ new.b)
            moved += np.square(change).sum()
        assert moved == pytest.approx(lost, rel=1e-3)
        assert decision.report["objective"] == pytest.approx(lost, rel=1e-3)
        kinds = {path: path.split("/")[-1].split("[")[0] for path in sigma}
        least = min(
            sum(np.square(sigma[path][rank:]).sum() for path, rank in zip(sigma, plan, strict=True))
            for plan in itertools.product(*(range(len(value) + 1) for value in sigma.values()))
            if 20 * sum(plan) <= decision.report["budget"]
            and len({kinds[path] for path, rank in zip(sigma, plan, strict=True) if rank}) == len(set(kinds.values()))
        )
        assert lost == pytest.approx(least, rel=1e-3)
    assert seen == 3


def test_the_papers_ranks_with_the_components_of_the_svd():
    """The basis alone: the same ranks at the first event, and less is lost."""
    lost = {}
    for basis in ("trained", "svd"):
        _, before, after, _ = next(item for item in train(basis=basis) if item[0] == 6)
        changes = [
            np.asarray(x.a) @ np.asarray(x.b) - np.asarray(after.adapters[path].a) @ np.asarray(after.adapters[path].b)
            for path, x in before.adapters.items()
        ]
        lost[basis] = live(after.masks), sum(np.square(change).sum() for change in changes)
    assert lost["svd"][0] == lost["trained"][0] and lost["svd"][1] < 0.9 * lost["trained"][1]


def test_fisher_information_of_gates_is_that_of_single_samples_in_the_new_basis():
    """Against <A_j, dA_j>^2 of single samples, which is what (dLoss / dm_j)^2 is at m = 1."""
    params, _, forward, context, batch = world()
    _, before, _, decision = next(item for item in train(basis="svd", loss="fisher") if item[0] == 6)
    rotated = rotate_adapters(svd_bases(before.adapters, before.masks), before.adapters)
    values = {path: 0.0 for path in rotated}
    for sample in batch["x"]:
        loss = lambda a, x=sample: loss_fn(lambda y: forward(params, a, before.masks, y), {"x": x[None]}, None)  # noqa: E731
        for path, grad in jax.grad(loss)(rotated).items():
            values[path] += np.square((np.asarray(grad.a, np.float64) * rotated[path].a).sum(axis=0)) / len(batch["x"])
    lost = sum(np.sort(values[path])[: int(len(mask) - mask.sum())].sum() for path, mask in decision.masks.items())
    assert decision.report["objective"] == pytest.approx(lost, rel=1e-3)
    for path, mask in decision.masks.items():
        if 0 < mask.sum() < len(mask):
            assert values[path][mask > 0].min() >= values[path][mask == 0].max()


def test_an_event_without_samples_or_with_broken_adapters_says_so():
    context = world()[3]._replace(samples=())
    with pytest.raises(jp.UsageError, match="measured on the context's samples, and it has none"):
        jp.prune(_initial()._replace(step=jnp.int32(6)), dplora(loss="fisher"), optax.adamw(1e-2), context)
    state = _initial()._replace(step=jnp.int32(6))
    path, broken = next(iter(state.adapters.items()))
    adapters = {**state.adapters, path: dataclasses.replace(broken, b=jnp.full_like(broken.b, jnp.nan))}
    method = dplora(basis="svd", loss="components")
    _, decision = jp.prune(state._replace(adapters=adapters), method, optax.adamw(1e-2), context)
    assert decision.masks == {} and f"the adapter at {path!r} is not finite" in decision.report["status"]


def test_momentum_and_stability_are_the_papers_only_where_importance_is():
    """Components have values of their own; prices are added where they are asked for, and then plans follow them."""
    plain, dear = (
        [live(after.masks) for *_, after, decision in train(basis="svd", loss="components", **prices) if decision]
        for prices in ({}, {"momentum": 3.0, "stability": 3.0})
    )
    zero = [
        live(after.masks)
        for *_, after, decision in train(basis="svd", loss="components", momentum=0.0, stability=0.0)
        if decision
    ]
    assert plain == zero != dear


def test_squeeze_loses_the_least_from_a_uniform_rank():
    world_ = begin(jp.squeeze(jp.lora(rank=4), total_steps=24, events=3, target=0.7))
    state = world_.state
    for _ in range(world_.method.events[0]):
        state, _ = world_.step(world_.params, state, world_.batch)
    after, decision = jp.prune(state, world_.method, world_.optimizer, world_.context)
    assert decision and set(decision.bases) == set(decision.masks)
    lost = sum(
        np.square(sigma[live(after.masks)[path] :]).sum() for path, sigma in tails(state.adapters, state.masks).items()
    )
    assert decision.report["objective"] == pytest.approx(lost, rel=1e-3)


def test_events_lie_in_the_share_of_the_run_that_stop_names():
    assert dplora(total_steps=100, events=3, stop=0.4).events == (10, 20, 30)
    assert max(jp.squeeze(total_steps=100).events) < 70 < max(jp.dplora(total_steps=100).events)
    with pytest.raises(jp.UsageError, match="comes after step 1, and nothing can be measured before step 2"):
        dplora(total_steps=24, events=1, stop=0.1, loss="components")


def test_a_growing_scale_keeps_alpha():
    for _, before, after, decision in train(scaling="grow"):
        for path in decision.masks if decision else ():
            rank = live(after.masks)[path]
            if rank:
                alpha = before.adapters[path].scale * live(before.masks)[path]
                assert after.adapters[path].scale == pytest.approx(alpha / rank)


def test_importance_on_single_samples():
    params, _, forward, context, batch = world()
    _, before, after, _ = next(item for item in train(importance="samples") if item[0] == 6)
    expected: dict[str, list[float]] = {path: [] for path in before.adapters}
    for sample in batch["x"]:
        one = {"x": sample[None]}
        loss = lambda a, o=one: loss_fn(lambda x: forward(params, a, before.masks, x), o, None)  # noqa: E731
        for path, grad in jax.grad(loss)(before.adapters).items():
            a, b = np.asarray(grad.a, np.float64), np.asarray(grad.b, np.float64)
            expected[path].append(np.sqrt((a**2).mean() * (b**2).mean()) * np.sqrt(a.shape[1]))
    for path, values in expected.items():
        np.testing.assert_allclose(after.method_state.importance[path], np.mean(values), rtol=1e-4)


def test_another_schedule_prunes_at_another_pace():
    bends = [params_of(after) for *_, after, decision in train() if decision]
    front = [params_of(after) for *_, after, decision in train(schedule=early) if decision]
    assert front[0] < bends[0] and abs(front[-1] - bends[-1]) <= 20


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (dict(target=1.0), "target 1.0 is out of range"),
        (dict(ema_decay=-0.1), "ema_decay -0.1 is out of range"),
        (dict(events=0), "events 0 is out of range"),
        (dict(events=30), "at most 23 events"),
        (dict(norm="l1"), "expected one of rms, frobenius"),
        (dict(recovery_steps=6), "recovery of 6 steps does not fit between events 6 steps apart"),
        (dict(importance="gradient"), "expected one of training, samples"),
        (
            dict(loss="components", norm="rms"),
            "norm rms is a setting of loss=importance, and loss is components; give loss",
        ),
        (dict(loss="fisher", ema_decay=0.0), "ema_decay 0.0 is a setting of loss=importance"),
        (dict(loss="components", importance="samples"), "importance samples is a setting of loss=importance"),
    ],
)
def test_settings_that_cannot_be(settings, said):
    with pytest.raises(jp.UsageError, match=said):
        dplora(**settings)


def test_components_of_the_svd_basis_unless_the_paper_is_asked_for():
    params, _, forward, context, batch = world()
    ends = []
    for settings in ({}, dict(basis="svd", loss="components"), dict(basis="trained", loss="importance")):
        method, optimizer = (
            jp.dplora(jp.oplora(budget=240, ranks=range(5), solver="DP"), **SETTINGS, **settings),
            optax.adamw(1e-2),
        )
        start = method.start(context)
        state = jp.init_state(jax.random.key(4), start.adapters, start.masks, optimizer, method)
        step = jp.make_step(forward, loss_fn, optimizer, method)
        for _ in range(24):
            state, _ = step(params, state, batch)
            state, _ = jp.prune(state, method, optimizer, context)
        ends.append(state.adapters)
    jax.tree.map(np.testing.assert_array_equal, ends[0], ends[1])
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(ends[0]), jax.tree.leaves(ends[2]), strict=True))


def test_a_target_that_leaves_no_rank_for_a_type_is_refused_before_training():
    with pytest.raises(
        jp.UsageError, match="would leave 12 adapter parameters, and a rank for each type of site takes 40"
    ):
        dplora(target=0.95).start(world()[3])
    with pytest.raises(jp.UsageError, match="measured on the context's samples, and it has none"):
        method = dplora(importance="samples")
        state = _initial()._replace(step=jnp.int32(6))
        jp.prune(state, method, optax.adamw(1e-2), world()[3]._replace(samples=()))
