"""The two kinds with a number on every component: forward, merge and export against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from jaxprune.adapters import init_gated, init_svd

SITES = jp.find_sites({"one": {"kernel": np.zeros((40, 30))}, "two": {"kernel": np.zeros((50, 30))}})
KINDS = {"svd": (init_svd, "e"), "gated": (init_gated, "gate")}


@pytest.mark.parametrize("name", KINDS)
def test_products(name):
    rng = np.random.default_rng(1)
    kind = {"svd": jp.Svd, "gated": jp.Gated}[name]
    a, d, b, w = (rng.normal(size=size) for size in ((6, 3), (3,), (3, 5), (6, 5)))
    mask, x = np.asarray([1, 0, 1.0]), rng.normal(size=(7, 6))
    adapter = kind(*(jnp.asarray(v, jnp.float32) for v in (a, d, b)), 1.5)
    wanted = w + 1.5 * np.einsum("ir,r,ro->io", a, d * mask, b)
    np.testing.assert_allclose(
        adapter.merge(jnp.asarray(w, jnp.float32), jnp.asarray(mask)), wanted, rtol=1e-4, atol=1e-5
    )
    lora = adapter.as_lora(jnp.asarray(mask))
    np.testing.assert_allclose(lora.merge(jnp.asarray(w, jnp.float32), jnp.asarray(mask)), wanted, rtol=1e-4, atol=1e-5)
    got = adapter.linear(jnp.asarray(x, jnp.float32), jnp.asarray(w, jnp.float32), jnp.asarray(mask), None)
    np.testing.assert_allclose(got, x @ wanted, rtol=1e-4, atol=1e-4)
    assert adapter.count(jnp.asarray(mask)) == 2 * (6 + 1 + 5) and adapter.count(None) == 3 * (6 + 1 + 5)


def test_initial_values():
    ranks = {"one": 12, "two": 12}
    svd, masks = init_svd(jax.random.key(0), SITES, ranks, alpha=24)
    gated, _ = init_gated(jax.random.key(0), SITES, ranks, alpha=24)
    lora, _ = jp.init_lora(jax.random.key(0), SITES, ranks, alpha=24)
    gates = [gated[path].gate for path in ranks]
    for path in ranks:
        assert (svd[path].e == 0).all() and svd[path].scale == 24 / (12 + 1e-5)
        for leaf in (svd[path].a, svd[path].b):
            np.testing.assert_allclose((leaf.mean(), leaf.std()), (0, 0.02), atol=3e-3)
        assert abs(np.corrcoef(np.ravel(svd[path].a)[:300], np.ravel(svd[path].b)[:300])[0, 1]) < 0.2
        assert (gated[path].a == lora[path].a).all() and (gated[path].b == 0).all() and gated[path].scale == 2
        assert gated[path].gate.shape == svd[path].e.shape == masks[path].shape
    np.testing.assert_allclose((np.mean(gates), np.std(gates)), (0, 1), atol=0.4)
