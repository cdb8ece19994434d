"""PiSSA's factors against an SVD in float64, its residual, and the scale of rank-stabilised LoRA."""

import jax
import numpy as np
import pytest

import jaxprune as jp
from jaxprune.sites import flatten, layer_of, split
from tests.tower import sites_of, tower


def begin(method, form="plain"):
    model, params, _ = tower(form)
    start = method.start(jp.Context(jax.random.key(3), params, sites_of(form), jp.attach(model), None))
    return params, start


@pytest.mark.parametrize("form", ["plain", "scan"])
@pytest.mark.parametrize("niter", [None, 16])
@pytest.mark.parametrize("alpha", [None, 6.0])
def test_factors_are_the_largest_singular_directions(form, niter, alpha):
    params, start = begin(jp.pissa(rank=3, niter=niter, alpha=alpha), form)
    before, after = flatten(params), flatten(start.params)
    assert before.keys() == after.keys()
    for path in before.keys() - {f"{split(path)[0]}/kernel" for path in start.adapters}:
        np.testing.assert_array_equal(before[path], after[path])
    for path, adapter in start.adapters.items():
        assert adapter.scale == (1.0 if alpha is None else 2.0) and adapter.residual
        module, index = split(path)
        kernel, rest = (np.asarray(layer_of(of[f"{module}/kernel"], index), np.float64) for of in (before, after))
        u, s, vt = np.linalg.svd(kernel)
        a, b = (np.asarray(leaf, np.float64) for leaf in (adapter.a, adapter.b))
        best = (u[:, :3] * s[:3]) @ vt[:3]
        np.testing.assert_allclose(adapter.scale * a @ b, best, atol=1e-5)
        # Half of every singular value in each factor.
        half = np.diag(s[:3] / adapter.scale)
        np.testing.assert_allclose(a.T @ a, half, atol=1e-5)
        np.testing.assert_allclose(b @ b.T, half, atol=1e-5)
        np.testing.assert_allclose(rest, kernel - best, atol=1e-5)


def test_the_randomised_svd_finds_what_a_large_kernel_does_most():
    """A decaying spectrum, so that more columns than the 3 + 8 drawn matter: singular values to a thousandth."""
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.normal(size=(size, 40)))[0] for size in (60, 80))
    spectrum = 0.95 ** np.arange(40)
    params = {"fc": {"kernel": jax.numpy.asarray((u * spectrum) @ v.T, jax.numpy.float32)}}
    context = jp.Context(jax.random.key(0), params, jp.find_sites(params), None, None)
    adapter = jp.pissa(rank=3, niter=16).start(context).adapters["fc"]
    np.testing.assert_allclose(np.sum(np.square(adapter.a), 0), spectrum[:3], rtol=1e-3)
    rough = jp.pissa(rank=3, niter=0).start(context).adapters["fc"]
    assert np.abs(np.sum(np.square(rough.a), 0) / spectrum[:3] - 1).max() > 0.02


@pytest.mark.parametrize("niter", [None, 4])
def test_the_same_start_again(niter):
    """A resumed run makes the residual kernels anew and must get the same bits."""
    (_, one), (_, two) = begin(jp.pissa(rank=3, niter=niter)), begin(jp.pissa(rank=3, niter=niter))
    for left, right in zip(
        *map(jax.tree.leaves, ((one.params, one.adapters), (two.params, two.adapters))), strict=True
    ):
        np.testing.assert_array_equal(left, right)


def test_settings_out_of_range():
    with pytest.raises(jp.UsageError, match="rank 9 is more than the 8 singular directions of 'layer_0/fc1'"):
        begin(jp.pissa(rank=9))
    with pytest.raises(jp.UsageError, match="niter -1"):
        jp.pissa(niter=-1)
    with pytest.raises(jp.UsageError, match="alpha 0 is out of range"):
        jp.pissa(alpha=0)


def test_the_scale_of_rslora():
    for rank, alpha, scale in [(4, None, 4.0), (4, 3.0, 1.5), (9, 3.0, 1.0)]:
        _, start = begin(jp.rslora(rank=rank, alpha=alpha))
        assert {adapter.scale for adapter in start.adapters.values()} == {scale}
