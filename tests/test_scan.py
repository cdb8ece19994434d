"""Six layers, unrolled and scanned over any axis: the same weights give the same scores, plans, events and losses."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp
from jaxprune.sites import flatten
from tests.tower import Block, loss_fn

LAYERS, TYPES = 6, ("fc1", "fc2")
# How the layers are stored, and the name of layer i's kernel.
FORMS = {"0": "layers/{}[{}]", "1": "layers/{}[:,{}]", "-1": "layers/{}[:,:,{}]", "remat 0": "layers/{}[{}]"}
every = pytest.mark.parametrize("form", FORMS)


class Six(nn.Module):
    form: str = ""

    @nn.compact
    def __call__(self, x):
        block = nn.remat(Block) if "remat" in self.form else Block
        if self.form:
            axis = int(self.form.split()[-1])
            stack = nn.scan(
                block, variable_axes={"params": axis}, split_rngs={"params": True, "dropout": True}, length=LAYERS
            )
            x, _ = stack(name="layers")(x, None)
        else:
            for i in range(LAYERS):
                x, _ = block(name=f"layer_{i}")(x)
        return nn.Dense(2, name="head")(x.mean(axis=1))


@functools.lru_cache
def setting(form=""):
    """Return (params, forward, sites, batch, renamed): `renamed` maps paths of the unrolled model to this form's."""
    x = jax.random.normal(jax.random.key(7), (4, 5, 8))
    unrolled = jax.jit(Six().init)(jax.random.key(0), x)["params"]
    params, renamed = unrolled, {f"layer_{i}/{t}": f"layer_{i}/{t}" for i in range(LAYERS) for t in TYPES}
    if form:
        axis = int(form.split()[-1])
        layers = [unrolled[f"layer_{i}"] for i in range(LAYERS)]
        params = {"layers": jax.tree.map(lambda *w: jnp.stack(w, axis), *layers), "head": unrolled["head"]}
        renamed = {f"layer_{i}/{t}": FORMS[form].format(t, i) for i in range(LAYERS) for t in TYPES}
    model = Six(form)
    sites = jp.find_sites(params, call=lambda params: model.apply({"params": params}, x))
    return params, jp.attach(model), sites, {"x": x}, renamed


def moved(tree, names):
    return {names[path]: value for path, value in tree.items()}


@every
def test_layers_are_sites_of_their_own(form):
    _, _, sites, _, renamed = setting(form)
    plain = setting()[2]
    assert [s.path for s in sites] == [renamed[s.path] for s in plain]
    of = lambda s: (s.d_in, s.d_out, s.layer, s.type, s.cost(3))  # noqa: E731
    assert [of(s) for s in sites] == [of(s) for s in plain]
    assert {s.module for s in sites} == {"layers/fc1", "layers/fc2"}
    assert [i for s in sites for i in s.index if i is not None] == [s.layer for s in plain]


@every
def test_adapters_of_unequal_ranks_and_scales_on_some_layers(form):
    """The stack inside the step against the unrolled model: outputs, gradients, merged kernels."""
    ranks = {"layer_0/fc1": 3, "layer_2/fc1": 1, "layer_5/fc1": 2, "layer_4/fc2": 2}
    plain, forward0, sites, batch, _ = setting()
    adapters, masks = jp.init_lora(jax.random.key(1), sites, ranks, alpha=4.0)
    adapters = jax.tree.map(lambda leaf: leaf + 0.1, adapters)
    masks["layer_0/fc1"] = masks["layer_0/fc1"].at[1].set(0)
    params, forward, _, _, names = setting(form)
    loss = lambda forward, params, adapters, masks: jnp.sum(forward(params, adapters, masks, batch["x"]) ** 2)  # noqa: E731
    grad = lambda f, p, a, m: jax.jit(jax.value_and_grad(lambda a: loss(f, p, a, m)))(a)  # noqa: E731
    expected, wanted = grad(forward0, plain, adapters, masks)
    here = moved(adapters, names), moved(masks, names)
    value, grads = grad(forward, params, *here)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for path, adapter in wanted.items():
        for name in ("a", "b"):
            np.testing.assert_allclose(getattr(grads[names[path]], name), getattr(adapter, name), rtol=1e-4, atol=1e-5)
    assert jp.count(*here) == jp.count(adapters, masks)
    merged, by_layer = flatten(jp.merge(params, *here)), flatten(jp.merge(plain, adapters, masks))
    for path, name in names.items():
        site = next(s for s in setting(form)[2] if s.path == name)
        index = tuple(slice(None) if i is None else i for i in site.index)
        np.testing.assert_allclose(merged[f"{site.module}/kernel"][index], by_layer[f"{path}/kernel"], rtol=1e-6)


