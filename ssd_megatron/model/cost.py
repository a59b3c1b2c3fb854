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
    return {
        "embedding": model.padded_vocab_size * h + small_embeddings(model),
        "attention": layers * (h * qkv_size(model) + h * h + bias * (qkv_size(model) + h)),
        "ffn": layers * (bank_parameters(model) + bias * h),
        "router": layers * router_parameters(model, ssd),
        "norm": (2 * layers + 1) * norm_parameters(model) + (norm_parameters(model) if model.family == "bert" else 0),
        "head": (0 if model.tie_embeddings else model.padded_vocab_size * h) + head_matrices(model) + head_bias(model),
    }


def small_embeddings(model: ModelConfig) -> int:
    """Parameters of the embeddings that no rank splits: of positions and of kinds of tokens."""
    positions = model.seq_length if model.position_embedding == "learned" else 0
    return (positions + model.num_token_types) * model.hidden_size


def head_matrices(model: ModelConfig) -> int:
    """Parameters of BERT's transform, pooler and classifier of sentences, whole on every rank of the last stage."""
    dense = (model.hidden_size + 1) * model.hidden_size
    sentence = dense + 2 * (model.hidden_size + 1) if model.predicts_sentences else 0
    return (dense if model.family == "bert" else 0) + sentence


def head_bias(model: ModelConfig) -> int:
    """Parameters of the bias of the logits."""
    return model.padded_vocab_size if model.family == "bert" else 0


def forward_flops(model: ModelConfig, ssd: SSDConfig) -> ForwardFlops:
    """FLOPs of one token's forward pass, matrix products only."""
    h, qkv = model.hidden_size, qkv_size(model)
    return ForwardFlops(
        attention=2 * h * (qkv + h) + 4 * model.seq_length * h,
        ffn=2 * ffn_matrices(model) * h * model.ffn_hidden_size,
        router=router_flops(model, ssd) / ssd.routing_granularity,
        head=2 * h * model.padded_vocab_size + (2 * h * h if model.family == "bert" else 0),
    )


def router_parameters(model: ModelConfig, ssd: SSDConfig) -> int:
    """Parameters of one router."""
    h, experts = model.hidden_size, ssd.num_experts
    bias = experts if ssd.balance_bias else 0
    if ssd.router == "centroid" and ssd.router_update == "avg_k":
        return 0
    return {
        "centroid": experts * h + bias,
        "switch": experts * h + bias,
        "pkm": 2 * math.isqrt(experts) * h,
        "mlp": experts * h + experts * experts,
    }.get(ssd.router, 0)


def router_flops(model: ModelConfig, ssd: SSDConfig) -> int:
    """FLOPs by which one router chooses for one token (or tile): products with its matrices, or with the bank's."""
    h, neurons = model.hidden_size, model.ffn_hidden_size
    read = {
        "avg_k": ssd.num_experts * h,
        "vanilla": neurons * h,
        "oracle": (ffn_matrices(model) - 1) * neurons * h,
    }
    if ssd.router == "centroid" and ssd.router_update == "avg_k":
        return 2 * read["avg_k"]
    bias = ssd.num_experts if ssd.balance_bias else 0
    return 2 * (read.get(ssd.router, router_parameters(model, ssd) - bias))


def flops_per_token(model: ModelConfig, ssd: SSDConfig, live: float = 1.0) -> Flops:
    """FLOPs per token in both modes.

    Args:
        live: share of the weights of attention and feed-forward networks that are not masked; products with masked
            ones do not count (arXiv 2108.06277: 3 * 2 * inputs * tokens * outputs * live), and there is no sparse mode.
    """
    layers, flops = model.num_layers, forward_flops(model, ssd)
    masked = 2 * layers * sum(masked_weights(model)) * (1 - live)
    dense = layers * (flops.attention + flops.ffn) + flops.head - masked
    sparse = layers * (flops.attention + flops.ffn * ssd.top_k / ssd.num_experts + flops.router) + flops.head
    return Flops(3.0 * dense, 3.0 * sparse)


def masked_weights(model: ModelConfig) -> tuple[int, int]:
    """Weights of one layer's attention and of its feed-forward network that masks cover."""
    h = model.hidden_size
    return h * (qkv_size(model) + h), ffn_matrices(model) * h * model.ffn_hidden_size


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
