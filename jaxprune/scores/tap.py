"""Taps: adapters that change nothing and whose gradient is a measurement.

A tap holds a dummy scalar tau. Forward, it is the identity on the kernel. Backward, when the kernel's gradient G arrives,
it hands reduce(G, W) to tau as its cotangent. So one ordinary backward pass with respect to all taus measures every
site, each dense G lives only until it is reduced, and the measurement works wherever adapters do: under `nn.scan`,
`nn.remat` and in plain functions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxprune.adapters.base import Array, matmul
from jaxprune.sites import Site

Reduce = Callable[[Array, Array], Array]


def mean_absolute(gradient: Array, kernel: Array) -> Array:
    """Return mean |G|."""
    return jnp.mean(jnp.abs(gradient))


def mean_squared(gradient: Array, kernel: Array) -> Array:
    """Return mean G^2."""
    return jnp.mean(jnp.square(gradient))


def mean_top10(gradient: Array, kernel: Array) -> Array:
    """Return the mean of the largest tenth of |G|."""
    magnitude = jnp.abs(gradient).reshape(-1)
    return jnp.mean(jax.lax.top_k(magnitude, max(1, magnitude.size // 10))[0])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _identity(reduce: Reduce, value: Array, tau: Array) -> Array:
    return value


def _forward(reduce: Reduce, value: Array, tau: Array):
    return value, (value, tau)


def _backward(reduce: Reduce, residuals: tuple[Array, Array], gradient: Array):
    value, tau = residuals
    measure = lambda g, v: reduce(g.astype(jnp.float32), v.astype(jnp.float32))  # noqa: E731
    for _ in tau.shape:  # a stacked kernel merged whole: one measurement a layer
        measure = jax.vmap(measure)
    return gradient, measure(gradient, value).astype(tau.dtype)


_identity.defvjp(_forward, _backward)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["tau"], meta_fields=["reduce"])
@dataclass(frozen=True)
class KernelTap:
    """Measure reduce(G, W) of a kernel W and the gradient G of the loss with respect to it."""

    tau: Array
    reduce: Reduce

    def linear(self, x_NxI: Array, kernel_IxO: Array, mask: Array | None, key: Array | None) -> Array:
        """Return x W."""
        return matmul(x_NxI, self.merge(kernel_IxO, None))

    def merge(self, kernel: Array, mask: Array | None) -> Array:
        """Return W."""
        return _identity(self.reduce, kernel, self.tau)

    def count(self, mask: Array | None) -> int:
        """Count nothing: a tap trains nothing."""
        return 0


@functools.partial(jax.tree_util.register_dataclass, data_fields=["tau"], meta_fields=[])
@dataclass(frozen=True)
class ActivationTap:
    """Measure mean |x W| of a site's output; for `attach` only, since a merged kernel has no activations."""

    tau: Array

    def linear(self, x_NxI: Array, kernel_IxO: Array, mask: Array | None, key: Array | None) -> Array:
        """Return x W."""
        return _identity(_mean_absolute_value, matmul(x_NxI, kernel_IxO), self.tau)

    def count(self, mask: Array | None) -> int:
        """Count nothing: a tap trains nothing."""
        return 0


def _mean_absolute_value(gradient: Array, value: Array) -> Array:
    return jnp.mean(jnp.abs(value))


def taps(sites: Sequence[Site], reduce: Reduce | None) -> dict[str, KernelTap] | dict[str, ActivationTap]:
    """Make one tap a site: of the kernel's gradient, or of the activation where `reduce` is None."""
    zeros = {site.path: jnp.zeros(site.stack, jnp.float32) for site in sites}
    if reduce is None:
        return {path: ActivationTap(tau) for path, tau in zeros.items()}
    return {path: KernelTap(tau, reduce) for path, tau in zeros.items()}
