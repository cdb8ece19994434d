"""The hash behind dropout is uniform, independent between keys and neighbours, and drops at the asked rate."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune.models.dropout import dropout, random_words


class Drop(nn.Module):
    rate: float

    @nn.compact
    def __call__(self, x):
        return dropout(self, x, self.rate)


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rate_and_mean(rate, dtype):
    n = 1_000_000
    y = np.asarray(
        Drop(rate).apply({}, jnp.ones((1000, n // 1000), dtype), rngs={"dropout": jax.random.key(3)}), np.float32
    )
    kept = (y > 0).mean()
    assert abs(kept - (1 - rate)) < 5 * np.sqrt(rate * (1 - rate) / n)
    np.testing.assert_allclose(y[y > 0], 1 / (1 - rate), rtol=1e-6 if dtype == jnp.float32 else 4e-3)


def test_gradient_flows_through_what_is_kept():
    x = jnp.ones((50, 7))
    run = lambda x: Drop(0.3).apply({}, x, rngs={"dropout": jax.random.key(0)})  # noqa: E731
    np.testing.assert_array_equal(jax.grad(lambda x: run(x).sum())(x), run(x))


def test_words_are_uniform_and_independent():
    n = 1 << 16
    words = np.stack([np.asarray(random_words(jax.random.key(seed), (n,))) for seed in range(64)])
    # Every bit is fair: 64 keys x 32 bits, at most 5 standard deviations (a true coin exceeds that once in 850 runs).
    bits = np.stack([(words >> b & 1).mean(axis=1) for b in range(32)])
    assert np.abs(bits - 0.5).max() < 5 * 0.5 / np.sqrt(n)
    # The counts of the top byte pass a chi-square test in sum: 64 x 255 degrees of freedom.
    counts = np.stack([np.bincount(row >> 24, minlength=256) for row in words])
    chi2 = ((counts - n / 256) ** 2 / (n / 256)).sum()
    degrees = 64 * 255
    assert abs(chi2 - degrees) < 5 * np.sqrt(2 * degrees)
    # Keys, and neighbours at the distances of rows and heads, are uncorrelated.
    signs = np.where(words < np.uint32(round(0.1 * 2**32)), 1.0, 0.0) - 0.1
    signs /= signs.std()
    across = signs @ signs.T / n
    assert np.abs(across - np.diag(np.diag(across))).max() < 5 / np.sqrt(n)
    for distance in (1, 2, 3, 36, 64, 384, 768, 4096):
        lag = (signs[:, distance:] * signs[:, :-distance]).mean()
        assert abs(lag) < 5 / np.sqrt(words.size), distance


def test_same_under_vmap_and_for_raw_keys():
    keys = jax.random.split(jax.random.key(0), 4)
    batched = jax.vmap(lambda k: random_words(k, (5, 3)))(keys)
    np.testing.assert_array_equal(batched, np.stack([random_words(k, (5, 3)) for k in keys]))
    raw = random_words(jax.random.key_data(keys[0]), (5, 3))
    np.testing.assert_array_equal(raw, batched[0])
    assert len(np.unique(batched)) == batched.size
