"""Channel masks: Fisher information and whom it keeps, the paper's logits, what is counted, when it freezes, the controls."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp
from jaxprune.adapters import MaskedDora, mask_channels, settle, to_dora
from jaxprune.adapters.channel import SETTLED
from jaxprune.methods.channelmask import density, density_shift, draw, largest, most_informed, temperature
from tests.tower import begin, sites_of, tower


def masked(logits, heads=1, d_in=5):
    """A site with these logits, and as many channels as they stand for."""
    logits = jnp.asarray(logits, jnp.float32)
    d_out = logits.shape[-1] if logits.shape[-1] > heads else logits.shape[-1] * heads
    site = jp.Site("fc1", d_in, d_out, 0, "fc1")
    lora, _ = jp.init_lora(jax.random.key(0), [site], {"fc1": 2})
    kernel = jax.random.normal(jax.random.key(1), (d_in, d_out))
    dora = to_dora(lora, {"fc1": {"kernel": kernel}})["fc1"]
    return dataclasses.replace(mask_channels(dora, heads=heads), logits=logits), kernel


def started(method, form="plain"):
    model, params, x = tower(form)
    sites = sites_of(form)
    context = jp.Context(jax.random.key(3), params, sites, jp.attach(model), loss_fn, [{"x": x}])
    return context, method.start(context), {"x": x}


def loss_fn(apply, batch, key):
    return jnp.mean(jnp.square(apply(batch["x"]) - 1.0))


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("shared", [False, True])
def test_fisher_is_the_average_of_squared_gate_gradients_of_microbatches(accumulate, shared):
    """Against central differences of the loss by gates, in float64; the optimizer stands still."""
    sizes = {"value": (5, 6), "fc1": (6, 4)}
    rng = np.random.default_rng(4)
    params = {
        name: {"kernel": jnp.asarray(rng.normal(size=size), jnp.float32), "bias": jnp.asarray(rng.normal(size=size[1]))}
        for name, size in sizes.items()
    }
    sites = [jp.Site(name, *size, layer, name) for layer, (name, size) in enumerate(sizes.items())]

    def forward(params, adapters, masks, x):
        for name in sizes:
            y = adapters[name].linear(x, params[name]["kernel"], masks[name], None) + params[name]["bias"]
            x = jnp.tanh(adapters[name].finish(y, masks[name]))
        return x

    method = jp.channelmask(
        total_steps=20, stage=1.0, channels=tuple(sizes), rank=2, decay=0.8, measure=0.5, heads=3, shared=shared
    )
    context = jp.Context(jax.random.key(0), params, sites, forward, loss_fn)
    start, optimizer = method.start(context), optax.sgd(0.0)
    adapters = {
        path: dataclasses.replace(
            x, b=jnp.asarray(rng.normal(size=x.b.shape), jnp.float32), magnitude=1.5 * x.magnitude
        )
        for path, x in start.adapters.items()
    }
    state = jp.init_state(jax.random.key(1), adapters, start.masks, optimizer, method)
    step = jp.make_step(forward, loss_fn, optimizer, method, accumulate=accumulate, donate=False)
    wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), (params, adapters))

    def exact_loss(gates, x):
        for name in sizes:
            kernel, bias, adapter = wide[0][name]["kernel"], wide[0][name]["bias"], wide[1][name]
            v = kernel + adapter.scale * adapter.a @ adapter.b
            gate = np.tile(gates[name], bias.size // gates[name].size)
            x = np.tanh(gate * (x @ (v / np.linalg.norm(v, axis=0)) * adapter.magnitude + bias))
        return np.mean((x - 1) ** 2)

    def slope(name, channel, x):
        gates = [{path: np.ones(leaf.logits.shape) for path, leaf in wide[1].items()} for _ in range(2)]
        gates[0][name][channel], gates[1][name][channel] = 1 + 1e-5, 1 - 1e-5
        return (exact_loss(gates[0], x) - exact_loss(gates[1], x)) / 2e-5

    squares = {name: [] for name in sizes}
    for _ in range(4):
        x = rng.normal(size=(accumulate, 7, 5)).astype(np.float32)
        state, _ = step(params, state, {"x": x if accumulate > 1 else x[0]})
        for name, adapter in adapters.items():
            each = [[slope(name, c, part) ** 2 for c in range(adapter.logits.size)] for part in x.astype(np.float64)]
            squares[name].append(np.mean(each, 0))
    weights = 0.8 ** np.arange(3, -1, -1)
    for name in sizes:
        want = np.average(squares[name], axis=0, weights=weights)
        assert want.size == adapters[name].logits.size == {"value": 2 if shared else 6, "fc1": 4}[name]
        np.testing.assert_allclose(state.method_state[name], want, rtol=1e-3, atol=1e-9)


def test_no_other_choice_of_equal_heads_has_more_information():
    """Two values of three heads, two MLPs and one query, against every choice there is; what is off stays off."""
    rng = np.random.default_rng(2)
    shapes = {"a/value": (6, 3), "b/value": (9, 3), "a/fc1": (3, 1), "b/fc1": (5, 1), "b/query": (4, 2)}
    adapters, fisher = {}, {}
    for path, (channels, heads) in shapes.items():
        adapters[path] = dataclasses.replace(masked(np.full(channels, SETTLED), heads)[0], heads=heads)
        fisher[path] = jnp.asarray(rng.exponential(size=channels), jnp.float32)
    for share in (0.9, 0.6, 0.4, 0.2, 0.01):
        got = most_informed(adapters, fisher, share)
        for kind in ("value", "fc1", "query"):
            paths = [path for path in shapes if path.endswith(kind)]
            on = {path: np.asarray(adapters[path].kept()) for path in paths}
            heads = shapes[paths[0]][1]
            units = sum(shapes[path][0] for path in paths) // heads
            stay = max(len(paths), round(share * units))
            best, most = None, -1.0
            for widths in itertools.product(*(range(1, shapes[path][0] // heads + 1) for path in paths)):
                if sum(widths) != stay:
                    continue
                for choice in itertools.product(
                    *(equal(shapes[p], width, on[p]) for p, width in zip(paths, widths, strict=True))
                ):
                    worth = sum(float(fisher[path][mask].sum()) for path, mask in zip(paths, choice, strict=True))
                    best, most = (choice, worth) if worth > most else (best, most)
            np.testing.assert_array_equal(np.concatenate([got[path] for path in paths]), np.concatenate(best))
        adapters = {path: settle(x, got[path]) for path, x in adapters.items()}
        fisher = {path: fisher[path] * jnp.asarray(rng.exponential(size=shapes[path][0])) for path in shapes}


def equal(shape, width, on):
    """Every mask that keeps `width` of the channels that are on in each head."""
    channels, heads = shape
    size = channels // heads
    each = [
        [
            head
            for head in itertools.product((False, True), repeat=size)
            if sum(head) == width and (on[at : at + size] | ~np.array(head)).all()
        ]
        for at in range(0, channels, size)
    ]
    return [np.concatenate(mask) for mask in itertools.product(*each)]


def test_channels_go_slowly_for_good_and_the_event_changes_nothing():
    """Thirty steps of stage 1: ten measure, ten prune by the cubic schedule, and in ten the masks stand still."""
    method = jp.channelmask(total_steps=40, stage=0.75, channels=("fc1", "fc2"), rank=2, target=0.6)
    world = begin(method, "scan")
    state, paths = world.state, {kind: [f"layers/{kind}[{i}]" for i in range(3)] for kind in ("fc1", "fc2")}
    predict = jp.make_predict(world.forward, lambda apply, batch: apply(batch["x"]))
    before = {kind: np.ones((3, size), bool) for kind, size in (("fc1", 12), ("fc2", 8))}
    for number in range(1, 41):
        state, _ = world.step(world.params, state, world.batch)
        outputs = predict(world.params, state.adapters, state.masks, world.batch)
        pruned, decision = jp.prune(state, method, world.optimizer, world.context)
        assert bool(decision) == (number == 30)
        if decision:
            assert decision.report["channels"] == {"fc1": {"kept": 22, "of": 36}, "fc2": {"kept": 14, "of": 24}}
            np.testing.assert_array_equal(predict(world.params, pruned.adapters, pruned.masks, world.batch), outputs)
            jax.tree.map(np.testing.assert_array_equal, pruned.adapters, state.adapters)
            state = pruned
        share = 0.6 + 0.4 * (1 - min(max(number - 10, 0), 10) / 10) ** 3
        for kind, own in paths.items():
            kept = np.stack([np.asarray(state.adapters[path].channels(None)) > 0 for path in own])
            assert kept.sum() == round(share * kept.size) and kept.any(-1).all() and not (kept & ~before[kind]).any()
            before[kind] = kept
    # One target for all layers of a type, not one for each.
    assert len(set(before["fc1"].sum(-1))) > 1


def test_what_the_loss_does_not_read_goes():
    params = {"fc1": {"kernel": jnp.eye(8), "bias": jnp.ones(8)}}
    useful = jnp.array([1.0, 0, 1, 0, 1, 1, 0, 1])

    def forward(params, adapters, masks, x):
        y = adapters["fc1"].linear(x, params["fc1"]["kernel"], masks["fc1"], None)
        return adapters["fc1"].finish(y + params["fc1"]["bias"], masks["fc1"])

    reads = lambda apply, batch, key: jnp.mean(useful * jnp.square(apply(batch["x"]) - batch["x"]))  # noqa: E731
    method = jp.channelmask(total_steps=20, channels=("fc1",), rank=1, target=5 / 8)
    context = jp.Context(jax.random.key(0), params, [jp.Site("fc1", 8, 8, 0, "fc1")], forward, reads)
    start, optimizer = method.start(context), optax.adam(0.01)
    state = jp.init_state(jax.random.key(1), start.adapters, start.masks, optimizer, method)
    step = jp.make_step(forward, reads, optimizer, method, donate=False)
    for _ in range(10):
        state, _ = step(params, state, {"x": jax.random.normal(jax.random.key(2), (16, 8))})
    np.testing.assert_array_equal(state.adapters["fc1"].channels(None), useful)


@pytest.mark.parametrize("learn", ["fisher", "paper"])
@pytest.mark.parametrize("saved", [5, 12])
def test_a_run_goes_on_where_it_was_saved(learn, saved, tmp_path):
    method = jp.channelmask(total_steps=24, channels=("fc1",), rank=2, learn=learn)
    world = begin(method)

    def train(state, steps):
        for _ in range(steps):
            state, _ = world.step(world.params, state, world.batch)
            state, _ = jp.prune(state, method, world.optimizer, world.context)
        return state

    half = train(world.state, saved)
    with jp.Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(half)
    again = train(jp.Checkpoints(tmp_path).restore(world.optimizer, method), 24 - saved)
    jax.tree.map(np.testing.assert_array_equal, again[:5], train(half, 24 - saved)[:5])


def test_straight_through_gradient_is_that_of_the_tempered_sigmoid():
    logits = np.array([0.7, -0.4, 2.0, -1.5, 0.1, 3.0], np.float32)
    adapter, _ = masked(logits)
    key, tau, weight = jax.random.key(5), 0.4, np.linspace(-1, 2, 6)

    def value(logits):
        seen = dataclasses.replace(adapter, logits=draw(logits, key, jnp.float32(tau)))
        return jnp.sum(weight * seen.channels(None))

    noise = np.asarray(draw(jnp.zeros(6), key, jnp.float32(1.0)), np.float64)
    y = 1 / (1 + np.exp(-(logits.astype(np.float64) + noise) / tau))
    got, gradient = jax.value_and_grad(value)(jnp.asarray(logits))
    np.testing.assert_allclose(got, np.sum(weight * (y > 0.5)), rtol=1e-6)
    np.testing.assert_allclose(gradient, weight * y * (1 - y) / tau, rtol=1e-4, atol=1e-6)


def test_a_draw_is_one_with_the_probability_of_the_sigmoid_at_any_temperature():
    for tau in (1.0, 0.3):
        ones = draw(jnp.full(40_000, 1.2), jax.random.key(0), jnp.float32(tau)) > 0
        assert abs(float(ones.mean()) - 1 / (1 + np.exp(-1.2))) < 0.01


def test_temperature_falls_exponentially_over_stage_one_and_stays():
    got = [float(temperature(jnp.int32(step), 100, 1.0, 0.3)) for step in (0, 25, 50, 100, 400)]
    np.testing.assert_allclose(got, [1.0, 0.3**0.25, 0.3**0.5, 0.3, 0.3], rtol=1e-6)


@pytest.mark.parametrize(
    ("logits", "heads", "want"),
    [
        ([-3.0, -1, -2, -5], 1, [0, 1, 0, 0]),
        ([-3.0, -1, -2, -5], 2, [0, 1, 1, 0]),
        ([1.0, -1, -2, -2], 2, [1, 0, 1, 0]),
        ([-2.0, 4], 2, [0, 1, 0, 1]),  # one mask for both heads
        ([-3.0, -1, -2, 0], 4, [1, 1, 1, 1]),  # heads of one channel cannot lose it
    ],
)
def test_every_group_keeps_a_channel(logits, heads, want):
    if want == [1, 1, 1, 1]:
        adapter = dataclasses.replace(masked(jnp.zeros(4))[0], logits=jnp.asarray(logits), heads=4)
    else:
        adapter = masked(logits, heads)[0]
    np.testing.assert_array_equal(adapter.channels(None), want)
    np.testing.assert_array_equal(settle(adapter).channels(None), want)
    assert set(np.abs(settle(adapter).logits)) == {SETTLED}


def test_the_mask_multiplies_kernel_and_bias_and_leaves_a_dead_site_alone():
    adapter, kernel = masked([1.0, -1, 2])
    bias, x = jnp.array([0.5, 0.6, 0.7]), jax.random.normal(jax.random.key(2), (4, 5))
    y = adapter.finish(adapter.linear(x, kernel, None, None) + bias, None)
    want = np.asarray(x, np.float64) @ np.asarray(kernel, np.float64) + np.asarray(bias)
    np.testing.assert_allclose(y, want * [1, 0, 1], rtol=1e-5, atol=1e-6)
    merged = jp.merge({"fc1": {"kernel": kernel, "bias": bias}}, {"fc1": adapter}, {})
    np.testing.assert_allclose(merged["fc1"]["bias"], [0.5, 0, 0.7])
    np.testing.assert_array_equal(merged["fc1"]["kernel"][:, 1], 0)
    np.testing.assert_array_equal(adapter.channels(jnp.zeros(2)), 1)  # as if compacted


def test_a_trained_bias_is_masked_too():
    adapter, kernel = masked([1.0, -1, 2])
    params = {"fc1": {"kernel": kernel, "bias": jnp.zeros(3)}}
    trained = jp.with_weights(params, {"fc1/bias": jnp.array([2.0, 3.0, 4.0])})
    np.testing.assert_allclose(jp.merge(trained, {"fc1": adapter}, {})["fc1"]["bias"], [2, 0, 4])


def test_density_weighs_channels_by_their_parameters():
    small, big = masked([0.0, 0.0, 0.0], d_in=4)[0], masked([3.0, -1.0], heads=2, d_in=8)[0]  # 3 x 4; 2 x 2 x 8, shared
    s = 1 / (1 + np.exp(-np.array([3.0, -1.0])))
    want = (3 * 4 * 0.5 + 2 * 8 * s.sum()) / (3 * 4 + 4 * 8)
    np.testing.assert_allclose(density({"a": small, "b": big}), want, rtol=1e-6)


@pytest.mark.parametrize("goal", [0.05, 0.5, 0.75, 0.999])
def test_the_shift_makes_the_density(goal):
    rng = np.random.default_rng(1)
    adapters = {
        "a": masked(3 * rng.normal(size=40), d_in=4)[0],
        "b": masked(rng.normal(size=24) - 5, heads=4, d_in=9)[0],
    }
    shift = float(density_shift(adapters, jnp.float32(goal)))
    moved = {path: dataclasses.replace(x, logits=x.logits + shift) for path, x in adapters.items()}
    np.testing.assert_allclose(density(moved), goal, rtol=1e-4)
    same = {"a": masked([3.0] * 6)[0]}
    np.testing.assert_allclose(
        density_shift(same, jnp.float32(goal)), np.log(goal / (1 - goal)) - 3, rtol=1e-4, atol=1e-4
    )


def test_the_largest_logits_stay_and_heads_stay_equal():
    # Kernel parameters of a channel: 4 and 2. Of 4 * 4 + 6 * 2 = 28, half is 14: 3, 2 and 1.5 at 4, then 1 at 2.
    small = masked([0.5, 3.0, 1.5, 2.0], d_in=4)[0]
    wide = masked([1.0, -3.0, 0.9, -1.0, -2.0, -4.0], d_in=2)[0]
    kept = largest({"small": small, "wide": wide}, 0.5)
    np.testing.assert_array_equal(kept["small"], [0, 1, 1, 1])
    np.testing.assert_array_equal(kept["wide"], [1, 0, 0, 0, 0, 0])
    # Of twelve in three heads the eight largest lie 4, 4 and 0 to a head: each head keeps 8 / 3, rounded, of its own.
    heads = masked([9.0, 8, 7, 6, 9, 8, 7, 6, -1, -2, -3, -4], heads=3)[0]
    np.testing.assert_array_equal(largest({"v": heads}, 8 / 12)["v"], [1, 1, 1, 0] * 3)
    np.testing.assert_array_equal(largest({"v": masked([1.0, -1, -2, -3], heads=2)[0]}, 0.01)["v"], [1, 0, 1, 0])


def test_a_target_is_met_by_the_channels_that_the_loss_can_do_without():
    """Where an output channel is of no use, it goes; the density follows the cubic schedule to the step."""
    kernel = jnp.eye(8)
    params = {"fc1": {"kernel": kernel, "bias": jnp.ones(8)}}
    useful = jnp.array([1.0, 0, 1, 0, 1, 1, 0, 1])
    sites = [jp.Site("fc1", 8, 8, 0, "fc1")]

    def forward(params, adapters, masks, x):
        y = adapters["fc1"].linear(x, params["fc1"]["kernel"], masks["fc1"], None)
        return adapters["fc1"].finish(y + params["fc1"]["bias"], masks["fc1"])

    # What is of use should be 1 more than it is; the rest should be 0.
    loss_fn = lambda apply, batch, key: jnp.mean(jnp.square(apply(batch["x"]) - useful * (batch["x"] + 1)))  # noqa: E731
    method = jp.channelmask(
        total_steps=80, stage=0.5, channels=("fc1",), rank=1, target=5 / 8, learn="paper", start_logit=2.0
    )
    context = jp.Context(jax.random.key(0), params, sites, forward, loss_fn)
    start, optimizer = method.start(context), optax.adam(0.05)
    state = jp.init_state(jax.random.key(1), start.adapters, start.masks, optimizer, method)
    step = jp.make_step(forward, loss_fn, optimizer, method, donate=False)
    batch = {"x": jax.random.normal(jax.random.key(2), (16, 8))}
    first = 1 / (1 + np.exp(-2.0))
    for number in range(1, 42):
        state, _ = step(params, state, batch)
        if number <= 40:
            want = 5 / 8 + (first - 5 / 8) * (1 - number / 40) ** 3
            np.testing.assert_allclose(density(state.adapters), want, rtol=1e-4)
        state, decision = jp.prune(state, method, optimizer, context)
        assert bool(decision) == (number == 40)
    np.testing.assert_array_equal(state.adapters["fc1"].channels(None), useful)
    np.testing.assert_allclose(np.abs(state.adapters["fc1"].logits), SETTLED, rtol=1e-4)


@pytest.mark.parametrize(("layers", "parameters"), [(6, 165_888), (12, 331_776)])
def test_as_many_parameters_as_the_paper(layers, parameters):
    """DistilBERT and RoBERTa-base, DoRA of rank 8 on query and value: 0.165M and 0.331M (tables 2 and 3)."""
    kernel = np.zeros((768, 768), np.float32)
    params = {f"layer_{i}": {name: {"kernel": kernel} for name in ("query", "value")} for i in range(layers)}
    context = jp.Context(jax.random.key(0), params, jp.find_sites(params), lambda *a: None, loss_fn)
    start = jp.channelmask(total_steps=10, channels="paper_like", heads=12, learn="paper").start(context)
    assert jp.count(start.adapters, start.masks) == parameters


def test_stage_one_learns_masks_and_stage_two_keeps_them():
    method = jp.channelmask(total_steps=16, channels=("fc1",), rank=2, learn="paper", lam=3.0, start_logit=0.5)
    context, start, batch = started(method, "scan")
    optimizer = optax.adamw(0.03, weight_decay=0.1)
    state = jp.init_state(jax.random.key(0), start.adapters, start.masks, optimizer, method)
    step = jp.make_step(context.forward, loss_fn, optimizer, method, donate=False)
    gates, decisions, paths = [], [], [f"layers/fc1[{i}]" for i in range(3)]
    for _ in range(16):
        state, _ = step(context.params, state, batch)
        state, decision = jp.prune(state, method, optimizer, context)
        decisions += [decision] if decision else []
        gates.append(np.stack([np.asarray(state.adapters[path].logits) > 0 for path in paths]))
    assert len(decisions) == 1 and all(isinstance(state.adapters[path], MaskedDora) for path in paths)
    assert decisions[0].report["channels"] == {"fc1": {"kept": gates[7].sum(), "of": 36}} and 0 < gates[7].sum() < 36
    np.testing.assert_array_equal(gates[8:], [gates[7]] * 8)
    assert (gates[0] != gates[7]).any()
    np.testing.assert_array_equal([state.adapters[path].channels(None) for path in paths], gates[7])

    def training_loss(adapters):
        seen, masks = method.view((), adapters, state.masks, jax.random.key(1), jnp.int32(13))
        value = loss_fn(lambda x: context.forward(context.params, seen, masks, x), batch, None)
        return value + method.penalty((), adapters, state.masks)

    gradients = jax.jit(jax.grad(training_loss))(state.adapters)
    for path, adapter in gradients.items():
        assert np.abs(adapter.magnitude).max() > 0
        if path in paths:
            np.testing.assert_array_equal(adapter.logits, 0)


def test_uniform_control_prunes_the_smallest_magnitudes_of_every_head():
    method = jp.uniformmask(total_steps=4, channels=("fc1",), rank=2, ratio=0.5)
    context, start, batch = started(method)
    path = "layer_1/fc1"
    magnitude = np.array([5, 1, 2, 8, 3, 3, 3, 3, 9, 7, 6, 4], np.float32)  # three heads of four, ties to the left
    for shared, want in ((False, [1, 0, 0, 1, 1, 1, 0, 0, 1, 1, 0, 0]), (True, [1, 0, 0, 1] * 3)):
        adapter = mask_channels(
            to_dora({path: jp.Lora(start.adapters[path].a, start.adapters[path].b, 2.0)}, context.params)[path],
            start=SETTLED, heads=3, shared=shared,
        )  # fmt: skip
        adapter = dataclasses.replace(adapter, magnitude=jnp.asarray(magnitude))
        _, decision = method.decide((), {path: adapter}, {}, 2, context)
        np.testing.assert_array_equal(decision.adapters[path].channels(None), want)
    assert method.triggers(2) and not method.triggers(4)
    assert jp.count(start.adapters, start.masks) == jp.count(jp.dora(rank=2).start(context).adapters, start.masks)


def test_random_control_is_drawn_from_the_seeds():
    def kept(path="layer_1/fc1", key=3, **settings):
        method = jp.uniformmask(total_steps=4, channels=("fc1",), rank=2, ratio=0.5, **settings)
        context, start, _ = started(method)
        _, decision = method.decide((), start.adapters, {}, 2, context._replace(key=jax.random.key(key)))
        gates = {path: np.asarray(x.channels(None)) for path, x in decision.adapters.items()}
        assert all(gate.sum() == 6 for gate in gates.values())
        return gates[path]

    drawn = kept(choose="random")
    np.testing.assert_array_equal(drawn, kept(choose="random"))
    others = (kept(), kept(choose="random", seed=1), kept(choose="random", key=4), kept("layer_2/fc1", choose="random"))
    assert all((drawn != other).any() for other in others)


def test_wrong_settings_say_what_to_do():
    context, _, _ = started(jp.lora(rank=1))
    with pytest.raises(jp.UsageError, match="no site of type 'fc9' to mask; nearest types: fc"):
        jp.channelmask(total_steps=4, channels=("fc9",)).start(context)
    for settings, message in (
        *(({name: value}, "out of range") for name, value in (("stage", 0.0), ("lam", -1.0), ("target", 1.0))),
        *(({name: 1.0}, "out of range") for name in ("measure", "decay")),
        ({"temperatures": (1.0, 0.0)}, "out of range"),
        ({"channels": "usefull"}, "'usefull' is not known; expected one of paper_like, useful"),
        ({"learn": "Fisher"}, "'Fisher' is not known; expected one of fisher, paper"),
        ({"lam": 1.0, "target": 0.5, "learn": "paper"}, "two ways to prune; give one"),
        ({"lam": 1.0}, "lam 1.0 is a setting of learn=paper, and learn is fisher"),
        ({"learn": "paper", "decay": 0.5}, "decay 0.5 is a setting of learn=fisher, and learn is paper"),
        (
            {"learn": "paper", "start_logit": 0.0},
            "target 0.75 is above the share that start_logit 0.0 begins with, 0.500",
        ),
    ):
        with pytest.raises(jp.UsageError, match=message):
            jp.channelmask(total_steps=4, **settings)
    with pytest.raises(jp.UsageError, match="ratio 1.0 is out of range"):
        jp.uniformmask(total_steps=4, ratio=1.0)
    with pytest.raises(jp.UsageError, match="'largest' is not known; expected one of magnitude, random"):
        jp.uniformmask(total_steps=4, choose="largest")
    with pytest.raises(jp.UsageError, match="do not divide into heads=5"):
        mask_channels(masked([1.0, 2.0, 3.0])[0], heads=5)
