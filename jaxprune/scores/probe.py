"""Probes: LoRA adapters that compute the same, and hand a measurement to a dummy `tau` as its gradient.

`jaxprune.methods.Probes` wraps adapters in them on the steps that measure. Like a tap, a probe's measurement rides on the
ordinary backward pass, so it works under `nn.scan` and `nn.remat`; unlike a tap it leaves the factors to be trained by the
same pass. With dropout it measures what the adapter really got.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from jaxprune.adapters.base import Array, base, drop
from jaxprune.adapters.channel import MaskedDora
from jaxprune.adapters.lora import Lora
from jaxprune.errors import UsageError
from jaxprune.scores.tap import _identity


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _watch_gradient(reduce: Callable, y: Array, x: Array, a: Array, b: Array, tau: Array) -> Array:
    return y


def _gradient_forward(reduce: Callable, y: Array, x: Array, a: Array, b: Array, tau: Array):
    return y, (x, a, b, tau)


def _gradient_backward(reduce: Callable, residuals: tuple[Array, ...], delta: Array):
    x, a, b, tau = residuals
    return delta, None, None, None, reduce(x, delta, a, b).astype(tau.dtype)


_watch_gradient.defvjp(_gradient_forward, _gradient_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _watch_input(reduce: Callable, y: Array, x: Array, a: Array, tau: Array) -> Array:
    return y


def _input_forward(reduce: Callable, y: Array, x: Array, a: Array, tau: Array):
    # Only the measurement is kept for the backward pass, where it is handed over.
    return y, reduce(x, a).astype(tau.dtype)


def _input_backward(reduce: Callable, measured: Array, delta: Array):
    return delta, None, None, measured


_watch_input.defvjp(_input_forward, _input_backward)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["lora", "tau"], meta_fields=["reduce", "dense"])
@dataclass(frozen=True)
class GradientProbe:
    """Measure reduce(x, delta, s A m, B), with delta the gradient at the product's output, so that G = s x^T delta.

    Attributes:
      lora: what it computes and what is trained.
      tau: zeros shaped as the measurement.
      reduce: the measurement, from `jaxprune.scores.redundancy`.
      dense: the same as `dense(G, s A m B)`, for a merged kernel, whose dense gradient exists anyway.
    """

    lora: Lora
    tau: Array
    reduce: Callable[[Array, Array, Array, Array], Array]
    dense: Callable[[Array, Array], Array]

    @property
    def dropout(self) -> float:
        return self.lora.dropout

    def linear(self, x_NxI: Array, kernel_IxO: Array, mask: Array | None, key: Array | None) -> Array:
        """Return x W + s ((dropout(x) A) * m) B."""
        dropped = drop(x_NxI, self.dropout, key)
        a = self.lora.a * (self.lora.scale if mask is None else self.lora.scale * mask)
        y_NxO: Array = _watch_gradient(self.reduce, self.lora.product(dropped, mask), dropped, a, self.lora.b, self.tau)
        return base(x_NxI, kernel_IxO) + y_NxO

    def merge(self, kernel: Array, mask: Array | None) -> Array:
        """Return W + s (A * m) B."""
        delta: Array = _identity(self.dense, self.lora.delta(mask), self.tau)
        return (kernel.astype(jnp.float32) + delta).astype(kernel.dtype)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["lora", "tau"], meta_fields=["reduce"])
@dataclass(frozen=True)
class InputProbe:
    """Measure reduce(x, A) of the adapter's input x; reduced within the forward pass.

    Attributes:
      lora: what it computes and what is trained.
      tau: zeros shaped as the measurement.
      reduce: `reduce(x_NxI, a_IxR)`.
    """

    lora: Lora
    tau: Array
    reduce: Callable[[Array, Array], Array]

    @property
    def dropout(self) -> float:
        return self.lora.dropout

    def linear(self, x_NxI: Array, kernel_IxO: Array, mask: Array | None, key: Array | None) -> Array:
        """Return x W + s ((dropout(x) A) * m) B."""
        dropped = drop(x_NxI, self.dropout, key)
        y_NxO: Array = _watch_input(self.reduce, self.lora.product(dropped, mask), dropped, self.lora.a, self.tau)
        return base(x_NxI, kernel_IxO) + y_NxO

    def merge(self, kernel: Array, mask: Array | None) -> Array:
        """Refuse: a merged kernel has no tokens to measure."""
        raise UsageError(
            "this score measures the adapters' inputs, and a model from attach_function has merged kernels instead; use "
            "jaxprune.attach, or a score made of gradients"
        )


def gate_probe(adapter: MaskedDora, tau: Array) -> MaskedDora:
    """Return an adapter that computes the same, and hands the squares of its gates' gradients, (dL/dg)^2, to `tau`.

    Args:
      adapter: with channel masks; its logits get no gradient.
      tau: zeros shaped as the logits.
    """
    logits: Array = _identity(_squares, jnp.where(adapter.kept(), _NEAR, -_NEAR), tau)
    return replace(adapter, logits=logits)


# At a logit this close to 0 the gate is what it was, and the derivative of its sigmoid is 1/4.
_NEAR = 1e-6


def _squares(gradient: Array, logits: Array) -> Array:
    return jnp.square(4.0 * gradient)


def second_moment(x_NxI: Array, a_IxR: Array) -> Array:
    """Return E[z^T z] of z = x A over the tokens computed, (r, r): the curvature of OBC and SparseGPT for B."""
    z = jnp.dot(x_NxI, a_IxR.astype(x_NxI.dtype), preferred_element_type=jnp.float32)
    return z.T @ z / z.shape[0]


def inverse_second_moment(x_NxI: Array, a_IxR: Array, damping: float = 1e-6) -> Array:
    """Return a_j^T (E[x x^T] + damping I)^-1 a_j for every column of A, (r,), by eigenvalues: d_in^3 operations."""
    x = x_NxI.astype(jnp.float32)
    # Rank-deficient with fewer tokens than features: float32 rounds zero eigenvalues to either sign.
    values, vectors = jnp.linalg.eigh(x.T @ x / x.shape[0])
    return (1.0 / (jnp.maximum(values, 0.0) + damping)) @ jnp.square(vectors.T @ a_IxR.astype(jnp.float32))
