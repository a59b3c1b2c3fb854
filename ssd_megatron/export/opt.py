"""Dense GPTs with learned positions and LayerNorm as transformers' OPTForCausalLM."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ssd_megatron.config.model import ModelConfig
from ssd_megatron.export.mapping import to_ours, to_theirs
from ssd_megatron.export.rules import Rule, projections, same, tied_head, transposed
from ssd_megatron.export.settings import UNGATED, our_activation, refuse_others, unmet, usual_kv_channels

MODEL_TYPE = "opt"
WORDS = "model.decoder.embed_tokens.weight"
OFFSET = 2  # OPT counts positions from 2; the first rows are those of padding
EPSILON = 1e-5  # of its LayerNorms, which no setting changes


def conflicts(model: ModelConfig) -> list[str]:
    """Settings that OPT does not have, each with what it needs."""
    return unmet(
        model,
        norm_position="pre",
        position_embedding="learned",
        normalization="layernorm",
        norm_epsilon=EPSILON,
        num_query_groups=model.num_attention_heads,
        kv_channels=usual_kv_channels(model),
        activation=tuple(UNGATED),
    )


def to_hf(tensors: Mapping[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """Logical tensors under OPT's names.

    Raises:
        ConfigError: tensors are missing or unused.
    """
    return to_theirs(_table(model), tensors)


def from_hf(tensors: Mapping[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """The inverse of `to_hf`."""
    return to_ours(_table(model), tensors, tied_head(WORDS, model))


def config_of(model: ModelConfig) -> dict[str, Any]:
    """The config.json of a model."""
    return {
        "model_type": MODEL_TYPE,
        "architectures": ["OPTForCausalLM"],
        "vocab_size": model.padded_vocab_size,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "ffn_dim": model.ffn_hidden_size,
        "max_position_embeddings": model.seq_length,
        "num_attention_heads": model.num_attention_heads,
        "activation_function": UNGATED[model.activation],
        "do_layer_norm_before": True,
        "word_embed_proj_dim": model.hidden_size,
        "enable_bias": model.add_bias,
        "dropout": model.dropout,
        "attention_dropout": model.dropout,
        "init_std": model.init_std,
        "tie_word_embeddings": model.tie_embeddings,
    }


def settings_of(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Fields of ModelConfig from a config.json, but for the vocabulary's.

    Raises:
        ConfigError: the model has something that ours do not have.
    """
    refuse_others(
        config,
        "OPT",
        do_layer_norm_before=True,
        layer_norm_elementwise_affine=True,
        word_embed_proj_dim=config["hidden_size"],
        _remove_final_layer_norm=False,
    )
    return {
        "num_layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "num_attention_heads": config["num_attention_heads"],
        "ffn_hidden_size": config["ffn_dim"],
        "seq_length": config["max_position_embeddings"],
        "activation": our_activation(config.get("activation_function", "relu"), "activation_function", UNGATED),
        "normalization": "layernorm",
        "norm_epsilon": EPSILON,
        "position_embedding": "learned",
        "tie_embeddings": config.get("tie_word_embeddings", True),
        "add_bias": config.get("enable_bias", True),
    }


def _table(model: ModelConfig) -> list[Rule]:
    entries = [
        same("embedding.word.weight", WORDS),
        Rule(("embedding.position.weight",), ("model.decoder.embed_positions.weight",), _with_offset, _without_offset),
        same("head.norm.weight", "model.decoder.final_layer_norm.weight"),
        same("head.norm.bias", "model.decoder.final_layer_norm.bias"),
    ]
    if not model.tie_embeddings:
        entries.append(same("head.weight", "lm_head.weight"))
    return entries + [entry for layer in range(model.num_layers) for entry in _layer(layer, model)]


def _layer(layer: int, model: ModelConfig) -> Iterator[Rule]:
    ours, theirs = f"blocks.{layer}.layer.", f"model.decoder.layers.{layer}."
    for norm, their_norm in (("input_layernorm", "self_attn_layer_norm"), ("pre_mlp_layernorm", "final_layer_norm")):
        for part in ("weight", "bias"):
            yield same(f"{ours}{norm}.{part}", f"{theirs}{their_norm}.{part}")
    for part in ("weight", "bias") if model.add_bias else ("weight",):
        q, k, v = (f"{theirs}self_attn.{name}_proj.{part}" for name in "qkv")
        yield projections(f"{ours}self_attention.linear_qkv.{part}", (q, k, v), model)
    yield transposed(f"{ours}self_attention.linear_proj.weight", f"{theirs}self_attn.out_proj.weight")
    yield same(f"{ours}mlp.bank.w_in", f"{theirs}fc1.weight")
    yield transposed(f"{ours}mlp.bank.w_out", f"{theirs}fc2.weight")
    if model.add_bias:
        yield same(f"{ours}self_attention.linear_proj.bias", f"{theirs}self_attn.out_proj.bias")
        yield same(f"{ours}mlp.bank.b_in", f"{theirs}fc1.bias")
        yield same(f"{ours}mlp.bank.b_out", f"{theirs}fc2.bias")


def _with_offset(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    return [torch.cat([t.new_zeros(OFFSET, t.shape[1]), t]) for t in tensors]


def _without_offset(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    return [t[OFFSET:] for t in tensors]
