"""What adapters ask of Optax chains, against the chains' formulas in NumPy, and which chains a method that prunes refuses."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

import jaxprune as jp
from jaxprune.adapters import Gated
from jaxprune.adapters.weight import Weight
from jaxprune.optim import check_prunable, tailored
from jaxprune.surgery import Decision, apply, compact, gather, survivors, zero_dead
from tests.tower import begin

RATE, DECAY = 1e-2, 0.1


def gated(scale=1.0):
    draw = np.random.default_rng(0)
    leaf = lambda *shape: jnp.asarray(scale * draw.normal(size=shape), jnp.float32)  # noqa: E731
    sites = {f"layer_{i}/fc1": Gated(leaf(5, 3), leaf(3), leaf(3, 4), 2.0) for i in range(2)}
    weights = {"head/kernel": Weight(leaf(4, 2)), "head/bias": Weight(leaf(2)), "norm/scale": Weight(leaf(4))}
    return {**sites, **weights}


def masks_of(adapters):
    return {path: jnp.ones_like(x.gate) for path, x in adapters.items() if isinstance(x, Gated)}


def adam(w, g, m, v, n, decay):
    m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
    return w - RATE * (m / (1 - 0.9**n) / (np.sqrt(v / (1 - 0.999**n)) + 1e-8) + decay * w), m, v


def lion(w, g, m, v, n, decay):
    return w - RATE * (np.sign(0.9 * m + 0.1 * g) + decay * w), 0.99 * m + 0.01 * g, v


def momentum(w, g, m, v, n, decay):
    m = g + decay * w + 0.9 * m
    return w - RATE * m, m, v


def lamb(w, g, m, v, n, decay):
    m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
    u = m / (1 - 0.9**n) / (np.sqrt(v / (1 - 0.999**n)) + 1e-6) + decay * w
    ratio = np.linalg.norm(w) / np.linalg.norm(u) if decay else 1.0
    return w - RATE * ratio * u, m, v


FORMULAS = {
    "adam": (lambda: optax.adam(RATE), adam, 0.0),
    "adamw": (lambda: optax.adamw(RATE, weight_decay=DECAY), adam, DECAY),
    "warm": (lambda: optax.adamw(lambda count: RATE * (count > -1), weight_decay=DECAY), adam, DECAY),
    "sgd": (lambda: optax.chain(optax.add_decayed_weights(DECAY), optax.sgd(RATE, momentum=0.9)), momentum, DECAY),
    "lion": (lambda: optax.lion(RATE, b2=0.99, weight_decay=DECAY), lion, DECAY),
    "lamb": (lambda: optax.lamb(RATE, weight_decay=DECAY), lamb, DECAY),
    "injected": (lambda: optax.inject_hyperparams(optax.adamw)(RATE, weight_decay=DECAY), adam, DECAY),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_gates_biases_and_norms_take_no_decay(name):
    make, formula, decay = FORMULAS[name]
    adapters, slopes = gated(), gated(0.3)
    chain = tailored(make(), adapters)
    state, update = chain.init(adapters), jax.jit(chain.update)
    for _ in range(3):
        updates, state = update(slopes, state, adapters)
        adapters = optax.apply_updates(adapters, updates)
    for (keys, got), w, g in zip(
        jax.tree_util.tree_flatten_with_path(adapters)[0],
        jax.tree.leaves(gated()),
        jax.tree.leaves(slopes),
        strict=True,
    ):
        plain = keys[1].name == "gate" or keys[0].key in ("head/bias", "norm/scale")
        w, g, m, v = np.float64(w), np.float64(g), 0.0, 0.0
        for n in (1, 2, 3):
            w, m, v = formula(w, g, m, v, n, 0.0 if plain else decay)
        np.testing.assert_allclose(got, w, rtol=2e-5, atol=1e-6, err_msg=str(keys))


@pytest.mark.parametrize("make", [lambda: optax.adafactor(RATE), lambda: contrib.muon(RATE)])
def test_a_chain_without_decay_of_them_is_left_alone(make):
    """Adafactor scales a step by the size of the leaf, which it must see."""
    adapters, optimizer = gated(), make()
    slopes = gated(0.3)
    plain, tail = (c.update(slopes, c.init(adapters), adapters)[0] for c in (optimizer, tailored(optimizer, adapters)))
    jax.tree.map(np.testing.assert_array_equal, plain, tail)


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: optax.adafactor(RATE, weight_decay_rate=DECAY), "scales steps by the size"),
        (lambda: contrib.schedule_free_adamw(RATE, weight_decay=DECAY), "keeps copies"),
    ],
)
def test_a_chain_whose_decay_cannot_be_told_is_refused(make, why):
    with pytest.raises(jp.UsageError, match=f"{why}.* so gate of 'layer_0/fc1'"):
        tailored(make(), gated())
    weights = {path: x for path, x in gated().items() if isinstance(x, Weight)}
    optimizer = make()
    assert tailored(optimizer, weights) is optimizer


def test_rates_and_frozen_leaves():
    @dataclasses.dataclass(frozen=True)
    class Kind:
        a: jax.Array
        b: jax.Array
        frozen = ("a",)
        rate = {"b": 10.0}  # noqa: RUF012

    jax.tree_util.register_dataclass(Kind, ["a", "b"], [])
    adapters = {"s": Kind(jnp.ones(3), jnp.ones(3))}
    chain = tailored(optax.sgd(RATE, momentum=0.9), adapters)
    state = chain.init(adapters)
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) == 3
    updates, _ = chain.update({"s": Kind(jnp.zeros(3), jnp.full(3, 2.0))}, state, adapters)
    np.testing.assert_allclose(optax.apply_updates(adapters, updates)["s"].b, 1 - 10 * RATE * 2, rtol=1e-6)


def test_a_users_own_chain_and_loop_get_it():
    """SoRA's gates under a plain AdamW with a decay that would halve them."""
    world = begin(jp.sora(rank=3, total_steps=40, threshold=0.0), optimizer=optax.adamw(1e-6, weight_decay=5e5))
    state, _ = world.step(world.params, world.state, world.batch)
    for path, adapter in state.adapters.items():
        np.testing.assert_allclose(adapter.gate, world.start.adapters[path].gate, atol=1e-5)
        np.testing.assert_allclose(adapter.a, world.start.adapters[path].a / 2, atol=1e-5)


