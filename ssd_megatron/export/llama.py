"""Dense GPTs with RoPE, RMSNorm and a gate as transformers' LlamaForCausalLM."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from ssd_megatron.config.model import ModelConfig
from ssd_megatron.errors import ConfigError
from ssd_megatron.export.mapping import to_ours, to_theirs
from ssd_megatron.export.rules import Rule, projections, same, tied_head, transposed
from ssd_megatron.export.settings import kv_channels_of, our_activation, unmet

MODEL_TYPE = "llama"
WORDS = "model.embed_tokens.weight"
ACTIVATIONS = {"reglu": "relu", "geglu": "gelu", "geglu_tanh": "gelu_pytorch_tanh", "swiglu": "silu"}


def conflicts(model: ModelConfig) -> list[str]:
    """Settings that Llama does not have, each with what it needs."""
    found = unmet(
        model, norm_position="pre", position_embedding="rope", normalization="rmsnorm", activation=tuple(ACTIVATIONS)
    )
    if model.hidden_size % model.num_attention_heads:  # refused by its config, whatever head_dim is
        found.append(f"num_attention_heads that divides hidden_size ({model.hidden_size})")
    return found


def to_hf(tensors: Mapping[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """Logical tensors under Llama's names.

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
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": model.padded_vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups,
        "head_dim": model.head_dim,
        "hidden_act": ACTIVATIONS[model.activation],
        "max_position_embeddings": model.seq_length,
        "initializer_range": model.init_std,
        "rms_norm_eps": model.norm_epsilon,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rotary_base},
        "attention_bias": model.add_bias,
        "mlp_bias": model.add_bias,
        "attention_dropout": model.dropout,
        "tie_word_embeddings": model.tie_embeddings,
    }


def settings_of(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Fields of ModelConfig from a config.json, but for the vocabulary's.

    Raises:
        ConfigError: the model has something that ours do not have.
    """
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    # Before transformers 5 the base was a field of its own, and scaling another.
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    biases = (config.get("attention_bias", False), config.get("mlp_bias", False))
    for is_fine, problem in (
        (rope_type == "default", f"rope_type ({rope_type}) has no equivalent here: only default has"),
        (biases[0] == biases[1], "attention_bias and mlp_bias must be the same here"),
    ):
        if not is_fine:
            raise ConfigError(f"this Llama cannot be imported: {problem}")
    return {
        "num_layers": config["num_hidden_layers"],
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_query_groups": config.get("num_key_value_heads") or heads,
        "kv_channels": kv_channels_of(config.get("head_dim") or hidden // heads, hidden, heads),
        "ffn_hidden_size": config["intermediate_size"],
        "seq_length": config["max_position_embeddings"],
        "activation": our_activation(config.get("hidden_act", "silu"), "hidden_act", ACTIVATIONS),
        "normalization": "rmsnorm",
        "norm_epsilon": config.get("rms_norm_eps", 1e-6),
        "position_embedding": "rope",
        "rotary_base": float(rope.get("rope_theta", config.get("rope_theta", 10000.0))),
        "tie_embeddings": config.get("tie_word_embeddings", False),
        "add_bias": biases[0],
    }


def _table(model: ModelConfig) -> list[Rule]:
    entries = [
        same("embedding.word.weight", WORDS),
        same("head.norm.weight", "model.norm.weight"),
    ]
    if not model.tie_embeddings:
        entries.append(same("head.weight", "lm_head.weight"))
    return entries + [entry for layer in range(model.num_layers) for entry in _layer(layer, model)]


def _layer(layer: int, model: ModelConfig) -> Iterator[Rule]:
    ours, theirs = f"blocks.{layer}.layer.", f"model.layers.{layer}."
    yield same(f"{ours}input_layernorm.weight", f"{theirs}input_layernorm.weight")
    yield same(f"{ours}pre_mlp_layernorm.weight", f"{theirs}post_attention_layernorm.weight")
    for part in ("weight", "bias") if model.add_bias else ("weight",):
        q, k, v = (f"{theirs}self_attn.{name}_proj.{part}" for name in "qkv")
        yield projections(f"{ours}self_attention.linear_qkv.{part}", (q, k, v), model)
    yield transposed(f"{ours}self_attention.linear_proj.weight", f"{theirs}self_attn.o_proj.weight")
    yield same(f"{ours}mlp.bank.w_gate", f"{theirs}mlp.gate_proj.weight")
    yield same(f"{ours}mlp.bank.w_in", f"{theirs}mlp.up_proj.weight")
    yield transposed(f"{ours}mlp.bank.w_out", f"{theirs}mlp.down_proj.weight")
    if model.add_bias:
        yield same(f"{ours}self_attention.linear_proj.bias", f"{theirs}self_attn.o_proj.bias")
        yield same(f"{ours}mlp.bank.b_gate", f"{theirs}mlp.gate_proj.bias")
        yield same(f"{ours}mlp.bank.b_in", f"{theirs}mlp.up_proj.bias")
        yield same(f"{ours}mlp.bank.b_out", f"{theirs}mlp.down_proj.bias")
