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
from typing import ClassVar

import jax
import jax.numpy as jnp

from jaxprune.adapters.base import Array, base, matmul
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
    return gradient, reduce(gradient.astype(jnp.float32), value.astype(jnp.float32)).astype(tau.dtype)


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

    def read(self) -> Array:
        """Return the measurement, of a tap that is a gradient."""
        return self.tau

    # However often its module runs, in one call or in the steps of a recurrence, gradients add up before the tap. The layers of a
    # scan, whose dense gradients would then all live at once, meet a tap each.
    on_kernel: ClassVar[bool] = True


@functools.partial(jax.tree_util.register_dataclass, data_fields=["tau"], meta_fields=[])
@dataclass(frozen=True)
class ActivationTap:
    """Measure mean |x W| of a site's output; for `attach` only, since a merged kernel has no activations.

    Attributes:
      tau: the sum of |x W| and the number of entries, over all uses of the kernel; (2,).
    """

    tau: Array

    def linear(self, x_NxI: Array, kernel_IxO: Array, mask: Array | None, key: Array | None) -> Array:
        """Return x W."""
        return _identity(_absolute_values, base(x_NxI, kernel_IxO), self.tau)

    def count(self, mask: Array | None) -> int:
        """Count nothing: a tap trains nothing."""
        return 0

    def read(self) -> Array:
        """Return the measurement, of a tap that is a gradient."""
        return self.tau[..., 0] / self.tau[..., 1]


def _absolute_values(gradient: Array, value: Array) -> Array:
    return jnp.stack([jnp.sum(jnp.abs(value)), jnp.array(value.size, jnp.float32)])


def taps(sites: Sequence[Site], reduce: Reduce | None) -> dict[str, KernelTap] | dict[str, ActivationTap]:
    """Make one tap a site: of the kernel's gradient, or of the activation where `reduce` is None."""
    if reduce is None:
        return {site.path: ActivationTap(jnp.zeros(2, jnp.float32)) for site in sites}
    return {site.path: KernelTap(jnp.zeros((), jnp.float32), reduce) for site in sites}