def labelled(tree):
    return jax.tree.map(lambda leaf: "matrix" if leaf.ndim > 1 else "vector", tree)


TWO = {"matrix": optax.adamw(RATE), "vector": optax.sgd(RATE, momentum=0.9)}
FOLLOWS = {
    "adamw": lambda tree: optax.adamw(RATE),
    "lamb": lambda tree: optax.lamb(RATE, weight_decay=DECAY),
    "masked": lambda tree: optax.masked(optax.adam(RATE), lambda t: jax.tree.map(lambda x: x.ndim > 1, t)),
    "partition": lambda tree: optax.partition(TWO, labelled),
    "multi_transform": lambda tree: optax.multi_transform(TWO, labelled),
    "clipped": lambda tree: optax.chain(optax.clip_by_global_norm(1.0), optax.adam(optax.linear_schedule(0, RATE, 9))),
    "every second": lambda tree: optax.MultiSteps(optax.adamw(RATE), 2).gradient_transformation(),
    "injected": lambda tree: optax.inject_hyperparams(optax.adamw)(learning_rate=RATE),
    "muon": lambda tree: contrib.muon(RATE, consistent_rms=0.2),
}
REFUSED = {
    "masked": (
        lambda tree: optax.masked(optax.adam(RATE), jax.tree.map(lambda x: x.ndim > 1, tree)),
        "masks and labels",
    ),
    "multi_transform": (lambda tree: optax.multi_transform(TWO, labelled(tree)), "masks and labels as functions"),
    "partition": (lambda tree: optax.partition(TWO, labelled(tree)), "optimizer partition .*masks and labels"),
    "flatten": (lambda tree: optax.flatten(optax.adam(RATE)), "optimizer flatten .*cannot go on"),
    "sm3": (lambda tree: optax.sm3(RATE), "components cannot be told"),
    "noise": (
        lambda tree: optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(0)), optax.adam(RATE)),
        "AddNoiseState",
    ),
    "muon": (lambda tree: contrib.muon(RATE), "MuonState.* depend on how many components"),
    "adafactor": (lambda tree: optax.adafactor(RATE), "FactoredState.* depend on how many components"),
}


