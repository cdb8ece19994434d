"""One configuration for the three encoder families: what differs between them is data, not code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxprune.errors import UsageError

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
    """What distinguishes a family apart from numbers: where the head's dense layer is and how its input is treated.

    Attributes:
      dense: path of the dense layer between the first token and the output layer.
      activation: its activation.
      input_dropout: whether the head drops out its input too.
      padded_positions: whether the row of the position table at the padding index is padding.
    """

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

FAMILIES = {
    "bert": Family(dense="pooler", activation="tanh"),
    "roberta": Family(dense="head/dense", activation="tanh", input_dropout=True, padded_positions=True),
    "distilbert": Family(dense="head/dense", activation="relu"),
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
        if self.family not in FAMILIES:
            raise UsageError(f"unsupported model_type {self.family!r}; expected one of {', '.join(FAMILIES)}")
        if self.activation not in ACTIVATIONS:
            raise UsageError(f"unsupported activation {self.activation!r}; expected one of {', '.join(ACTIVATIONS)}")
        for name in ("vocab_size", "hidden_size", "num_layers", "num_heads", "intermediate_size", "num_labels"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name}={getattr(self, name)} is too small; expected 1 or more")
        if self.hidden_size % self.num_heads:
            raise UsageError(f"hidden_size={self.hidden_size} is not a multiple of num_heads={self.num_heads}")
        for name in WIDTHS:
            widths = getattr(self, name)
            if widths is not None and (len(widths) != self.num_layers or min(widths) < 1):
                raise UsageError(f"{name}={widths} does not fit; expected {self.num_layers} numbers, each 1 or more")
        if self.max_length < 1:
            raise UsageError(
                f"max_positions={self.max_positions} leaves no position after position_offset={self.position_offset}"
            )

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
        if family not in FAMILIES:
            raise UsageError(f"unsupported model_type {family!r}; expected one of {', '.join(FAMILIES)}")
        for name, plain in (("position_embedding_type", "absolute"), ("is_decoder", False)):
            if (got := getattr(config, name, plain)) not in (plain, None):
                raise UsageError(f"{name}={got!r} in config.json is not supported; expected {plain!r}")
        if config.pad_token_id is None:
            raise UsageError("config.json has no pad_token_id, which tells padding from text; add it")
        common: dict[str, Any] = dict(
            family=family,
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            num_layers=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            max_positions=config.max_position_embeddings,
            pad_token_id=config.pad_token_id,
            initializer_range=config.initializer_range,
            num_labels=num_labels,
            dtype=dtype,
            **{name: tuple(widths) for name in WIDTHS if (widths := getattr(config, name, None)) is not None},
        )
        if family == "distilbert":
            return cls(
                intermediate_size=config.hidden_dim,
                type_vocab_size=0,
                layer_norm_eps=1e-12,  # fixed in the family, absent from its configuration
                activation=config.activation,
                embedding_dropout=config.dropout,
                attention_dropout=config.attention_dropout,
                attention_output_dropout=0.0,
                mlp_dropout=config.dropout,
                classifier_dropout=config.seq_classif_dropout,
                **common,
            )
        hidden_dropout = config.hidden_dropout_prob
        classifier_dropout = config.classifier_dropout
        return cls(
            intermediate_size=config.intermediate_size,
            type_vocab_size=config.type_vocab_size,
            position_offset=config.pad_token_id + 1 if family == "roberta" else 0,
            layer_norm_eps=config.layer_norm_eps,
            activation=config.hidden_act,
            embedding_dropout=hidden_dropout,
            attention_dropout=config.attention_probs_dropout_prob,
            attention_output_dropout=hidden_dropout,
            mlp_dropout=hidden_dropout,
            classifier_dropout=hidden_dropout if classifier_dropout is None else classifier_dropout,
            **common,
        )

    def to_hf(self) -> dict[str, Any]:
        """Translate to what config.json holds: `from_hf` of it gives this configuration again.

        Inner widths that differ from layer to layer are keys that `transformers` does not know.

        Raises:
          UsageError: the family's configuration cannot say it.
        """
        if self.family == "distilbert":
            own = dict(
                architectures=["DistilBertForSequenceClassification"],
                dim=self.hidden_size,
                n_layers=self.num_layers,
                n_heads=self.num_heads,
                hidden_dim=self.intermediate_size,
                activation=self.activation,
                dropout=self.embedding_dropout,
                attention_dropout=self.attention_dropout,
                seq_classif_dropout=self.classifier_dropout,
            )
        else:
            own = dict(
                architectures=[{"bert": "Bert", "roberta": "Roberta"}[self.family] + "ForSequenceClassification"],
                hidden_size=self.hidden_size,
                num_hidden_layers=self.num_layers,
                num_attention_heads=self.num_heads,
                intermediate_size=self.intermediate_size,
                hidden_act=self.activation,
                hidden_dropout_prob=self.embedding_dropout,
                attention_probs_dropout_prob=self.attention_dropout,
                classifier_dropout=self.classifier_dropout,
                type_vocab_size=self.type_vocab_size,
                layer_norm_eps=self.layer_norm_eps,
            )
        common = dict(
            model_type=self.family,
            vocab_size=self.vocab_size,
            max_position_embeddings=self.max_positions,
            pad_token_id=self.pad_token_id,
            initializer_range=self.initializer_range,
            **{name: list(widths) for name in WIDTHS if (widths := getattr(self, name)) is not None},
        )
        return {**own, **common, "id2label": {str(i): f"LABEL_{i}" for i in range(self.num_labels)}}
