"""Models written elsewhere, in the usual styles: found, scored, planned, trained, pruned and merged."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp
from jaxprune.sites import flatten, leaf_at


class ViTBlock(nn.Module):
    """A pre-norm encoder block, as in Flax's own vision transformers."""

    @nn.compact
    def __call__(self, x):
        y = nn.MultiHeadDotProductAttention(num_heads=2, name="attention")(nn.LayerNorm()(x))
        x = x + y
        y = nn.Dense(12, name="fc2")(nn.gelu(nn.Dense(20, name="fc1")(nn.LayerNorm()(x))))
        return x + y


class ViT(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(12, (4, 4), strides=(4, 4), padding="VALID", name="patches")(x)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        for i in range(2):
            x = ViTBlock(name=f"encoderblock_{i}")(x)
        return nn.Dense(3, name="head")(x.mean(1))


class ConvNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(6, (3, 3), name="conv1")(x))
        x = nn.relu(nn.Conv(8, (3, 3), strides=2, feature_group_count=2, name="conv2")(x))
        return nn.Dense(3, name="head")(nn.Dense(9)(x.mean((1, 2))))


class BatchNormed(nn.Module):
    """Convolutions with running statistics, which a training pass updates."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Conv(6, (3, 3))(x)))
        return nn.Dense(3, name="head")(nn.Dense(9)(x.mean((1, 2))))


class Recurrent(nn.Module):
    @nn.compact
    def __call__(self, x):
        cell = nn.LSTMCell(10, carry_init=lambda key, shape, dtype: jnp.zeros(shape))  # float64 where JAX has it
        x = nn.RNN(cell, split_rngs={"params": False, "dropout": True})(x)
        return nn.Dense(3, name="head")(jnp.asarray(x)[:, -1])


class Tied(nn.Module):
    """One block used three times, and an embedding that is the output layer too."""

    @nn.compact
    def __call__(self, x):
        embed, block = nn.Embed(11, 8, name="embed"), nn.Dense(8, name="block")
        x = embed((jnp.abs(x[..., 0]) * 10).astype(jnp.int32) % 11)
        for _ in range(3):
            x = x + jnp.tanh(block(x))
        return embed.attend(x).mean(1)[:, :3]


class General(nn.Module):
    """Products over several axes, by nn.DenseGeneral and nn.Einsum."""

    @nn.compact
    def __call__(self, x):
        x = nn.DenseGeneral((2, 5), name="split")(x)
        x = nn.DenseGeneral(6, axis=(-1, 1), name="mix")(x)
        x = nn.Einsum((6, 2, 4), "bod,dhk->bohk", name="spread")(x)
        return nn.DenseGeneral(3, axis=(1, 2, 3), name="head")(x)


def images(key):
    return jax.random.normal(key, (4, 8, 8, 2))


def tokens(key):
    return jax.random.normal(key, (4, 6, 7))


# (model, inputs, targets, {site: (d_in, d_out)})
CASES = {
    "vit": (ViT(), images, "all-linear", {
        "patches": (32, 12),
        **{f"encoderblock_{i}/attention/{kind}": (12, 12) for i in range(2) for kind in ("query", "key", "value", "out")},
        **{f"encoderblock_{i}/fc1": (12, 20) for i in range(2)},
        **{f"encoderblock_{i}/fc2": (20, 12) for i in range(2)},
    }),
    "convnet": (ConvNet(), images, "all-linear", {"conv1": (18, 6), "conv2": (27, 8), "Dense_0": (8, 9)}),
    "batchnorm": (BatchNormed(), images, "all-linear", {"Conv_0": (18, 6), "Dense_0": (6, 9)}),
    "lstm": (Recurrent(), tokens, "all-linear", {
        **{f"LSTMCell_0/i{gate}": (7, 10) for gate in "ifgo"}, **{f"LSTMCell_0/h{gate}": (10, 10) for gate in "ifgo"},
    }),
    "tied": (Tied(), tokens, ["embed", "block"], {"embed": (11, 8), "block": (8, 8)}),
    "general": (General(), tokens, ["split", "mix", "spread", "head"], {
        "split": (7, 10), "mix": (30, 6), "spread": (6, 8), "head": (16, 3),
    }),
}  # fmt: skip
every = pytest.mark.parametrize("name", CASES)


@functools.lru_cache
def setting(name):
    """Return (call, forward, params, x, sites); `call(params, x)` is the model by itself."""
    model, inputs, targets, _ = CASES[name]
    x = inputs(jax.random.key(1))
    variables = jax.jit(model.init)(jax.random.key(0), x)
    params = jax.tree.map(lambda v: v + 0.01, variables.pop("params"))

    def call(params, x):
        return model.apply({"params": params, **variables}, x)

    attached = jp.attach(model)
    forward = lambda *args, **kw: attached(*args, variables=variables, **kw)  # noqa: E731
    return call, forward, params, x, jp.find_sites(params, targets, call=lambda params: call(params, x))


def loss_fn(apply, batch, key):
    return jnp.mean(jnp.square(apply(batch, rngs=None if key is None else {"dropout": key}) - 1.0))


@every
def test_sites_are_the_matrices_that_the_model_multiplies_by(name):
    sites = setting(name)[-1]
    assert {site.path: (site.d_in, site.d_out) for site in sites} == CASES[name][-1]


@every
def test_scored_planned_trained_pruned_and_merged(name):
    call, forward, params, x, sites = setting(name)
    dropout = 0.0 if name == "tied" else 0.3  # an embedding has no inputs to drop
    context = jp.Context(jax.random.key(3), params, sites, forward, loss_fn, [x], [x[:, None]])
    # At 0.6 of the budget a quarter of the components goes.
    method = jp.dplora(jp.oplora(budget=6 * len(sites) * 20, ranks=range(4), dropout=dropout), total_steps=8, events=2)
    start, optimizer = method.start(context), optax.adam(3e-2)
    state = jp.init_state(jax.random.key(4), start.adapters, start.masks, optimizer, method)
    step = jp.make_step(forward, loss_fn, optimizer, method, donate=False)
    losses = []
    for _ in range(8):
        state, metrics = step(params, state, x)
        losses.append(float(metrics["loss"]))
        state, _ = jp.prune(state, method, optimizer, context)
    state = jp.compacted(state, method, optimizer)
    assert start.plan and losses[-1] < losses[0]
    assert sum(start.plan.ranks.values()) > sum(m.size for m in state.masks.values())
    adapted = jax.jit(forward)(params, state.adapters, state.masks, x)
    merged = jax.jit(call)(jp.merge(params, state.adapters, state.masks), x)
    np.testing.assert_allclose(merged, adapted, rtol=1e-5, atol=1e-5)
    assert np.abs(adapted - call(params, x)).max() > 1e-3


def test_statistics_are_passed_in_and_returned_as_linen_does():
    model, params, x = BatchNormed(), setting("batchnorm")[2], images(jax.random.key(1))
    stats = model.init(jax.random.key(0), x)["batch_stats"]
    lora, masks = jp.init_lora(jax.random.key(1), jp.find_sites(params, ["Dense_0"]), {"Dense_0": 2})
    for mutable in (["batch_stats"], True):
        outputs, updated = jp.attach(model)(
            params, lora, masks, x, variables={"batch_stats": stats}, mutable=mutable, train=True
        )
        expected, new = model.apply({"params": params, "batch_stats": stats}, x, train=True, mutable=["batch_stats"])
        np.testing.assert_allclose(outputs, expected, rtol=1e-6)
        jax.tree.map(np.testing.assert_array_equal, dict(updated), dict(new))
    with pytest.raises(jp.UsageError, match="collections beside 'params'"):
        jp.attach(model)(params, {}, {}, x, variables={"params": params})


def test_dropout_without_a_key_is_an_error_where_an_adapter_is_trained():
    _, forward, params, x, sites = setting("convnet")
    adapters, masks = jp.init_lora(jax.random.key(1), sites, {s.path: 2 for s in sites}, dropout=0.5)
    loss = lambda adapters: jnp.sum(forward(params, adapters, masks, x))  # noqa: E731
    assert np.isfinite(jax.jit(loss)(adapters))
    with pytest.raises(
        jp.UsageError, match=r"'conv1' has dropout and is trained without a random key.*rngs=\{'dropout'"
    ):
        jax.jit(jax.grad(loss))(adapters)


@pytest.mark.parametrize(
    ("module", "why"),
    [
        (nn.DenseGeneral(3, axis=-1, batch_dims=(0,)), "batch_dims holds several matrices"),
        (nn.Einsum((6, 7, 3), "bnd,ndh->bnh"), "one for each entry of an axis"),
        (nn.Einsum((3, 7), "bnd,hd->bnh"), "is no matrix: expected its summed axes first"),
        (nn.OptimizedLSTMCell(4), "belongs to a DenseParams"),
    ],
)
def test_a_kernel_out_of_reach_is_left_out_or_refused_by_name(module, why):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            y = nn.RNN(module) if isinstance(module, nn.OptimizedLSTMCell) else module.copy(name="inner")
            return nn.Dense(2, name="outer")(y(x))

    x = tokens(jax.random.key(0))
    params = Model().init(jax.random.key(0), x)["params"]
    call = lambda params: Model().apply({"params": params}, x)  # noqa: E731
    assert [site.path for site in jp.find_sites(params, call=call)] == ["outer"]
    with pytest.raises(jp.UsageError, match=f"no adapter reaches '.*{why}.*leave it out of the targets"):
        jp.find_sites(params, "(inner|RNN_0).*", call=call)


@every
def test_scores_are_those_of_the_whole_gradient(name):
    """However often a kernel is used: against dense gradients in float64."""
    call, forward, params, x, sites = setting(name)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf, np.float64)), (params, x))
        grads = flatten(jax.jit(jax.grad(lambda p, x: jnp.mean(jnp.square(call(p, x) - 1.0))))(*wide))
        dense = {site.path: np.abs(grads[leaf_at(grads, site.path)[0]]).mean() for site in sites}
    scores = jp.site_scores("absolute", forward, loss_fn, params, sites, [x])
    assert scores == pytest.approx(dense, rel=1e-4)


def test_activations_are_averaged_over_all_uses():
    call, forward, params, x, _ = setting("tied")
    sites = jp.find_sites(params, ["block"], call=lambda params: call(params, x))
    h, sizes = np.asarray(params["embed"]["embedding"])[np.asarray(jnp.abs(x[..., 0]) * 10, int) % 11], []
    for _ in range(3):
        z = h @ np.asarray(params["block"]["kernel"])
        h = h + np.tanh(z + params["block"]["bias"])
        sizes.append(np.abs(z).mean())
    score = jp.site_scores("activation", forward, loss_fn, params, sites, [x])
    assert score["block"] == pytest.approx(np.mean(sizes), rel=1e-5)


def test_shapes_alone_do_not_tell_the_matrices_of_attention():
    """They look like stacks of layers; adapters of wrong sizes are refused by the model too."""
    _, forward, params, x, _ = setting("vit")
    with pytest.raises(
        jp.UsageError, match=r"shape \(12, 2, 6\), which does not tell its matrix; pass call=lambda params"
    ):
        jp.find_sites(params, ["query"])
    sites = [jp.Site("encoderblock_0/attention/query", 24, 6, 0, "query")]
    adapters, masks = jp.init_lora(jax.random.key(1), sites, {site.path: 1 for site in sites})
    with pytest.raises(jp.UsageError, match=r"one matrix of \(12, 12\); make it from find_sites\(params, call="):
        forward(params, adapters, masks, x)
