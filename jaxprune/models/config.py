"""One configuration for the three encoder families: what differs between them is data, not code."""

from __future__ import annotations

import numbers
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxprune.errors import UsageError, shown

ACTIVATIONS = {
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jnp.tanh,
}


class Family(NamedTuple):
    """What distinguishes a family apart from numbers: the names of its configuration, and the head.

    Attributes:
      names: field of `EncoderConfig` -> its name in config.json.
      dense: path of the dense layer between the first token and the output layer.
      activation: its activation.
      input_dropout: whether the head drops out its input too.
      padded_positions: whether the row of the position table at the padding index is padding.
    """

    names: dict[str, str]
    dense: str
    activation: str
    input_dropout: bool = False
    padded_positions: bool = False


class Widths(NamedTuple):
    """The inner widths of one layer, which may differ from layer to layer once channels were removed.

    Attributes:
      mlp: outputs of fc1.
      key: width of the queries and keys in one head.
      value: width of the values in one head.
    """

    mlp: int
    key: int
    value: int


# The fields of a configuration that hold them layer by layer, in the order of `Widths`; config.json has the same names.
WIDTHS = ("intermediate_sizes", "key_dims", "value_dims")

_COMMON = {
    "vocab_size": "vocab_size",
    "max_positions": "max_position_embeddings",
    "pad_token_id": "pad_token_id",
    "initializer_range": "initializer_range",
    **{name: name for name in WIDTHS},
}

_BERT = {
    **_COMMON,
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "intermediate_size": "intermediate_size",
    "type_vocab_size": "type_vocab_size",
    "layer_norm_eps": "layer_norm_eps",
    "activation": "hidden_act",
    "embedding_dropout": "hidden_dropout_prob",
    "attention_dropout": "attention_probs_dropout_prob",
    "classifier_dropout": "classifier_dropout",
}

_DISTILBERT = {
    **_COMMON,
    "hidden_size": "dim",
    "num_layers": "n_layers",
    "num_heads": "n_heads",
    "intermediate_size": "hidden_dim",
    "activation": "activation",
    "embedding_dropout": "dropout",
    "attention_dropout": "attention_dropout",
    "classifier_dropout": "seq_classif_dropout",
}

FAMILIES = {
    "bert": Family(_BERT, dense="pooler", activation="tanh"),
    "roberta": Family(_BERT, dense="head/dense", activation="tanh", input_dropout=True, padded_positions=True),
    "distilbert": Family(_DISTILBERT, dense="head/dense", activation="relu"),
}

# Variants that this encoder does not compute: name in config.json, the only value it may have.
FIXED = (("position_embedding_type", "absolute"), ("is_decoder", False))

