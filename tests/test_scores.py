"""Site scores against dense gradients computed one sample at a time in numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from jaxprune.sites import flatten, layer_of
from tests.tower import FORMS, sites_of, tower


def loss_fn(apply, batch, key):
    assert key is None
    return jnp.mean(jnp.square(apply(batch["x"]) - batch["y"]))


def setting(form="plain"):
    model, params, x = tower(form)
    batches = [{"x": x + i, "y": jnp.full((4, 2), 0.5 * i)} for i in range(3)]
    return model, params, batches, sites_of(form)


def dense_gradients(model, params, batch):
    return flatten(gradient(model, params, batch))


@functools.partial(jax.jit, static_argnums=0)
def gradient(model, params, batch):
    return jax.grad(lambda p: loss_fn(lambda x: model.apply({"params": p}, x), batch, None))(params)


REDUCTIONS = {
    "absolute": lambda g: np.abs(g).mean(),
    "squared": lambda g: np.square(g).mean(),
    "top10": lambda g: np.sort(np.abs(g).ravel())[-max(1, g.size // 10) :].mean(),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", REDUCTIONS)
def test_gradient_scores_equal_dense_gradients(form, kind):
    model, params, batches, sites = setting(form)
    forwards = [jp.attach(model), jp.attach_function(lambda p, x: model.apply({"params": p}, x))]
    dense = [dense_gradients(model, params, batch) for batch in batches]
    scores = [jp.site_scores(kind, forward, loss_fn, params, sites, batches) for forward in forwards]
    for site in sites:
        kernels = [np.asarray(layer_of(g[f"{site.module}/kernel"], site.index), np.float64) for g in dense]
        expected = np.mean([REDUCTIONS[kind](kernel) for kernel in kernels])
        assert [score[site.path] for score in scores] == pytest.approx([expected] * 2, rel=1e-5)


def test_per_sample_scores_average_single_samples():
    model, params, batches, sites = setting()
    singles = [{name: leaf[:, None] for name, leaf in batch.items()} for batch in batches]
    scores = jp.site_scores("squared", jp.attach(model), loss_fn, params, sites, singles, per_sample=True)
    whole = jp.site_scores("squared", jp.attach(model), loss_fn, params, sites, batches)
    for site in sites:
        one_by_one = [
            np.square(dense_gradients(model, params, {k: v[i] for k, v in batch.items()})[f"{site.path}/kernel"]).mean()
            for batch in singles
            for i in range(4)
        ]
        assert scores[site.path] == pytest.approx(np.mean(one_by_one), rel=1e-5)
        assert scores[site.path] > 1.1 * whole[site.path]


def test_weight_and_activation_scores():
    model, params, batches, sites = setting()
    weights = jp.site_scores("weight", jp.attach(model), loss_fn, params, sites, [])
    outputs = jp.site_scores("activation", jp.attach(model), loss_fn, params, sites, batches)
    first = params["layer_0"]["fc1"]["kernel"]
    assert weights["layer_0/fc1"] == pytest.approx(np.abs(first).mean(), rel=1e-6)
    expected = np.mean([np.abs(np.asarray(batch["x"]) @ first).mean() for batch in batches])
    assert outputs["layer_0/fc1"] == pytest.approx(expected, rel=1e-5)


def test_bad_input():
    model, params, batches, sites = setting()
    with pytest.raises(jp.UsageError, match="'absolut' is not known.*nearest: absolute"):
        jp.site_scores("absolut", jp.attach(model), loss_fn, params, sites, batches)
    with pytest.raises(jp.UsageError, match="at least one batch"):
        jp.site_scores("absolute", jp.attach(model), loss_fn, params, sites, [])


def test_no_two_dense_gradients_live_at_once():
    """Sixteen wide kernels: what the backward pass needs beside its inputs stays below a few of their gradients."""
    width, layers = 512, 16
    params = {f"layer_{i}": {"kernel": jnp.eye(width) + 0.01} for i in range(layers)}

    def apply(params, x):
        for i in range(layers):
            x = jnp.tanh(x @ params[f"layer_{i}"]["kernel"])
        return x

    from jaxprune.scores.tap import mean_absolute, taps

    probes, forward = taps(jp.find_sites(params), mean_absolute), jp.attach_function(apply)
    x = jnp.ones((8, width))
    measure = jax.jit(jax.grad(lambda probes, params: jnp.sum(forward(params, probes, {}, x))))
    dense = jax.jit(jax.grad(lambda params: jnp.sum(apply(params, x))))
    one = 4 * width * width
    assert measure.lower(probes, params).compile().memory_analysis().temp_size_in_bytes < 4 * one
    assert dense.lower(params).compile().memory_analysis().output_size_in_bytes >= layers * one
