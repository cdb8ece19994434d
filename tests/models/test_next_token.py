"""The loss in chunks: equal to the plain one, its gradients too, with a frozen head and a trained one."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune.models.next_token import next_token_loss

RNG = np.random.RandomState(0)
X, HEAD = jnp.asarray(RNG.randn(2, 7, 5), jnp.float32), jnp.asarray(RNG.randn(5, 13), jnp.float32)
Y, WEIGHTS = jnp.asarray(RNG.randint(0, 13, (2, 7))), jnp.asarray(RNG.rand(2, 7), jnp.float32)


def plain(x, head):
    logp = jax.nn.log_softmax(x @ head, axis=-1)
    return -jnp.sum(WEIGHTS * jnp.take_along_axis(logp, Y[..., None], -1)[..., 0])


def chunked(x, head, chunk):
    return jnp.sum(WEIGHTS * next_token_loss(x, head, Y, chunk)[0])


@pytest.mark.parametrize("chunk", [0, 1, 3, 7, 100])
def test_values_and_gradients(chunk):
    wide = np.asarray(X, np.float64) @ np.asarray(HEAD, np.float64)
    nll, correct = next_token_loss(X, HEAD, Y, chunk)
    want = np.log(np.exp(wide).sum(-1)) - np.take_along_axis(wide, np.asarray(Y)[..., None], -1)[..., 0]
    np.testing.assert_allclose(nll, want, atol=1e-6)
    np.testing.assert_array_equal(correct, wide.argmax(-1) == Y)
    wanted = jax.grad(plain, argnums=(0, 1))(X, HEAD)
    np.testing.assert_allclose(jax.jit(jax.grad(chunked), static_argnums=2)(X, HEAD, chunk), wanted[0], atol=1e-6)
    both = jax.jit(jax.grad(chunked, argnums=(0, 1)), static_argnums=2)(X, HEAD, chunk)
    for got, want in zip(both, wanted, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-6)
    np.testing.assert_allclose(jax.grad(chunked, argnums=1)(X, HEAD, chunk), wanted[1], atol=1e-6)


def test_a_frozen_head_costs_two_products_and_no_gradient_of_its_own():
    count = lambda f, *args: str(jax.make_jaxpr(f)(*args)).count("dot_general")  # noqa: E731
    assert count(jax.grad(lambda x: chunked(x, HEAD, 3)), X) == 2
    assert count(lambda x: chunked(x, HEAD, 3), X) == 1
    assert count(jax.grad(lambda h: chunked(X, h, 3)), HEAD) > 2


def test_no_more_logits_than_a_chunk_exist():
    x, y = jax.ShapeDtypeStruct((2, 4096, 8), jnp.float32), jax.ShapeDtypeStruct((2, 4096), jnp.int32)
    head = jax.ShapeDtypeStruct((8, 5000), jnp.float32)
    loss = lambda chunk: jax.jit(jax.grad(lambda x, h, y: next_token_loss(x, h, y, chunk)[0].sum()))  # noqa: E731
    used = [loss(chunk).lower(x, head, y).compile().memory_analysis().temp_size_in_bytes for chunk in (0, 128)]
    assert used[0] >= 2 * 4096 * 5000 * 4 and used[1] < used[0] / 8


def test_sixteen_bits():
    x, head = X.astype(jnp.bfloat16), HEAD.astype(jnp.bfloat16)
    nll, _ = next_token_loss(x, head, Y, 3)
    assert nll.dtype == jnp.float32
    grad = jax.grad(lambda x: next_token_loss(x, head, Y, 3)[0].sum())(x)
    want = jax.grad(lambda x: next_token_loss(x, head.astype(jnp.float32), Y, 0)[0].sum())(x.astype(jnp.float32))
    assert grad.dtype == jnp.bfloat16
    np.testing.assert_allclose(grad.astype(jnp.float32), want, atol=0.05)