# Sizes are counted in 32 bits, as token ids are; the deepest encoders that exist have some hundred layers.
_MOST = 2**31 - 1
_INTEGERS = {
    "vocab_size": (1, _MOST),
    "hidden_size": (1, _MOST),
    "num_layers": (1, 1000),
    "num_heads": (1, _MOST),
    "intermediate_size": (1, _MOST),
    "max_positions": (1, _MOST),
    "type_vocab_size": (0, _MOST),
    "position_offset": (0, _MOST),
    "pad_token_id": (0, _MOST),
    "num_labels": (1, _MOST),
}
# Up to the last float32 below 1, as a rate of 1 drops everything.
_RATE = (0.0, 1 - 2.0**-24)
_NUMBERS = {
    "layer_norm_eps": (0.0, 1.0),
    "initializer_range": (0.0, 1.0),
    **dict.fromkeys(
        ("embedding_dropout", "attention_dropout", "attention_output_dropout", "mlp_dropout", "classifier_dropout"),
        _RATE,
    ),
}


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Describe an encoder classifier; the defaults are those of BERT-base with two labels.

    Attributes:
      family: "bert", "roberta" or "distilbert".
      vocab_size: rows of the word table.
      hidden_size: width d of the hidden states, a multiple of `num_heads`.
      num_layers: number of encoder layers.
      num_heads: attention heads.
      intermediate_size: width of the MLP.
      max_positions: rows of the position table.
      type_vocab_size: rows of the token-type table; 0 where the family has none.
      position_offset: row of the position table that holds position 0 (RoBERTa: padding index + 1).
      layer_norm_eps: epsilon under the root of every LayerNorm.
      activation: activation of the MLP, a key of `ACTIVATIONS`.
      embedding_dropout: drop rate after the embeddings.
      attention_dropout: drop rate of the attention probabilities.
      attention_output_dropout: drop rate after the attention's output projection.
      mlp_dropout: drop rate after the MLP.
      classifier_dropout: drop rate in the head.
      pad_token_id: id of the padding token.
      initializer_range: standard deviation of fresh weights.
      num_labels: outputs of the head.
      intermediate_sizes: width of each layer's MLP, where channels were removed; None for `intermediate_size`.
      key_dims: width of each layer's queries and keys in one head; None for `head_dim`.
      value_dims: width of each layer's values in one head; None for `head_dim`.
      dtype: type of the computation; parameters stay float32 and are cast where they are used.
    """

    family: str = "bert"
    vocab_size: int = 30522
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    intermediate_size: int = 3072
    max_positions: int = 512
    type_vocab_size: int = 2
    position_offset: int = 0
    layer_norm_eps: float = 1e-12
    activation: str = "gelu"
    embedding_dropout: float = 0.1
    attention_dropout: float = 0.1
    attention_output_dropout: float = 0.1
    mlp_dropout: float = 0.1
    classifier_dropout: float = 0.1
    pad_token_id: int = 0
    initializer_range: float = 0.02
    num_labels: int = 2
    intermediate_sizes: tuple[int, ...] | None = None
    key_dims: tuple[int, ...] | None = None
    value_dims: tuple[int, ...] | None = None
    dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        require(isinstance(self.family, str) and self.family in FAMILIES, "model_type", self.family, FAMILIES)
        for field in (*_INTEGERS, *_NUMBERS):
            _check(self.family, field, getattr(self, field))
        names = FAMILIES[self.family].names
        activation = isinstance(self.activation, str) and self.activation in ACTIVATIONS
        require(activation, _said(self.family, "activation"), self.activation, ACTIVATIONS)
        if self.hidden_size % self.num_heads:
            raise UsageError(
                f"{names['hidden_size']}={self.hidden_size} is not a multiple of {names['num_heads']}={self.num_heads}"
            )
        if self.pad_token_id >= self.vocab_size:
            raise UsageError(f"pad_token_id={self.pad_token_id} is not below vocab_size={self.vocab_size}")
        for name in WIDTHS:
            widths = getattr(self, name)
            if widths is not None and not (
                isinstance(widths, tuple)
                and len(widths) == self.num_layers
                and all(is_integer(width, 1, _MOST) for width in widths)
            ):
                raise UsageError(
                    f"{name}={shown(widths)} does not fit; expected {self.num_layers} integers, each from 1 to {_MOST}"
                )
        if self.max_length < 1:
            raise UsageError(
                f"{names['max_positions']}={self.max_positions} leaves no position after the first "
                f"{self.position_offset}, which are set aside"
            )
        check_dtype(self.dtype)

    @property
    def head_dim(self) -> int:
        """Return the width of one attention head; scores are divided by its root, also where channels were removed."""
        return self.hidden_size // self.num_heads

    def widths(self, layer: int) -> Widths:
        """Return the inner widths of a layer."""
        whole = Widths(self.intermediate_size, self.head_dim, self.head_dim)
        given = (getattr(self, name) for name in WIDTHS)
        return Widths(*(width if of is None else of[layer] for width, of in zip(whole, given, strict=True)))

    @property
    def max_length(self) -> int:
        """Return the length in tokens of the longest example."""
        return self.max_positions - self.position_offset

    @classmethod
    def from_hf(cls, config: Any, num_labels: int, dtype: Any = jnp.float32) -> EncoderConfig:
        """Translate a `transformers` configuration.

        Args:
          config: a BertConfig, RobertaConfig or DistilBertConfig.
          num_labels: outputs of the head (1 for regression).
          dtype: type of the computation.

        Raises:
          UsageError: another model_type, or a variant of these three that this encoder does not compute.
        """
        family = config.model_type
        require(isinstance(family, str) and family in FAMILIES, "model_type", family, FAMILIES)
        for name, plain in FIXED:
            if (got := getattr(config, name, plain)) not in (plain, None):
                raise UsageError(f"{name}={shown(got)} is not supported; expected {plain!r}")
        values: dict[str, Any] = {ours: getattr(config, its, None) for ours, its in FAMILIES[family].names.items()}
        pad = values["pad_token_id"]
        if pad is None:
            raise UsageError("there is no pad_token_id, which tells padding from text; add it")
        _check(family, "pad_token_id", pad)
        for name in WIDTHS:
            if isinstance(values[name], list):
                values[name] = tuple(values[name])
        hidden_dropout = values["embedding_dropout"]
        if family == "distilbert":
            # The epsilon is fixed in the family, and absent from its configuration.
            values |= dict(type_vocab_size=0, layer_norm_eps=1e-12, attention_output_dropout=0.0)
        else:
            values |= dict(
                attention_output_dropout=hidden_dropout, position_offset=pad + 1 if family == "roberta" else 0
            )
            if values["classifier_dropout"] is None:
                values["classifier_dropout"] = hidden_dropout
        return cls(family=family, num_labels=num_labels, dtype=dtype, mlp_dropout=hidden_dropout, **values)

    def to_hf(self) -> dict[str, Any]:
        """Translate to what config.json holds: `from_hf` of it gives this configuration again.

        Inner widths that differ from layer to layer are keys that `transformers` does not know.

        Raises:
          UsageError: the family's configuration cannot say it.
        """
        classes = {"bert": "Bert", "roberta": "Roberta", "distilbert": "DistilBert"}
        said: dict[str, Any] = {
            "model_type": self.family,
            "architectures": [f"{classes[self.family]}ForSequenceClassification"],
        }
        for ours, its in FAMILIES[self.family].names.items():
            value: Any = getattr(self, ours)
            if value is not None:
                said[its] = list(value) if ours in WIDTHS else float(value) if ours in _NUMBERS else value
        return {**said, "id2label": {str(i): f"LABEL_{i}" for i in range(self.num_labels)}}


def _said(family: str, field: str) -> str:
    """Name a field as config.json and, where it differs, as `EncoderConfig` does."""
    name = FAMILIES[family].names.get(field, field)
    return field if name == field else f"{name} ({field})"


def require(holds: bool, name: str, value: Any, known: Any) -> None:
    """Refuse a value that is none of those known."""
    if not holds:
        raise UsageError(f"{name} {shown(value)} is not supported; expected one of {', '.join(known)}")


def check_dtype(dtype: Any) -> None:
    """Refuse what is no type of floating-point numbers."""
    try:
        floating = jnp.issubdtype(dtype, jnp.floating)
    except TypeError:
        floating = False
    require(floating, "dtype", dtype, ("jnp.float32", "jnp.bfloat16", "jnp.float16"))


def is_number(value: Any, low: float, high: float) -> bool:
    """Say whether a value is a number within bounds; a boolean is one that nobody means."""
    # NumPy's numbers are of these abstract kinds too.
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and low <= value <= high  # pyright: ignore


def is_integer(value: Any, low: int, high: int) -> bool:
    """Say whether a value is a whole number within bounds."""
    return isinstance(value, numbers.Integral) and is_number(value, low, high)


def _check(family: str, field: str, value: Any) -> None:
    """Refuse a field that is no number of its kind, or out of its bounds."""
    if field in _INTEGERS:
        low, high = _INTEGERS[field]
        holds, expected = is_integer(value, low, high), f"an integer from {low} to {high}"
    else:
        low, high = _NUMBERS[field]
        holds = is_number(value, low, high)
        expected = f"a number from {low:g} to {'below 1' if high == _RATE[1] else f'{high:g}'}"
    if not holds:
        raise UsageError(f"{_said(family, field)} is {shown(value)}; expected {expected}")
