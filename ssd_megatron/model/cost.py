"""Parameters and FLOPs of a model from its settings alone (tests hold them against the built model)."""

import math
from dataclasses import dataclass

from ssd_megatron.config.schema import ModelConfig, SSDConfig


@dataclass(frozen=True)
class Flops:
    """FLOPs of training on one token: forward and backward (three times forward), matrix products only.

    Attention counts every pair of tokens, also those that the causal mask hides, as is usual for MFU. Recomputation
    does not count.
    """

    dense: float
    sparse: float

    def of(self, mode: str) -> float:
        return self.sparse if mode == "sparse" else self.dense


@dataclass(frozen=True)
class ForwardFlops:
    """FLOPs of one token's forward pass by part: one layer's attention, dense feed-forward network and router, and the
    head."""

    attention: int
    ffn: int
    router: float
    head: int


def parameter_counts(model: ModelConfig, ssd: SSDConfig) -> dict[str, int]:
    """Parameters by part of the model."""
    h, layers = model.hidden_size, model.num_layers
    bias = int(model.add_bias)
    positions = model.seq_length * h if model.position_embedding == "learned" else 0
    return {
        "embedding": model.padded_vocab_size * h + positions,
        "attention": layers * (h * qkv_size(model) + h * h + bias * (qkv_size(model) + h)),
        "ffn": layers * (bank_parameters(model) + bias * h),
        "router": layers * router_parameters(model, ssd),
        "norm": (2 * layers + 1) * norm_parameters(model),
        "head": 0 if model.tie_embeddings else model.padded_vocab_size * h,
    }


def forward_flops(model: ModelConfig, ssd: SSDConfig) -> ForwardFlops:
    """FLOPs of one token's forward pass, matrix products only."""
    h, qkv = model.hidden_size, qkv_size(model)
    return ForwardFlops(
        attention=2 * h * (qkv + h) + 4 * model.seq_length * h,
        ffn=2 * ffn_matrices(model) * h * model.ffn_hidden_size,
        router=router_flops(model, ssd) / ssd.routing_granularity,
        head=2 * h * model.padded_vocab_size,
    )


def router_parameters(model: ModelConfig, ssd: SSDConfig) -> int:
    """Parameters of one router."""
    return _router_matrices(model, ssd) + (ssd.num_experts if ssd.balance_bias else 0)


def router_flops(model: ModelConfig, ssd: SSDConfig) -> int:
    """FLOPs by which one router chooses for one token (or tile): products with its own matrices, or with the bank's."""
    h, neurons = model.hidden_size, model.ffn_hidden_size
    of_bank = {
        "avg_k": ssd.num_experts * h,
        "vanilla": neurons * h,
        "oracle": (ffn_matrices(model) - 1) * neurons * h,
    }
    return 2 * of_bank.get(ssd.router_kind, _router_matrices(model, ssd))


def _router_matrices(model: ModelConfig, ssd: SSDConfig) -> int:
    h, experts = model.hidden_size, ssd.num_experts
    rows = {"centroid": experts, "switch": experts, "pkm": 2 * math.isqrt(experts), "mlp": experts}
    return rows.get(ssd.router_kind, 0) * h + (experts * experts if ssd.router_kind == "mlp" else 0)


def flops_per_token(model: ModelConfig, ssd: SSDConfig) -> Flops:
    """FLOPs per token in both modes."""
    layers, flops = model.num_layers, forward_flops(model, ssd)
    dense = layers * (flops.attention + flops.ffn) + flops.head
    sparse = layers * (flops.attention + flops.ffn * ssd.top_k / ssd.num_experts + flops.router) + flops.head
    return Flops(3.0 * dense, 3.0 * sparse)


def qkv_size(model: ModelConfig) -> int:
    """Outputs of the projection to queries, keys and values."""
    return model.hidden_size + 2 * model.num_query_groups * model.head_dim


def norm_parameters(model: ModelConfig) -> int:
    return model.hidden_size if model.normalization == "rmsnorm" else 2 * model.hidden_size


def ffn_matrices(model: ModelConfig) -> int:
    return 3 if model.gated else 2


def bank_parameters(model: ModelConfig) -> int:
    """Parameters of one feed-forward network with a row per neuron: all but the last bias."""
    biases = ffn_matrices(model) - 1 if model.add_bias else 0
    return (ffn_matrices(model) * model.hidden_size + biases) * model.ffn_hidden_size
