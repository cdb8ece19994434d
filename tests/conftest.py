"""Shared fixtures: tiny Linen models in the four forms that adapters must survive, and where the real data lies."""

from __future__ import annotations

import functools
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

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


@pytest.fixture(scope="session", autouse=True)
def _private_cache(tmp_path_factory):
    """Keep tests out of the user's caches."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with real rows, from the environment variable JAXPRUNE_DATA."""
    folder = os.environ.get("JAXPRUNE_DATA")
    if not folder:
        pytest.skip("JAXPRUNE_DATA does not name the folder with real data")
    return Path(folder)