@every
def test_equal_scores(form):
    plain, forward0, sites0, batch, _ = setting()
    params, forward, sites, _, names = setting(form)
    for kind in ("absolute", "activation", "weight"):
        expected = jp.site_scores(kind, forward0, loss_fn, plain, sites0, [batch])
        scores = jp.site_scores(kind, forward, loss_fn, params, sites, [batch])
        assert scores == pytest.approx(moved(expected, names), rel=1e-5)
        assert len(set(scores.values())) == 2 * LAYERS


METHODS = {
    "oplora": lambda: jp.oplora(budget=500, ranks=range(5), solver="DP"),
    "dplora": lambda: jp.dplora(jp.oplora(budget=500, ranks=range(5), solver="DP"), total_steps=40, events=4),
    "g2r2": lambda: jp.g2r2(rank=3, warmup=5, progressive=20, interval=5),
    "adalora": lambda: jp.adalora(total_steps=40, init_rank=4, target_rank=2, tinit=4, tfinal=16, alpha=32),
    "prunedlora": lambda: jp.prunedlora(rank=4, target=2, interval=8, total_steps=40),
}


@pytest.mark.parametrize("name", METHODS)
def test_equal_plans_masks_and_losses_over_forty_steps(name):
    method, runs = METHODS[name](), []
    for form in ("", "1"):
        params, forward, sites, batch, names = setting(form)
        context = jp.Context(jax.random.key(3), params, sites, forward, loss_fn, [batch], [{"x": batch["x"][:, None]}])
        start = method.start(context)
        if not form:
            adapters, masks = start.adapters, start.masks
        optimizer = optax.adamw(1e-2)
        state = jp.init_state(jax.random.key(4), moved(adapters, names), moved(masks, names), optimizer, method)
        step, losses, events = jp.make_step(forward, loss_fn, optimizer, method, donate=False), [], []
        for _ in range(40):
            state, metrics = step(params, state, batch)
            losses.append(float(metrics["loss"]))
            state, decision = jp.prune(state, method, optimizer, context)
            if decision:
                events.append(
                    {path: np.asarray(state.masks[there]) for path, there in names.items() if there in state.masks}
                )
        assert start.plan
        plan = {path: start.plan.ranks[there] for path, there in names.items()}
        runs.append((plan, np.array(losses), events))
    (plan, losses, events), (other_plan, other_losses, other_events) = runs
    assert plan == other_plan and len(events) == len(other_events)
    for one, other in zip(events, other_events, strict=True):
        jax.tree.map(np.testing.assert_array_equal, one, other)
    np.testing.assert_allclose(other_losses, losses, rtol=1e-5, atol=1e-6)
    assert losses[-1] < losses[0] and (name == "oplora" or events)


def test_which_axis_is_scanned_is_read_from_all_leaves_of_the_scan():
    """With as many layers as features a kernel's own shape does not tell."""

    class Square(nn.Module):
        @nn.compact
        def __call__(self, x, _=None):
            x = nn.Dense(4, name="fc1", use_bias=False)(x)
            return x * self.param("scale", nn.initializers.ones, self.scale).sum(), None

        scale: tuple[int, ...] = (4, 4)

    def third(axis, scale):
        stack = nn.scan(Square, variable_axes={"params": axis}, split_rngs={"params": True}, length=4)(scale)
        params = stack.init(jax.random.key(0), jnp.ones((2, 4)), None)["params"]
        sites = jp.find_sites(params, call=lambda params: stack.apply({"params": params}, jnp.ones((2, 4)), None))
        return [site.path for site in sites if site.layer == 2]

    assert third(0, (3,)) == ["fc1[2]"] and third(1, (3, 5)) == ["fc1[:,2]"] and third(-1, (3, 5)) == ["fc1[:,:,2]"]
    with pytest.raises(jp.UsageError, match="does not tell the axis of the scan"):
        third(0, (4, 4))
