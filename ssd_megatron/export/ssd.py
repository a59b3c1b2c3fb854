"""GPTs with experts as the model of `modeling_ssd.py`, which runs in both modes and takes every setting of ours but a
few routers. It knows experts by position: rows of a router that goes by numbers are brought into that order.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from ssd_megatron.config.model import ModelConfig
from ssd_megatron.export.mapping import to_ours, to_theirs
from ssd_megatron.export.rules import Rule, same, tied_head, transposed
from ssd_megatron.ffn.bank import NEURON_TENSORS, expert_numbers
from ssd_megatron.training.saved_model import SavedModel, Settings

MODEL_TYPE = "ssd_gpt"
WORDS = "model.embed_tokens.weight"
ROUTERS = ("centroid", "avg_k", "switch", "mlp", "oracle")
ROUTER_TENSORS = {"mlp.router.weight": "ffn.router", "mlp.router.mix": "ffn.router_mix"}  # ours, and theirs
MODEL_FIELDS = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "ffn_hidden_size",
    "seq_length",
    "activation",
    "normalization",
    "norm_epsilon",
    "position_embedding",
    "rotary_base",
    "add_bias",
)


def to_hf(tensors: Mapping[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """Logical tensors under the names of `modeling_ssd.py`.

    Raises:
        ConfigError: tensors are missing or unused.
    """
    return to_theirs(_table(model, tensors), tensors)


def from_hf(tensors: Mapping[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """The inverse of `to_hf`."""
    return to_ours(_table(model, tensors), tensors, tied_head(WORDS, model))


def config_of(settings: Settings) -> dict[str, Any]:
    """The config.json of a model."""
    model = settings.model
    return {
        "model_type": MODEL_TYPE,
        "architectures": ["SsdForCausalLM"],
        "auto_map": {
            "AutoConfig": "modeling_ssd.SsdConfig",
            "AutoModelForCausalLM": "modeling_ssd.SsdForCausalLM",
        },
        **{field: getattr(model, field) for field in MODEL_FIELDS},
        "vocab_size": model.padded_vocab_size,
        "tie_word_embeddings": model.tie_embeddings,
        "initializer_range": model.init_std,
        "num_experts": settings.ssd.num_experts,
        "experts_per_token": settings.top_k,
        "router": settings.ssd.router_kind,
        "router_update": settings.ssd.router_update,
        "mode": "sparse",
    }


def settings_of(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Fields of ModelConfig from a config.json, but for the vocabulary's."""
    said = {"kv_channels": None, **config}  # older folders do not have it
    return {field: said[field] for field in MODEL_FIELDS} | {"tie_embeddings": said["tie_word_embeddings"]}


def mixes_by_position(saved: SavedModel) -> dict[str, Tensor]:
    """Second layers of `mlp` routers with a row for the expert at each position; ours have one for each number."""
    found = {}
    for network, ids in saved.neuron_ids().items():
        name = f"{network}.router.mix"
        found[name] = saved.tensor(name)[expert_numbers(ids, saved.settings.ssd.num_experts)]
    return found


def _table(model: ModelConfig, tensors: Iterable[str]) -> list[Rule]:
    """Of a router its tensors that are among these, by either name: those that score by the bank have none."""
    names = list(tensors)
    routers = [pair for pair in ROUTER_TENSORS.items() if any(name.endswith(pair) for name in names)]
    entries = [same("embedding.word.weight", WORDS)]
    if model.position_embedding == "learned":
        entries.append(same("embedding.position.weight", "model.embed_positions.weight"))
    entries += [same(f"head.norm.{part}", f"model.norm.{part}") for part in _norm_parts(model)]
    if not model.tie_embeddings:
        entries.append(same("head.weight", "lm_head.weight"))
    return entries + [entry for layer in range(model.num_layers) for entry in _layer(layer, model, routers)]


def _layer(layer: int, model: ModelConfig, routers: Iterable[tuple[str, str]]) -> Iterator[Rule]:
    ours, theirs = f"blocks.{layer}.layer.", f"model.layers.{layer}."
    for norm in ("input_layernorm", "pre_mlp_layernorm"):
        for part in _norm_parts(model):
            yield same(f"{ours}{norm}.{part}", f"{theirs}{norm}.{part}")
    yield same(f"{ours}self_attention.linear_qkv.weight", f"{theirs}attention.qkv.weight")
    yield transposed(f"{ours}self_attention.linear_proj.weight", f"{theirs}attention.output.weight")
    if model.add_bias:
        yield same(f"{ours}self_attention.linear_qkv.bias", f"{theirs}attention.qkv.bias")
        yield same(f"{ours}self_attention.linear_proj.bias", f"{theirs}attention.output.bias")
    absent = {"w_gate", "b_gate"} if not model.gated else set()
    absent |= set() if model.add_bias else {"b_in", "b_gate", "b_out"}
    for name in (*NEURON_TENSORS, "b_out"):
        if name not in absent:
            yield same(f"{ours}mlp.bank.{name}", f"{theirs}ffn.{name}")
    for our_name, their_name in routers:
        yield same(f"{ours}{our_name}", f"{theirs}{their_name}")


def _norm_parts(model: ModelConfig) -> tuple[str, ...]:
    return ("weight", "bias") if model.normalization == "layernorm" else ("weight",)
