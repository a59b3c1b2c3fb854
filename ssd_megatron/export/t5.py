"""T5s as transformers' T5ForConditionalGeneration.

Two constants of T5's are in the weights here. Its attention does not divide scores by the square root of the head size:
queries are that much larger here. Its tied head divides by the square root of the hidden size: the decoder's last norm
is that much larger there. Where head size and hidden size are powers of 4, both ways are exact; else a value that went
there and back may differ in its last bit.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ssd_megatron.config.model import ModelConfig
from ssd_megatron.errors import ConfigError
from ssd_megatron.export.mapping import to_ours, to_theirs
from ssd_megatron.export.rules import Rule, by_vocabulary, projections, same, scaled, tied_head, transposed
from ssd_megatron.export.settings import kv_channels_of, our_activation, unmet

MODEL_TYPE = "t5"
# Feed-forward activations that T5's `feed_forward_proj` can say; its gated-gelu is the approximate one of T5 1.1.
ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "silu": "silu",
    "reglu": "gated-relu",
    "geglu_tanh": "gated-gelu",
    "swiglu": "gated-silu",
}
WORDS = "shared.weight"
# T5 has no longest text; its first models were trained with so many tokens.
LENGTH = 512
HEAD = 64  # size of its heads where a folder does not say it
# Some folders have it, and transformers does not look at it either.
UNUSED = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"


def conflicts(model: ModelConfig) -> list[str]:
    """Settings that T5 does not have, each with what it needs."""
    return unmet(model, normalization="rmsnorm", activation=tuple(ACTIVATIONS))


def to_hf(tensors: Mapping[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """Logical tensors under T5's names; a tied head is not repeated.

    Raises:
        ConfigError: tensors are missing or unused.
    """
    return to_theirs(_table(model), tensors)


def from_hf(tensors: Mapping[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """The inverse of `to_hf`."""
    copies = {"encoder.embed_tokens.weight": WORDS, "decoder.embed_tokens.weight": WORDS}
    used = {name: tensor for name, tensor in tensors.items() if name != UNUSED}
    return to_ours(_table(model), used, copies | tied_head(WORDS, model))


def config_of(model: ModelConfig) -> dict[str, Any]:
    """The config.json of a model."""
    return {
        "model_type": MODEL_TYPE,
        "architectures": ["T5ForConditionalGeneration"],
        "vocab_size": model.vocab_size,
        "d_model": model.hidden_size,
        "d_kv": model.head_dim,
        "d_ff": model.ffn_hidden_size,
        "num_layers": model.num_layers,
        "num_decoder_layers": model.num_decoder_layers,
        "num_heads": model.num_attention_heads,
        "n_positions": model.seq_length,
        "relative_attention_num_buckets": model.relative_attention_num_buckets,
        "relative_attention_max_distance": model.relative_attention_max_distance,
        "dropout_rate": model.dropout,
        "layer_norm_epsilon": model.norm_epsilon,
        "feed_forward_proj": ACTIVATIONS[model.activation],
        "tie_word_embeddings": model.tie_embeddings,
        "decoder_start_token_id": model.decoder_start_token,
    }


def settings_of(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Fields of ModelConfig from a config.json, but for the vocabulary's.

    Raises:
        ConfigError: the model has something that ours do not have.
    """
    heads, hidden = config["num_heads"], config["d_model"]
    # transformers 5 calls every head tied, and says by the other field which one really is.
    is_tied = config.get("tie_word_embeddings", True) and config.get("scale_decoder_outputs", True)
    return {
        "family": "t5",
        "num_layers": config["num_layers"],
        "num_decoder_layers": config.get("num_decoder_layers"),
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "kv_channels": kv_channels_of(config.get("d_kv", HEAD), hidden, heads),
        "ffn_hidden_size": config["d_ff"],
        "seq_length": config.get("n_positions", LENGTH),
        "activation": our_activation(config.get("feed_forward_proj", "relu"), "feed_forward_proj", ACTIVATIONS),
        "norm_epsilon": config.get("layer_norm_epsilon", 1e-6),
        "relative_attention_num_buckets": config.get("relative_attention_num_buckets", 32),
        "relative_attention_max_distance": config.get("relative_attention_max_distance", 128),
        "tie_embeddings": is_tied,
        "decoder_start_token": _decoder_start(config),
    }


