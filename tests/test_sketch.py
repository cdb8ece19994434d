"""Sketches of gradients against dense gradients, multiplied and decomposed in float64 by NumPy."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from jaxprune.scores import gradient_svd
from jaxprune.scores.sketch import Sketch, draw, low_rank, sketch_gradients
from jaxprune.sites import flatten, layer_of, leaf_at
from tests.tower import FORMS, sites_of, tower

KEY = jax.random.key(5)


def loss_fn(apply, batch, key):
    assert key is None
    return jnp.mean(jnp.square(apply(batch["x"]) - batch["y"]))


def dense(apply, params, sites, batches):
    """Return the mean gradient of every site's kernel as a float64 matrix."""
    grad = jax.jit(jax.grad(lambda p, batch: loss_fn(lambda x: apply(p, x), batch, None)))
    flat = [flatten(grad(params, batch)) for batch in batches]

    def leaf(tree, s):
        path, index = leaf_at(tree, s.path)
        return layer_of(tree[path], index).reshape(s.d_in, s.d_out)

    return {s.path: np.mean([np.asarray(leaf(tree, s), np.float64) for tree in flat], axis=0) for s in sites}


class Odd(nn.Module):
    """A kernel that runs twice, kernels of several axes, a convolution and an embedding."""

    @nn.compact
    def __call__(self, x):
        shared = nn.Dense(8, name="shared")
        x = x + jnp.tanh(shared(jnp.tanh(shared(x))))
        x = nn.Conv(6, (3,), name="conv")(x)
        return nn.MultiHeadDotProductAttention(2, qkv_features=4, name="attention")(x, x) + nn.Embed(
            3, 6, name="embed"
        )((x[..., 0] > 0).astype(int))


def world(form):
    """Return (apply, forward, params, sites, batches)."""
    if form == "odd":
        model, x = Odd(), tower()[2]
        params = jax.jit(model.init)(jax.random.key(0), x)["params"]
        sites = jp.find_sites(params, ".*", call=lambda params: model.apply({"params": params}, x))
        assert {site.type for site in sites} == {"shared", "conv", "query", "key", "value", "out", "embed"}
    else:
        model, params, x = tower(form)
        sites = sites_of(form)
    apply = lambda p, x: model.apply({"params": p}, x)  # noqa: E731
    shape = jax.eval_shape(apply, params, x).shape
    batches = [{"x": x * (1 + i), "y": jnp.full(shape, 0.5 * i)} for i in range(3)]
    return apply, jp.attach(model), params, sites, batches


@functools.cache
def case(form, function):
    apply, forward, params, sites, batches = world(form)
    return (
        jp.attach_function(apply) if function else forward,
        params,
        sites,
        batches,
        dense(apply, params, sites, batches),
    )


every = pytest.mark.parametrize(
    "form, function", [*((f, False) for f in (*FORMS, "odd")), ("scan", True), ("odd", True)]
)


@every
def test_a_sketch_is_the_thin_products_with_the_dense_gradient(form, function):
    forward, params, sites, batches, dense = case(form, function)
    drawn = {site.path: draw(KEY, site, 3) for site in sites}
    sketches = sketch_gradients(forward, loss_fn, params, drawn, iter(batches))
    assert len({d.omega.tobytes() for d in drawn.values()}) == len(sites) == len(sketches)
    for site in sites:
        (y, z), (omega, psi), g = sketches[site.path], drawn[site.path], dense[site.path]
        few = min(3, site.d_in, site.d_out)
        assert omega.shape == (site.d_out, few) and psi.shape == (site.d_in, min(3 * few, site.d_in))
        np.testing.assert_allclose(y, g @ omega, rtol=1e-5, atol=1e-5 * np.abs(g).max())
        np.testing.assert_allclose(z, psi.T @ g, rtol=1e-5, atol=1e-5 * np.abs(g).max())


