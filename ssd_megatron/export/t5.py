"""Hugging Face's T5ForConditionalGeneration.

Two constants of T5's are in the weights here. Its attention does not divide scores by the square root of the head size:
queries are that much larger here. Its tied head divides by the square root of the hidden size: the decoder's last norm
is that much larger there.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ssd_megatron.config.schema import ModelConfig
from ssd_megatron.export import rules
from ssd_megatron.export.rules import Rule, by_vocabulary, projections, same, scaled, transposed

# Feed-forward activations that T5's `feed_forward_proj` can say.
ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "silu": "silu", "reglu": "gated-relu", "swiglu": "gated-silu"}
WORDS = "shared.weight"


def to_hf(tensors: Mapping[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """Our logical tensors under Hugging Face's names.

    Raises:
        ExportError: the model is no T5 of Hugging Face's; a tensor is missing or has no place there.
    """
    return rules.to_theirs(tensors, _rules(model), _copies(model))


def from_hf(tensors: Mapping[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """Hugging Face's tensors under our names, without routers.

    Raises:
        ExportError: as to_hf.
    """
    return rules.to_ours(tensors, _rules(model), _copies(model))


def hf_config(model: ModelConfig) -> dict[str, Any]:
    """config.json of the same model. `decoder_start_token_id` is the tokenizer's end of document."""
    _check(model)
    return {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        "vocab_size": model.vocab_size,
        "d_model": model.hidden_size,
        "d_kv": model.head_dim,
        "d_ff": model.ffn_hidden_size,
        "num_layers": model.num_layers,
        "num_decoder_layers": model.num_decoder_layers,
        "num_heads": model.num_attention_heads,
        "relative_attention_num_buckets": model.relative_attention_num_buckets,
        "relative_attention_max_distance": model.relative_attention_max_distance,
        "dropout_rate": model.dropout,
        "layer_norm_epsilon": model.norm_epsilon,
        "feed_forward_proj": ACTIVATIONS[model.activation],
        "tie_word_embeddings": model.tie_embeddings,
    }


def _check(model: ModelConfig) -> None:
    rules.require(model, "Hugging Face's T5", family="t5", normalization="rmsnorm", activation=tuple(ACTIVATIONS))


def _copies(model: ModelConfig) -> dict[str, str]:
    copies = {"encoder.embed_tokens.weight": WORDS, "decoder.embed_tokens.weight": WORDS}
    return copies | ({"lm_head.weight": WORDS} if model.tie_embeddings else {})


def _rules(model: ModelConfig) -> list[Rule]:
    _check(model)
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
