"""Rotary positions: how fast each pair of a head's features turns, and the turning.

Feature i of a head of width h and feature i + h / 2 are one pair, turned by the angle position * f_i, with

    f_i = theta^(-2 i / h),    i = 0 ... h / 2 - 1.

Long contexts change f (c is the length that the model was pretrained with, w_i = 2 pi / f_i a wavelength):

| kind | frequencies |
| --- | --- |
| `default` | f |
| `linear` | f / factor |
| `dynamic` | f with theta (factor n / c - factor + 1)^(h / (h - 2)), n the tokens in use where they are more than c |
| `llama3` | s f + (1 - s) f / factor, s = (c / w - low) / (high - low) cut to 0 ... 1 |
| `yarn` | g f + (1 - g) f / factor, g falling from 1 to 0 over the pairs that turn `beta_fast` to `beta_slow` times within c |
| `longrope` | f / short_i, or f / long_i where more than c tokens are in use |

`yarn` and `longrope` also scale cosines and sines, by `attention_factor`.

Source: RoFormer (arXiv 2104.09864); linear: arXiv 2306.15595; YaRN: arXiv 2309.00071; LongRoPE: arXiv 2402.13753; llama3: The
Llama 3 herd of models (arXiv 2407.21783). Names and defaults are those of `transformers`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.errors import UsageError, shown

# Settings that each kind needs, and those that it may have, by their names in config.json.
KINDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"), ()),
    "yarn": (
        ("factor", "original_max_position_embeddings"),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
    "longrope": (
        ("short_factor", "long_factor", "original_max_position_embeddings"),
        ("factor", "attention_factor"),
    ),
}


@dataclass(frozen=True)
class Rope:
    """How positions turn a head's features.

    Attributes:
      theta: the base.
      kind: a key of `KINDS`.
      settings: of that kind, by their names in config.json, as sorted pairs.
    """

    theta: float = 10000.0
    kind: str = "default"
    settings: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], theta: float, head_dim: int) -> Rope:
        """Read `rope_parameters`, or the older `rope_theta` and `rope_scaling`, of a config.json.

        Args:
          config: the whole of it.
          theta: the base where it names none.
          head_dim: width of a head.

        Raises:
          UsageError: an unknown kind, or a setting that is missing, unknown or no number.
        """
        given = config.get("rope_parameters") or config.get("rope_scaling") or {}
        if not isinstance(given, Mapping):
            raise UsageError(f"rope_parameters is {shown(given)}; expected an object with rope_type")
        given = {name: value for name, value in given.items() if value is not None}
        kind = given.pop("rope_type", given.pop("type", "default"))
        given.pop("type", None)
        kind = {"su": "longrope"}.get(kind, kind) if isinstance(kind, str) else kind
        if not isinstance(kind, str) or kind not in KINDS:
            raise UsageError(f"rope_type {shown(kind)} is not supported; expected one of {', '.join(KINDS)}")
        theta = given.pop("rope_theta", config.get("rope_theta") or theta)
        if given.pop("partial_rotary_factor", 1.0) != 1.0:
            raise UsageError("partial_rotary_factor is not supported; expected 1, every feature of a head turns")
        needed, known = KINDS[kind]
        if kind in ("llama3", "yarn", "longrope"):
            before = config.get("original_max_position_embeddings") or config.get("max_position_embeddings")
            given.setdefault("original_max_position_embeddings", before)
        if missing := [name for name in needed if name not in given]:
            raise UsageError(f"rope_type {kind} has no {missing[0]}; it needs {', '.join(needed)}")
        # What a kind does not know, configurations of `transformers` carry all the same.
        used = {name: given[name] for name in (*needed, *known) if name in given}
        for name, value in [("rope_theta", theta), *used.items()]:
            _check(name, value, head_dim)
        frozen = {name: tuple(value) if isinstance(value, list) else value for name, value in used.items()}
        return cls(float(theta), kind, tuple(sorted(frozen.items())))

    def to_hf(self) -> dict[str, Any]:
        """Return `rope_parameters` of config.json: `from_hf` of it gives this again."""
        settings = {name: list(value) if isinstance(value, tuple) else value for name, value in self.settings}
        return {"rope_type": self.kind, "rope_theta": self.theta, **settings}

    def frequencies(self, head_dim: int, positions: int, used: jax.Array) -> tuple[jax.Array, float]:
        """Return f, (head_dim / 2,) float32, and the factor of cosines and sines.

        Args:
          head_dim: width h of a head.
          positions: `max_position_embeddings`.
          used: largest position in use plus 1; `dynamic` and `longrope` read it.
        """
        has = dict(self.settings)
        exponents = np.arange(0, head_dim, 2) / head_dim
        plain, before = self.theta**-exponents, has.get("original_max_position_embeddings", positions)
        factor = has.get("factor", positions / before)
        if self.kind == "linear":
            plain = plain / factor
        elif self.kind == "llama3":
            turns = before * plain / (2 * math.pi)
            low, high = has["low_freq_factor"], has["high_freq_factor"]
            share = np.clip((turns - low) / (high - low), 0, 1)
            plain = share * plain + (1 - share) * plain / factor
        elif self.kind == "yarn":
            plain = _yarn(plain, head_dim, self.theta, before, factor, has)
        if self.kind == "dynamic":
            more = factor * jnp.maximum(used, positions) / positions - (factor - 1)
            base = self.theta * more ** (head_dim / (head_dim - 2))
            return base ** -jnp.asarray(exponents, jnp.float32), 1.0
        if self.kind == "longrope":
            short, long = (
                jnp.asarray(plain / np.asarray(has[name]), jnp.float32) for name in ("short_factor", "long_factor")
            )
            return jnp.where(used > before, long, short), _long_scale(factor, before, has)
        return jnp.asarray(plain, jnp.float32), _yarn_scale(factor, has) if self.kind == "yarn" else 1.0


def turn(x_BxTxHxK: jax.Array, cosine_BxTxP: jax.Array, sine_BxTxP: jax.Array) -> jax.Array:
    """Turn the pairs of features, (i, i + P), in float32."""
    first, second = jnp.split(x_BxTxHxK.astype(jnp.float32), 2, axis=-1)
    c, s = cosine_BxTxP[:, :, None], sine_BxTxP[:, :, None]
    return jnp.concatenate([first * c - second * s, second * c + first * s], axis=-1).astype(x_BxTxHxK.dtype)


def _yarn(
    plain: np.ndarray, width: int, theta: float, before: float, factor: float, has: Mapping[str, Any]
) -> np.ndarray:
    # The pair that turns so many times within the pretrained length.
    pair = lambda turns: width * math.log(before / (turns * 2 * math.pi)) / (2 * math.log(theta))  # noqa: E731
    low, high = pair(has.get("beta_fast") or 32), pair(has.get("beta_slow") or 1)
    if has.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    kept = 1 - np.clip((np.arange(width // 2) - low) / (high - low or 0.001), 0, 1)
    return kept * plain + (1 - kept) * plain / factor


def _yarn_scale(factor: float, has: Mapping[str, Any]) -> float:
    if has.get("attention_factor") is not None:
        return float(has["attention_factor"])
    one = lambda m: 1.0 if factor <= 1 else 0.1 * m * math.log(factor) + 1.0  # noqa: E731
    if has.get("mscale") and has.get("mscale_all_dim"):
        return one(has["mscale"]) / one(has["mscale_all_dim"])
    return one(1.0)


def _long_scale(factor: float, before: float, has: Mapping[str, Any]) -> float:
    if has.get("attention_factor") is not None:
        return float(has["attention_factor"])
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(before))


def _check(name: str, value: Any, head_dim: int) -> None:
    if name == "truncate":
        if not isinstance(value, bool):
            raise UsageError(f"{name} of rope_parameters is {shown(value)}; expected true or false")
        return
    if name in ("short_factor", "long_factor"):
        if not isinstance(value, list | tuple) or len(value) != head_dim // 2:
            raise UsageError(
                f"{name} of rope_parameters is {shown(value)}; expected {head_dim // 2} numbers, one for each pair"
            )
        for one in value:
            _check(f"an entry of {name}", one, head_dim)
    elif not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise UsageError(f"{name} of rope_parameters is {shown(value)}; expected a number above 0")
