"""BERTs as transformers' BertForMaskedLM, or BertForPreTraining where the model predicts sentences."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ssd_megatron.config.model import ModelConfig
from ssd_megatron.export.mapping import to_ours, to_theirs
from ssd_megatron.export.rules import Rule, by_vocabulary, projections, same, same_layer, transposed, zeros
from ssd_megatron.export.settings import UNGATED, our_activation, refuse_others, unmet, usual_kv_channels

MODEL_TYPE = "bert"
BOTH = ("weight", "bias")
WORDS = "bert.embeddings.word_embeddings.weight"
TYPES = "bert.embeddings.token_type_embeddings.weight"
SENTENCES = "cls.seq_relationship"
DECODER, BIAS = "cls.predictions.decoder", "cls.predictions.bias"
# Names that folders from before transformers 2 have for a LayerNorm's parameters.
OLD_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}


def conflicts(model: ModelConfig) -> list[str]:
    """Settings that BERT does not have, each with what it needs."""
    return unmet(
        model,
        norm_position="post",
        normalization="layernorm",
        position_embedding="learned",
        add_bias=True,
        num_query_groups=model.num_attention_heads,
        kv_channels=usual_kv_channels(model),
        activation=tuple(UNGATED),
    )


def to_hf(tensors: Mapping[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """Logical tensors under BERT's names; a tied head is not repeated.

    Raises:
        ConfigError: tensors are missing or unused.
    """
    return to_theirs(_table(model), tensors)


def from_hf(tensors: Mapping[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """The inverse of `to_hf`."""
    copies = {f"{DECODER}.weight": WORDS, f"{DECODER}.bias": BIAS} if model.tie_embeddings else {}
    return to_ours(_table(model), {_new_name(name): tensor for name, tensor in tensors.items()}, copies)


def config_of(model: ModelConfig) -> dict[str, Any]:
    """The config.json of a model."""
    return {
        "model_type": MODEL_TYPE,
        "architectures": ["BertForPreTraining" if model.predicts_sentences else "BertForMaskedLM"],
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "intermediate_size": model.ffn_hidden_size,
        "hidden_act": UNGATED[model.activation],
        "hidden_dropout_prob": model.dropout,
        "attention_probs_dropout_prob": model.dropout,
        "max_position_embeddings": model.seq_length,
        "type_vocab_size": model.num_token_types or 1,
        "layer_norm_eps": model.norm_epsilon,
        "initializer_range": model.init_std,
        "tie_word_embeddings": model.tie_embeddings,
    }


def settings_of(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Fields of ModelConfig from a config.json, but for the vocabulary's; what it does not say, the tensors do. Which
    pairs of sentences a model was trained on, neither says: `next` is BERT's own.

    Raises:
        ConfigError: the model has something that ours do not have.
    """
    refuse_others(config, "BERT", is_decoder=False, add_cross_attention=False, position_embedding_type="absolute")
    return {
        "family": "bert",
        "num_layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "num_attention_heads": config["num_attention_heads"],
        "ffn_hidden_size": config["intermediate_size"],
        "seq_length": config["max_position_embeddings"],
        "activation": our_activation(config.get("hidden_act", "gelu"), "hidden_act", UNGATED),
        "norm_epsilon": config.get("layer_norm_eps", 1e-12),
        "num_token_types": config.get("type_vocab_size", 2) if TYPES not in tensors or tensors[TYPES].any() else 0,
        "sentence_objective": "next" if f"{SENTENCES}.weight" in tensors else "none",
        "tie_embeddings": config.get("tie_word_embeddings", True),
    }


def _table(model: ModelConfig) -> list[Rule]:
    found = [
        by_vocabulary("embedding.word.weight", WORDS, model),
        *same_layer("embedding.position", "bert.embeddings.position_embeddings", "weight"),
        *same_layer("embedding.norm", "bert.embeddings.LayerNorm", *BOTH),
        *same_layer("head.transform.dense", "cls.predictions.transform.dense", *BOTH),
        *same_layer("head.transform.norm", "cls.predictions.transform.LayerNorm", *BOTH),
    ]
    if model.num_token_types:
        found += same_layer("embedding.token_type", TYPES.removesuffix(".weight"), "weight")
    else:
        found.append(zeros(TYPES, 1, model.hidden_size))
    if model.tie_embeddings:
        found.append(by_vocabulary("head.bias", BIAS, model))
    else:
        found.append(by_vocabulary("head.weight", f"{DECODER}.weight", model))
        found.append(_repeated(by_vocabulary("head.bias", f"{DECODER}.bias", model), BIAS))
    if model.predicts_sentences:
        found += same_layer("head.sentence.pooler", "bert.pooler.dense", *BOTH)
        found += same_layer("head.sentence.classifier", SENTENCES, *BOTH)
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
        same(f"{bank}.w_in", f"{theirs}.intermediate.dense.weight"),
        same(f"{bank}.b_in", f"{theirs}.intermediate.dense.bias"),
        transposed(f"{bank}.w_out", f"{theirs}.output.dense.weight"),
        same(f"{bank}.b_out", f"{theirs}.output.dense.bias"),
        *same_layer(f"{ours}.post_mlp_layernorm", f"{theirs}.output.LayerNorm", *BOTH),
    ]


def _repeated(rule: Rule, name: str) -> Rule:
    """Theirs has the same values by another name as well, at which nobody looks."""
    return Rule(
        rule.ours,
        (*rule.theirs, name),
        lambda tensors: [*rule.to_theirs(tensors), *rule.to_theirs(tensors)],
        lambda tensors: rule.to_ours(tensors[:1]),
    )


def _new_name(name: str) -> str:
    for old, new in OLD_NAMES.items():
        name = name.replace(old, new)
    return name
