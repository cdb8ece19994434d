"""A tiny Linen model in the four forms that adapters must survive, and a method ready to train on it."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import jaxprune as jp

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


@functools.lru_cache
def sites_of(form: str = "plain", **kw):
    """Return the sites of a tower, one for each layer."""
    model, params, x = tower(form)
    return jp.find_sites(params, call=lambda params: model.apply({"params": params}, x), **kw)


def loss_fn(apply, batch, key):
    """Return the mean squared distance of the outputs from 1."""
    return jnp.mean(jnp.square(apply(batch["x"]) - 1.0))


class World(NamedTuple):
    """Everything a test of a method may look at; `traces` grows with every compilation of the step."""

    model: nn.Module
    params: Any
    batch: dict[str, jax.Array]
    forward: Any
    context: jp.Context
    method: jp.Method
    optimizer: optax.GradientTransformation
    start: jp.Start
    state: jp.TrainState
    step: Any
    traces: list[int]


def begin(method: jp.Method, form: str = "plain", optimizer: optax.GradientTransformation | None = None) -> World:
    """Start a method on a tower."""
    model, params, x = tower(form)
    optimizer = optimizer or optax.adamw(1e-2)
    sites, forward, batch, traces = sites_of(form), jp.attach(model), {"x": x}, []
    context = jp.Context(jax.random.key(3), params, sites, forward, loss_fn, [batch], [{"x": x[:, None]}])
    start = method.start(context)
    state = jp.init_state(jax.random.key(4), start.adapters, start.masks, optimizer, method, weights=start.weights)

    def counted(apply, batch, key):
        traces.append(1)
        return loss_fn(apply, batch, key)

    step = jp.make_step(forward, counted, optimizer, method, donate=False)
    return World(model, start.params, batch, forward, context, method, optimizer, start, state, step, traces)