@pytest.mark.parametrize("name", FOLLOWS)
def test_a_chain_that_follows_makes_the_same_steps_after_compaction(name):
    adapters = gated()
    masks = masks_of(adapters)
    check_prunable(optimizer := FOLLOWS[name](adapters), adapters, masks)
    chain = tailored(optimizer, adapters)
    dead = {"layer_0/fc1": np.array([1.0, 0, 1]), "layer_1/fc1": np.zeros(3)}
    state, update = chain.init(adapters), jax.jit(chain.update)
    updates, state = update(gated(0.3), state, adapters)
    adapters, masks, state = apply(Decision(dead), optax.apply_updates(adapters, updates), masks, state, chain)
    kept, (small, _, less) = survivors(masks), compact(adapters, masks, state, chain)
    slopes = zero_dead(gated(0.2), masks)
    for _ in range(3):
        updates, state = update(slopes, state, adapters)
        small_updates, less = update(gather(slopes, kept), less, small)
        adapters, small = optax.apply_updates(adapters, updates), optax.apply_updates(small, small_updates)
    for a, b in zip(jax.tree.leaves(gather(adapters, kept)), jax.tree.leaves(small), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", REFUSED)
def test_a_chain_that_cannot_follow_is_refused_before_training(name):
    make, message = REFUSED[name]
    start = begin(jp.lora(rank=3)).start
    with pytest.raises(jp.UsageError, match=message) as caught:
        optimizer = make(start.adapters)
        jp.init_state(jax.random.key(0), start.adapters, start.masks, optimizer, jp.prunedlora(rank=3, target=1))
    assert "\n" not in str(caught.value)
    jp.init_state(jax.random.key(0), start.adapters, start.masks, make(start.adapters), jp.lora(rank=3))


@pytest.mark.parametrize("rank", [4, 6])
def test_muon_at_a_site_with_as_many_components_as_entries_is_refused(rank):
    """Its steps are as large as the root of the longer side, which is then the rank."""
    adapters = {"s": jp.Lora(jnp.ones((8, rank)), jnp.ones((rank, 4)), 2.0)}
    with pytest.raises(jp.UsageError, match="how many components"):
        check_prunable(contrib.muon(RATE, consistent_rms=0.2), adapters, {"s": jnp.ones(rank)})


def test_a_method_that_only_changes_adapters_takes_any_chain():
    """Channel masks under Muon and SM3, whose steps would not survive the loss of a component."""
    for optimizer in contrib.muon(RATE), optax.sm3(RATE):
        method = jp.uniformmask(total_steps=4, channels=("fc1",))
        world = begin(method, optimizer=optimizer)
        one = other = world.state
        for number in range(1, 5):
            one, other = (world.step(world.params, state, world.batch)[0] for state in (one, other))
            (one, decision), (other, _) = (jp.prune(state, method, optimizer, world.context) for state in (one, other))
            assert (decision is not None) == (number == 2)
            other = jp.compacted(other, method, optimizer)
        jax.tree.map(np.testing.assert_array_equal, one.adapters, other.adapters)


def test_adafactor_follows_where_whole_sites_go():
    """Factored moments of a site go with it; those of the others stay."""
    draw = np.random.default_rng(0)
    leaf = lambda *shape: jnp.asarray(draw.normal(size=shape), jnp.float32)  # noqa: E731
    tree = lambda: {f"layer_{i}/fc1": jp.Lora(leaf(9, 5), leaf(5, 7), 2.0) for i in range(3)}  # noqa: E731
    adapters, slopes = tree(), tree()
    masks = {path: jnp.ones(5) for path in adapters}
    optimizer = optax.adafactor(RATE, min_dim_size_to_factor=4, momentum=0.9)
    with pytest.raises(jp.UsageError, match="components cannot be told"):
        check_prunable(optimizer, adapters, masks)
    check_prunable(optimizer, adapters, masks, "sites")
    state, update = optimizer.init(adapters), jax.jit(optimizer.update)
    updates, state = update(slopes, state, adapters)
    dead = Decision({"layer_1/fc1": np.zeros(5)})
    adapters, masks, state = apply(dead, optax.apply_updates(adapters, updates), masks, state, optimizer)
    small, _, less = compact(adapters, masks, state, optimizer)
    for _ in range(3):
        slopes = zero_dead(tree(), masks)
        updates, state = update(slopes, state, adapters)
        small_updates, less = update({path: slopes[path] for path in small}, less, small)
        adapters = zero_dead(optax.apply_updates(adapters, updates), masks)
        small = optax.apply_updates(small, small_updates)
    assert len(small) == 2 and len(jax.tree.leaves(less)) < len(jax.tree.leaves(state))
    for path, adapter in small.items():
        np.testing.assert_allclose(adapter.a, adapters[path].a, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(adapter.b, adapters[path].b, rtol=1e-5, atol=1e-7)


def by_mean_of_all():
    """A chain whose steps depend on the mean over everything that is trained."""

    def update(updates, state, params=None):
        mean = sum(jnp.sum(jnp.abs(x)) for x in jax.tree.leaves(updates)) / sum(
            x.size for x in jax.tree.leaves(updates)
        )
        return jax.tree.map(lambda x: x * mean, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def test_a_chain_that_counts_everything_is_refused_where_whole_sites_go():
    adapters = gated()
    for removes in "components", "sites":
        with pytest.raises(jp.UsageError, match=f"how many {removes}"):
            check_prunable(by_mean_of_all(), adapters, masks_of(adapters), removes)


def test_it_is_found_out_once():
    adapters = gated()
    optimizer, calls = optax.adamw(RATE), []
    counted = optax.GradientTransformation(optimizer.init, lambda *a: calls.append(1) or optimizer.update(*a))
    check = functools.partial(check_prunable, counted, adapters, masks_of(adapters))
    check()
    first = len(calls)
    check()
    assert first > 0 and len(calls) == first
