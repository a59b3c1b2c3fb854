"""Hugging Face's BertForMaskedLM, and BertForPreTraining where the model predicts sentences."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ssd_megatron.config.schema import ModelConfig
from ssd_megatron.export import rules
from ssd_megatron.export.rules import Rule, by_vocabulary, constant, projections, same_layer, transposed

ACTIVATIONS = {"relu": "relu", "squared_relu": "relu2", "gelu": "gelu", "silu": "silu"}
BOTH = ("weight", "bias")
WORDS = "bert.embeddings.word_embeddings.weight"
TYPES = "bert.embeddings.token_type_embeddings.weight"


def to_hf(tensors: Mapping[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """Our logical tensors under Hugging Face's names.

    Raises:
        ExportError: the model is no BERT of Hugging Face's; a tensor is missing or has no place there.
    """
    return rules.to_theirs(tensors, _rules(model), _copies(model))


def from_hf(tensors: Mapping[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """Hugging Face's tensors under our names, without routers.

    Raises:
        ExportError: as to_hf.
    """
    return rules.to_ours(tensors, _rules(model), _copies(model))


def hf_config(model: ModelConfig) -> dict[str, Any]:
    """config.json of the same model."""
    _check(model)
    return {
        "architectures": ["BertForPreTraining" if model.predicts_sentences else "BertForMaskedLM"],
        "model_type": "bert",
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "intermediate_size": model.ffn_hidden_size,
        "hidden_act": ACTIVATIONS[model.activation],
        "hidden_dropout_prob": model.dropout,
        "attention_probs_dropout_prob": model.dropout,
        "max_position_embeddings": model.seq_length,
        "type_vocab_size": model.num_token_types or 1,
        "layer_norm_eps": model.norm_epsilon,
        "initializer_range": model.init_std,
        "tie_word_embeddings": model.tie_embeddings,
        "pad_token_id": None,
    }


def _check(model: ModelConfig) -> None:
    rules.require(
        model,
        "Hugging Face's BERT",
        family="bert",
        norm_position="post",
        normalization="layernorm",
        position_embedding="learned",
        add_bias=True,
        num_query_groups=model.num_attention_heads,
        activation=tuple(ACTIVATIONS),
    )


def _copies(model: ModelConfig) -> dict[str, str]:
    copies = {"cls.predictions.decoder.bias": "cls.predictions.bias"}
    return copies | ({"cls.predictions.decoder.weight": WORDS} if model.tie_embeddings else {})


def _rules(model: ModelConfig) -> list[Rule]:
    _check(model)
    found = [
        by_vocabulary("embedding.word.weight", WORDS, model),
        *same_layer("embedding.position", "bert.embeddings.position_embeddings", "weight"),
        *same_layer("embedding.norm", "bert.embeddings.LayerNorm", *BOTH),
        *same_layer("head.transform.dense", "cls.predictions.transform.dense", *BOTH),
        *same_layer("head.transform.norm", "cls.predictions.transform.LayerNorm", *BOTH),
        by_vocabulary("head.bias", "cls.predictions.bias", model),
    ]
    if model.num_token_types:
        found += same_layer("embedding.token_type", TYPES.removesuffix(".weight"), "weight")
    else:
        found.append(constant(TYPES, torch.zeros(1, model.hidden_size), "model.num_token_types"))
    if not model.tie_embeddings:
        found.append(by_vocabulary("head.weight", "cls.predictions.decoder.weight", model))
    if model.predicts_sentences:
        found += same_layer("head.sentence.pooler", "bert.pooler.dense", *BOTH)
        found += same_layer("head.sentence.classifier", "cls.seq_relationship", *BOTH)
    for index in range(model.num_layers):
        found += _layer(f"blocks.{index}.layer", f"bert.encoder.layer.{index}", model)
    return found


def _layer(ours: str, theirs: str, model: ModelConfig) -> list[Rule]:
    attention, bank = f"{ours}.self_attention", f"{ours}.mlp.bank"
    kinds = [f"{theirs}.attention.self.{kind}" for kind in ("query", "key", "value")]
    return [
        *(projections(f"{attention}.linear_qkv.{leaf}", [f"{kind}.{leaf}" for kind in kinds], model) for leaf in BOTH),
        transposed(f"{attention}.linear_proj.weight", f"{theirs}.attention.output.dense.weight"),
        *same_layer(f"{attention}.linear_proj", f"{theirs}.attention.output.dense", "bias"),
        *same_layer(f"{ours}.post_attention_layernorm", f"{theirs}.attention.output.LayerNorm", *BOTH),
        rules.same(f"{bank}.w_in", f"{theirs}.intermediate.dense.weight"),
        rules.same(f"{bank}.b_in", f"{theirs}.intermediate.dense.bias"),
        transposed(f"{bank}.w_out", f"{theirs}.output.dense.weight"),
        rules.same(f"{bank}.b_out", f"{theirs}.output.dense.bias"),
        *same_layer(f"{ours}.post_mlp_layernorm", f"{theirs}.output.LayerNorm", *BOTH),
    ]
