"""One configuration for decoders of the Llama kind: what differs between the families is data, not code."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp

from jaxprune.errors import UsageError, shown
from jaxprune.models.config import ACTIVATIONS, check_dtype, is_integer, is_number, require
from jaxprune.models.rope import Rope


class DecoderFamily(NamedTuple):
    """What distinguishes a family apart from numbers.

    Attributes:
      architecture: its class in `transformers`.
      qkv_bias: whether queries, keys and values have a bias; None where config.json says it.
      window: whether `sliding_window` of its config.json holds by itself; otherwise with `use_sliding_window`.
    """

    architecture: str
    qkv_bias: bool | None = None
    window: bool = False


DECODERS = {
    "llama": DecoderFamily("LlamaForCausalLM"),
    "mistral": DecoderFamily("MistralForCausalLM", qkv_bias=False, window=True),
    "qwen2": DecoderFamily("Qwen2ForCausalLM", qkv_bias=True),
}

REMAT = ("none", "dots", "names", "full")
ATTENTION = ("auto", "xla", "cudnn")

# Our field -> its name in config.json.
_NAMES = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "intermediate_size": "intermediate_size",
    "max_positions": "max_position_embeddings",
    "rms_norm_eps": "rms_norm_eps",
    "activation": "hidden_act",
    "initializer_range": "initializer_range",
    "tied": "tie_word_embeddings",
    "output_bias": "attention_bias",
    "mlp_bias": "mlp_bias",
}
_MOST = 2**31 - 1
_INTEGERS = dict.fromkeys(
    ("vocab_size", "hidden_size", "num_heads", "num_kv_heads", "head_dim", "intermediate_size", "max_positions"), _MOST
) | {"num_layers": 1000}
# What a configuration of `transformers` means where it says nothing.
_SILENT = {
    "activation": "silu", "initializer_range": 0.02, "tied": False, "output_bias": False, "mlp_bias": False, "rms_norm_eps": 1e-6,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """Describe a decoder; the defaults are those of Llama 2 7B.

    Attributes:
      family: "llama", "mistral" or "qwen2".
      vocab_size: rows of the word table.
      hidden_size: width d of the hidden states.
      num_layers: number of layers.
      num_heads: heads of the queries.
      num_kv_heads: heads of keys and values, a divisor of `num_heads`.
      head_dim: width of one head, even.
      intermediate_size: width of the MLP.
      max_positions: tokens of the longest text that the model was made for.
      rms_norm_eps: epsilon under the root of every norm.
      rope: how positions turn queries and keys.
      activation: of the gate, a key of `ACTIVATIONS`.
      tied: whether the head is the word table.
      qkv_bias: whether queries, keys and values have a bias.
      output_bias: whether the attention's output has one.
      mlp_bias: whether the MLP's three matrices have one.
      window: a token sees so many tokens, itself included; None for all before it.
      initializer_range: standard deviation of fresh weights.
      groups: how many layers lie in each stack of parameters, in order; () for all in one. The backward pass ends at the
        first group with an adapter in it.
      remat: what the backward pass computes again: nothing (`none`), everything but the layers' inputs (`full`), all but the
        matrix products (`dots`), or all but those with frozen kernels (`names`).
      attention: `xla`, `cudnn` on a GPU in 16 bits, or `auto`: cuDNN where it runs and a test at start finds it right.
      query_chunk: queries whose scores exist at a time, without cuDNN; 0 for a quarter of a row, 64 or more.
      loss_chunk: positions of a row whose logits exist at a time, where targets are given; 0 for all.
      dtype: type of the kernels and of the computation; norms, softmax and loss are float32.
    """

    family: str = "llama"
    vocab_size: int = 32000
    hidden_size: int = 4096
    num_layers: int = 32
    num_heads: int = 32
    num_kv_heads: int = 32
    head_dim: int = 128
    intermediate_size: int = 11008
    max_positions: int = 4096
    rms_norm_eps: float = 1e-5
    rope: Rope = dataclasses.field(default_factory=Rope)
    activation: str = "silu"
    tied: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    window: int | None = None
    initializer_range: float = 0.02
    groups: tuple[int, ...] = ()
    remat: str = "none"
    attention: str = "auto"
    query_chunk: int = 0
    loss_chunk: int = 128
    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        require(isinstance(self.family, str) and self.family in DECODERS, "model_type", self.family, DECODERS)
        for name, most in _INTEGERS.items():
            _whole(_NAMES[name], getattr(self, name), 1, most)
        require(self.activation in ACTIVATIONS, "hidden_act", self.activation, ACTIVATIONS)
        for name in ("rms_norm_eps", "initializer_range"):
            if not is_number(getattr(self, name), 0.0, 1.0):
                raise UsageError(f"{_NAMES[name]} is {shown(getattr(self, name))}; expected a number from 0 to 1")
        for name in ("tied", "qkv_bias", "output_bias", "mlp_bias"):
            if not isinstance(getattr(self, name), bool):
                said = _NAMES.get(name, name)
                raise UsageError(f"{said} is {shown(getattr(self, name))}; expected true or false")
        if self.num_heads % self.num_kv_heads:
            raise UsageError(
                f"num_attention_heads={self.num_heads} is not a multiple of num_key_value_heads={self.num_kv_heads}"
            )
        if self.head_dim % 2 or (self.rope.kind == "dynamic" and self.head_dim == 2):
            raise UsageError(f"head_dim={self.head_dim} cannot be turned in pairs; expected an even number")
        if self.window is not None:
            _whole("sliding_window", self.window, 1, _MOST)
        if self.groups and (
            not all(is_integer(n, 1, 1000) for n in self.groups) or sum(self.groups) != self.num_layers
        ):
            raise UsageError(
                f"groups {shown(self.groups)} do not fit; expected numbers of layers, {self.num_layers} in all"
            )
        require(self.remat in REMAT, "remat", self.remat, REMAT)
        require(self.attention in ATTENTION, "attention", self.attention, ATTENTION)
        _whole("query_chunk", self.query_chunk, 0, _MOST)
        _whole("loss_chunk", self.loss_chunk, 0, _MOST)
        check_dtype(self.dtype)

    @property
    def stacks(self) -> dict[str, int]:
        """Return the name of every stack of layers, and how many lie in it."""
        if len(self.groups) < 2:
            return {"layers": self.num_layers}
        starts = [sum(self.groups[:i]) for i in range(len(self.groups))]
        return {f"layers[{start}:{start + size}]": size for start, size in zip(starts, self.groups, strict=True)}

    @property
    def max_length(self) -> int:
        """Return the length in tokens of the longest example; nothing fails beyond it, but the model has never seen it."""
        return int(self.max_positions * (dict(self.rope.settings)["factor"] if self.rope.kind == "dynamic" else 1))

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], **ours: Any) -> DecoderConfig:
        """Translate the content of a config.json.

        Args:
          config: a field that it lacks is what `transformers` means then.
          ours: fields that are no matter of the checkpoint, such as `dtype` or `groups`.

        Raises:
          UsageError: another model_type, a variant that this decoder does not compute, or a field that is missing or wrong.
        """
        family: Any = config.get("model_type")
        require(isinstance(family, str) and family in DECODERS, "model_type", family, DECODERS)
        known = {field: config[its] for field, its in _NAMES.items() if config.get(its) is not None}
        values = {**_SILENT, **known}
        values.setdefault("num_kv_heads", values.get("num_heads"))
        values.setdefault("max_positions", 2048)
        if is_integer(values.get("hidden_size"), 1, _MOST) and is_integer(values.get("num_heads"), 1, _MOST):
            values.setdefault("head_dim", values["hidden_size"] // values["num_heads"])
        if missing := [its for field, its in _NAMES.items() if field not in values]:
            raise UsageError(f"there is no {missing[0]}; add it")
        row = DECODERS[family]
        values["qkv_bias"] = values["output_bias"] if row.qkv_bias is None else row.qkv_bias
        if row.qkv_bias is not None:
            values["output_bias"] = False
        window = config.get("sliding_window")
        if window is not None and (row.window or config.get("use_sliding_window")):
            if config.get("use_sliding_window"):
                raise UsageError("use_sliding_window is not supported; expected false, as every layer sees as far here")
            values["window"] = window
        if config.get("pretraining_tp", 1) not in (1, None):
            raise UsageError(f"pretraining_tp={shown(config['pretraining_tp'])} is not supported; expected 1")
        _whole("head_dim", values["head_dim"], 1, _MOST)
        rope = Rope.from_hf(config, 10000.0, values["head_dim"])
        return cls(family=family, rope=rope, **{**values, **ours})

    def to_hf(self) -> dict[str, Any]:
        """Translate to what config.json holds: `from_hf` of it gives this configuration again."""
        said = {its: getattr(self, field) for field, its in _NAMES.items()}
        if DECODERS[self.family].qkv_bias is None:
            said["attention_bias"] = self.qkv_bias
        else:
            del said["attention_bias"], said["mlp_bias"]
        if self.window is not None:
            said["sliding_window"] = self.window
        rope = {"rope_parameters": self.rope.to_hf()}
        return {"model_type": self.family, "architectures": [DECODERS[self.family].architecture], **said, **rope}


def _whole(name: str, value: Any, low: int, high: int) -> None:
    if not is_integer(value, low, high):
        raise UsageError(f"{name} is {shown(value)}; expected an integer from {low} to {high}")
