"""A tiny Linen model in the four forms that adapters must survive."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

FORMS = ("plain", "remat", "scan", "scan_of_remat")


class Block(nn.Module):
    """A residual block of two linear layers, with the carry and output that `nn.scan` wants."""

    @nn.compact
    def __call__(self, x, _=None):
        return x + nn.Dense(8, name="fc2")(jnp.tanh(nn.Dense(12, name="fc1")(x))), None


class Tower(nn.Module):
    """Three blocks and a head, plain or through Flax's lifted transformations."""

    form: str = "plain"

    @nn.compact
    def __call__(self, x):
        block = nn.remat(Block) if "remat" in self.form else Block
        if "scan" in self.form:
            stack = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True, "dropout": True}, length=3)
            x, _ = stack(name="layers")(x, None)
        else:
            for i in range(3):
                x, _ = block(name=f"layer_{i}")(x)
        return nn.Dense(2, name="head")(x.mean(axis=1))


@functools.lru_cache
def tower(form: str = "plain"):
    """Return (model, params, x of shape (4, 5, 8))."""
    model = Tower(form)
    x = jax.random.normal(jax.random.key(7), (4, 5, 8))
    return model, jax.jit(model.init)(jax.random.key(0), x)["params"], x