@every
def test_spectra_of_small_kernels_are_exact(form, function):
    forward, params, sites, batches, dense = case(form, function)
    spectra = jp.gradient_spectra(forward, loss_fn, params, sites, batches, key=KEY)
    assert spectra.keys() == dense.keys()
    for path, g in dense.items():
        exact = np.linalg.svd(g, compute_uv=False)
        np.testing.assert_allclose(spectra[path], exact, rtol=1e-4, atol=1e-5 * exact[0])


def decaying(rng, d_in, d_out, rank, decay):
    u, v = (np.linalg.qr(rng.normal(size=(size, rank)))[0] for size in (d_in, d_out))
    return (u * decay ** np.arange(rank)) @ v.T


@pytest.mark.parametrize("shape", [(90, 70), (60, 200), (200, 20)])
def test_low_rank_from_a_sketch(shape):
    """Exact up to rank k; beyond it, close for a spectrum that falls; of zero, zero."""
    rng, site = np.random.default_rng(0), jp.Site("a/fc", *shape, 0, "fc")
    drawn = draw(KEY, site, 16)
    of = lambda g: low_rank(Sketch(g @ drawn.omega, np.asarray(drawn.psi, np.float64).T @ g), drawn)  # noqa: E731
    for rank, tolerance in [(16, 1e-12), (20, 0.02)]:
        g = decaying(rng, *shape, rank, 0.7)
        u, s, vt = of(g)
        np.testing.assert_allclose(u.T @ u, np.eye(16), atol=1e-12)
        np.testing.assert_allclose((u * s) @ vt, g, atol=tolerance)
        np.testing.assert_allclose(s[:8], np.linalg.svd(g, compute_uv=False)[:8], rtol=tolerance)
    assert not of(np.zeros(shape)).s.any()


def test_other_keys_draw_other_matrices_and_paths_their_own():
    sites = [jp.Site(path, 12, 9, 0, "fc") for path in ("a/fc", "b/fc")]
    same, other = draw(KEY, sites[0], 4), draw(jax.random.key(6), sites[0], 4)
    np.testing.assert_array_equal(draw(KEY, sites[0], 4).psi, same.psi)
    for left, right in ((same, other), (same, draw(KEY, sites[1], 4))):
        assert all(np.abs(a - b).max() > 0.1 for a, b in zip(left, right, strict=True))


def test_bad_input():
    forward, params, sites, batches, _ = case("plain", False)
    measure = functools.partial(gradient_svd, forward, loss_fn, params)
    with pytest.raises(jp.UsageError, match="a sketch of gradients needs at least one batch and got none"):
        measure(sites, [], key=KEY)
    with pytest.raises(jp.UsageError, match="batches .* cannot be used: expected a list of batches"):
        measure(sites, batches[0], key=KEY)
    with pytest.raises(jp.UsageError, match="columns 0 is out of range; expected a whole number, 1 or more"):
        measure(sites, batches, key=KEY, columns=0)
    with pytest.raises(jp.UsageError, match="site 'nowhere' is not in the parameters"):
        measure([jp.Site("nowhere", 8, 8, 0, "fc")], batches, key=KEY)
    with pytest.raises(jp.UsageError, match="key 3 is no random key"):
        measure(sites, batches, key=3)
    with pytest.raises(jp.UsageError, match="the gradient is not finite at layer_0/fc1, .* and 3 more; check the loss"):
        measure(sites, [{**batches[0], "x": batches[0]["x"] * jnp.nan}], key=KEY)


def test_no_dense_gradient_is_formed():
    """A wide kernel and few tokens: the backward pass needs less than one gradient's memory."""
    width = 1024

    class Wide(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(width, use_bias=False, name="fc")(x)

    site = jp.Site("fc", width, width, 0, "fc")
    drawn, forward = draw(KEY, site, 4), jp.attach(Wide())
    from jaxprune.scores.sketch import SketchTap

    def loss(tau, params, x):
        return jnp.sum(jnp.square(forward(params, {"fc": SketchTap(tau, drawn)}, {}, x)))

    zeros, params = Sketch(*map(jnp.zeros, drawn.shapes)), {"fc": {"kernel": jnp.eye(width)}}
    compiled = jax.jit(jax.grad(loss)).lower(zeros, params, jnp.ones((4, width))).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < width * width * 4 / 4
