"""`ssd_megatron.model` of ds.json: the shape of the Transformer."""

import math
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from ssd_megatron.config.fields import (
    Fraction,
    NonNegative,
    Positive,
    PositiveFloat,
    Section,
    by_family,
    derived,
    optional,
    required,
)

Family = Literal["gpt", "bert", "t5"]
Activation = Literal["relu", "squared_relu", "reglu", "gelu", "gelu_tanh", "silu", "geglu", "geglu_tanh", "swiglu"]

GATED_ACTIVATIONS: frozenset[str] = frozenset({"reglu", "geglu", "geglu_tanh", "swiglu"})
SPARSE_ACTIVATIONS: frozenset[str] = frozenset({"relu", "squared_relu", "reglu"})


class ModelConfig(Section):
    """Shape of the Transformer. All sizes are global."""

    family: Family = optional("gpt", "Decoder (`gpt`), masked language model (`bert`), encoder and decoder (`t5`).")
    num_layers: Positive = required("Transformer layers; of `t5` those of the encoder.")
    num_decoder_layers: Positive = derived("num_layers", 1, "Layers of the decoder (`t5`).")
    hidden_size: Positive = required("Width of the residual stream.")
    num_attention_heads: Positive = required("Attention heads; must divide `hidden_size` without `kv_channels`.")
    kv_channels: Positive | None = optional(
        None, "Width of one attention head; null: `hidden_size` / `num_attention_heads`."
    )
    num_query_groups: Positive = derived(
        "num_attention_heads",
        1,
        "Key/value heads of grouped-query attention; must divide `num_attention_heads`.",
    )
    ffn_hidden_size: Positive = derived(
        "hidden_size",
        4,
        "Neurons of each feed-forward network; `ssd.num_experts` must divide it.",
    )
    seq_length: Positive = required("Tokens per sample; of `t5` those of the encoder.")
    decoder_seq_length: Positive = derived(
        "seq_length", 0.25, "Tokens of the decoder per sample (`t5`); at least what span corruption gives."
    )
    decoder_start_token: NonNegative | None = optional(
        None, "Id of the token that the decoder begins with (`t5`); null: the one that ends a document."
    )
    vocab_size: Positive = required("Token ids the model knows: at least the tokenizer's.")
    make_vocab_size_divisible_by: Positive = optional(128, "The vocabulary is padded up to a multiple of this.")
    activation: Activation = optional(
        "relu",
        "Feed-forward activation; gelu, silu, geglu, swiglu are less sparse. `gelu_tanh` and `geglu_tanh` have the "
        "approximate GELU of GPT-2 and T5 1.1.",
    )
    normalization: Literal["layernorm", "rmsnorm"] = by_family("layernorm", "Kind of normalisation.", t5="rmsnorm")
    norm_position: Literal["pre", "post"] = by_family(
        "pre", "Normalisation before attention and feed-forward network, or after each and its residual.", bert="post"
    )
    norm_epsilon: PositiveFloat = by_family(1e-5, "Added to the variance in the normalisation.", bert=1e-12, t5=1e-6)
    position_embedding: Literal["learned", "rope", "relative"] = by_family(
        "learned",
        "Learned absolute positions, rotary ones, or a bias by distance in buckets (`t5`, which has only these).",
        t5="relative",
    )
    relative_attention_num_buckets: Annotated[int, Field(ge=4, multiple_of=4)] = optional(
        32, "Buckets of distances (`relative` only); near ones each have their own."
    )
    relative_attention_max_distance: Positive = optional(
        128, "Distance from which on all are in one bucket (`relative` only)."
    )
    rotary_base: PositiveFloat = optional(10000.0, "Base of the rotary frequencies (`rope` only).")
    num_token_types: NonNegative = optional(0, "Embedded kinds of tokens (`bert`), one for each segment.")
    sentence_objective: Literal["none", "next", "order"] = optional(
        "none",
        "Second objective of `bert`: does the second segment follow in the text or come from another sample, or were "
        "the two swapped; `none`: one segment.",
    )
    tie_embeddings: bool = optional(True, "The output head shares the weights of the token embedding.")
    add_bias: bool = by_family(True, "Biases in the linear layers of attention and feed-forward networks.", t5=False)
    dropout: Fraction = optional(0.0, "Dropout probability after embedding, attention and feed-forward network.")
    init_std: PositiveFloat = optional(0.02, "Standard deviation of the initial weights.")

    @model_validator(mode="before")
    @classmethod
    def _null_means_default(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        derived_sizes = ("num_query_groups", "ffn_hidden_size", "num_decoder_layers", "decoder_seq_length")
        return {name: value for name, value in fields.items() if value is not None or name not in derived_sizes}

    @property
    def padded_vocab_size(self) -> int:
        """`vocab_size` rounded up to a multiple of `make_vocab_size_divisible_by`."""
        return math.ceil(self.vocab_size / self.make_vocab_size_divisible_by) * self.make_vocab_size_divisible_by

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def total_layers(self) -> int:
        """Layers of all stages, those of a decoder after those of its encoder."""
        return self.num_layers + (self.num_decoder_layers if self.family == "t5" else 0)

    @property
    def sample_tokens(self) -> int:
        """Tokens of a sample, of encoder and decoder."""
        return self.seq_length + (self.decoder_seq_length if self.family == "t5" else 0)

    @property
    def predicted_tokens(self) -> int:
        """Tokens of a sample that have logits."""
        return self.decoder_seq_length if self.family == "t5" else self.seq_length

    @property
    def predicts_sentences(self) -> bool:
        """Whether there is a second objective on pairs of segments."""
        return self.sentence_objective != "none"

    @property
    def gated(self) -> bool:
        """Whether the feed-forward network has a `w_gate`."""
        return self.activation in GATED_ACTIVATIONS