def _decoder_start(config: Mapping[str, Any]) -> int:
    token, size = config.get("decoder_start_token_id"), config["vocab_size"]
    if not isinstance(token, int) or not 0 <= token < size:
        shown = "missing or null" if token is None else token
        raise ConfigError(
            f"decoder_start_token_id ({shown}) of this T5 must be the token that its decoder begins with, below "
            f"vocab_size ({size}): in most T5s that is pad_token_id ({config.get('pad_token_id')})"
        )
    return token


def _table(model: ModelConfig) -> list[Rule]:
    head_scale = math.sqrt(model.hidden_size) if model.tie_embeddings else 1.0
    last = model.num_layers - 1
    found = [
        by_vocabulary("embedding.word.weight", WORDS, model),
        same(f"blocks.{last}.final_norm.weight", "encoder.final_layer_norm.weight"),
        scaled("head.norm.weight", "decoder.final_layer_norm.weight", head_scale),
    ]
    for part in ("encoder", "decoder"):
        theirs = f"{part}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        found.append(same(f"embedding.position_bias.{part}", theirs))
    if not model.tie_embeddings:
        found.append(by_vocabulary("head.weight", "lm_head.weight", model))
    for index in range(model.num_layers):
        found += _layer(f"blocks.{index}.layer", f"encoder.block.{index}.layer", model)
    for index in range(model.num_decoder_layers):
        found += _layer(f"blocks.{model.num_layers + index}.layer", f"decoder.block.{index}.layer", model, cross=True)
    return found


def _layer(ours: str, theirs: str, model: ModelConfig, *, cross: bool = False) -> list[Rule]:
    attention, network = f"{theirs}.0.SelfAttention", f"{theirs}.{2 if cross else 1}"
    found = [
        same(f"{ours}.input_layernorm.weight", f"{theirs}.0.layer_norm.weight"),
        _queries_smaller(
            projections(
                f"{ours}.self_attention.linear_qkv.weight", [f"{attention}.{kind}.weight" for kind in "qkv"], model
            ),
            model,
        ),
        transposed(f"{ours}.self_attention.linear_proj.weight", f"{attention}.o.weight"),
        same(f"{ours}.pre_mlp_layernorm.weight", f"{network}.layer_norm.weight"),
        *_network(f"{ours}.mlp.bank", f"{network}.DenseReluDense", model),
    ]
    if cross:
        found += _cross_attention(ours, f"{theirs}.1", model)
    return found


def _cross_attention(ours: str, theirs: str, model: ModelConfig) -> list[Rule]:
    mine, attention = f"{ours}.cross_attention", f"{theirs}.EncDecAttention"
    pairs = projections(f"{mine}.linear_kv.weight", [f"{attention}.k.weight", f"{attention}.v.weight"], model)
    return [
        same(f"{ours}.pre_cross_attn_layernorm.weight", f"{theirs}.layer_norm.weight"),
        scaled(f"{mine}.linear_q.weight", f"{attention}.q.weight", model.head_dim**-0.5),
        pairs,
        transposed(f"{mine}.linear_proj.weight", f"{attention}.o.weight"),
    ]


def _network(ours: str, theirs: str, model: ModelConfig) -> list[Rule]:
    ups = {"w_in": "wi_1", "w_gate": "wi_0"} if model.gated else {"w_in": "wi"}
    return [
        *(same(f"{ours}.{name}", f"{theirs}.{other}.weight") for name, other in ups.items()),
        transposed(f"{ours}.w_out", f"{theirs}.wo.weight"),
    ]


def _queries_smaller(rule: Rule, model: ModelConfig) -> Rule:
    """Queries, keys and values, of which queries are smaller there."""
    scale = model.head_dim**-0.5

    def change(tensors: Sequence[Tensor], scale: float) -> Sequence[Tensor]:
        return [tensors[0] * scale, *tensors[1:]]

    return Rule(
        rule.ours,
        rule.theirs,
        lambda tensors: change(rule.to_theirs(tensors), scale),
        lambda tensors: rule.to_ours(change(tensors, 1 / scale)),
    )
