"""Parameters and FLOPs of a model from its settings alone (tests hold them against the built model)."""

import math
from dataclasses import dataclass

from ssd_megatron.config.model import ModelConfig
from ssd_megatron.config.schema import SSDConfig


@dataclass(frozen=True)
class Flops:
    """FLOPs of training on one token: forward and backward (three times forward; routers that learn nothing have no
    backward), matrix products only.

    Attention counts every pair of tokens, also those that the causal mask hides, as is usual for MFU. Recomputation
    does not count.
    """

    dense: float
    sparse: float

    def of(self, mode: str) -> float:
        return self.sparse if mode == "sparse" else self.dense


@dataclass(frozen=True)
class ForwardFlops:
    """FLOPs of one token's forward pass through one layer: attention, dense feed-forward network and router."""

    attention: float
    ffn: int
    router: float


@dataclass(frozen=True)
class Layer:
    """What one layer is asked to do.

    Attributes:
        length: tokens of a sample that go through it.
        context: of a decoder's layer, tokens of the encoder that it looks at; 0 without an encoder.
        ends_encoder: it also normalises the encoder's output.
    """

    length: int
    context: int = 0
    ends_encoder: bool = False


def layers_of(model: ModelConfig) -> list[Layer]:
    """All layers, first one first."""
    layers = [Layer(model.seq_length)] * model.num_layers
    if model.family == "t5":
        layers[-1] = Layer(model.seq_length, ends_encoder=True)
        layers += [Layer(model.decoder_seq_length, context=model.seq_length)] * model.num_decoder_layers
    return layers


def stage_layers(model: ModelConfig, stages: int, stage: int) -> list[Layer]:
    """The layers of one of some pipeline stages."""
    each = model.total_layers // stages
    return layers_of(model)[stage * each : (stage + 1) * each]


def parameter_counts(model: ModelConfig, ssd: SSDConfig) -> dict[str, int]:
    """Parameters by part of the model."""
    h, layers = model.hidden_size, layers_of(model)
    bias = int(model.add_bias)
    return {
        "embedding": model.padded_vocab_size * h + small_embeddings(model),
        "attention": sum(split_attention(model, layer) + whole_attention(model) for layer in layers),
        "ffn": len(layers) * (bank_parameters(model) + bias * h),
        "router": len(layers) * router_parameters(model, ssd),
        "norm": (sum(map(layer_norms, layers)) + embedding_norms(model) + head_norms(model)) * norm_parameters(model),
        "head": (0 if model.tie_embeddings else model.padded_vocab_size * h) + head_matrices(model) + head_bias(model),
    }


def split_attention(model: ModelConfig, layer: Layer) -> int:
    """Parameters of a layer's attention that tensor-parallel ranks split; to an encoder: queries, keys and values, and
    the projection of the heads' outputs."""
    h, queries = model.hidden_size, query_size(model)
    cross = 4 * h * queries if layer.context else 0
    return (h + model.add_bias) * qkv_size(model) + h * queries + cross


def whole_attention(model: ModelConfig) -> int:
    """Parameters of a layer's attention that every tensor-parallel rank has: the last bias."""
    return model.add_bias * model.hidden_size


def layer_norms(layer: Layer) -> int:
    return 2 + (layer.context > 0) + layer.ends_encoder


def embedding_norms(model: ModelConfig) -> int:
    return int(model.norm_position == "post")


def head_norms(model: ModelConfig) -> int:
    return int(model.norm_position == "pre") + int(model.family == "bert")


def small_embeddings(model: ModelConfig) -> int:
    """Parameters of the embeddings that no rank splits: of positions and of kinds of tokens."""
    if model.position_embedding == "relative":
        return 2 * model.relative_attention_num_buckets * model.num_attention_heads
    positions = model.seq_length if model.position_embedding == "learned" else 0
    return (positions + model.num_token_types) * model.hidden_size


def position_rows(model: ModelConfig) -> int:
    """Rows of hidden size in which the tables of attention biases by distance fit, as they travel between stages."""
    return -(-small_embeddings(model) // model.hidden_size) if model.position_embedding == "relative" else 0


def head_matrices(model: ModelConfig) -> int:
    """Parameters of BERT's transform, pooler and classifier of sentences, whole on every rank of the last stage."""
    dense = (model.hidden_size + 1) * model.hidden_size
    sentence = dense + 2 * (model.hidden_size + 1) if model.predicts_sentences else 0
    return (dense if model.family == "bert" else 0) + sentence


def head_bias(model: ModelConfig) -> int:
    """Parameters of the bias of the logits."""
    return model.padded_vocab_size if model.family == "bert" else 0


def forward_flops(model: ModelConfig, ssd: SSDConfig, layer: Layer) -> ForwardFlops:
    """FLOPs of one token's forward pass through a layer, matrix products only; keys and values of an encoder's tokens
    are shared out over the decoder's."""
    h, queries = model.hidden_size, query_size(model)
    cross = 4 * queries * (h + layer.context + h * layer.context / layer.length) if layer.context else 0
    return ForwardFlops(
        attention=2 * h * (qkv_size(model) + queries) + 4 * layer.length * queries + cross,
        ffn=2 * ffn_matrices(model) * h * model.ffn_hidden_size,
        router=router_flops(model, ssd) / ssd.routing_granularity,
    )


def head_flops(model: ModelConfig) -> int:
    """FLOPs of the head's forward pass for one token that has logits."""
    transform = model.hidden_size if model.family == "bert" else 0
    return 2 * model.hidden_size * (model.padded_vocab_size + transform)


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


def flops_per_token(model: ModelConfig, ssd: SSDConfig, live: float = 1.0) -> Flops:
    """FLOPs per token in both modes, mean over the tokens of a sample.

    Args:
        live: share of the weights of attention and feed-forward networks that are not masked; products with masked
            ones do not count (arXiv 2108.06277: 3 * 2 * inputs * tokens * outputs * live), and there is no sparse mode.
    """
    dense = sparse = float(model.predicted_tokens * head_flops(model))
    for layer in layers_of(model):
        flops = forward_flops(model, ssd, layer)
        masked = (1 - live) * masked_flops(model, layer)
        dense += layer.length * (flops.attention + flops.ffn - masked)
        router = flops.router if ssd.router_learns else flops.router / 3
        sparse += layer.length * (flops.attention + flops.ffn * ssd.top_k / ssd.num_experts + router)
    return Flops(3.0 * dense / model.sample_tokens, 3.0 * sparse / model.sample_tokens)


def masked_flops(model: ModelConfig, layer: Layer) -> float:
    """FLOPs of one token's forward pass through the matrices of a layer that masks cover."""
    h, queries = model.hidden_size, query_size(model)
    cross = 4 * h * queries * (1 + layer.context / layer.length) if layer.context else 0.0
    return 2 * h * (qkv_size(model) + queries) + cross + 2 * ffn_matrices(model) * h * model.ffn_hidden_size


def masked_weights(model: ModelConfig, layer: Layer) -> tuple[int, int]:
    """Weights of a layer's attention and of its feed-forward network that masks cover."""
    h = model.hidden_size
    attention = split_attention(model, layer) - model.add_bias * qkv_size(model)
    return attention, ffn_matrices(model) * h * model.ffn_hidden_size


def query_size(model: ModelConfig) -> int:
    """Width of all heads together: outputs for queries, inputs of the output projection."""
    return model.num_attention_heads * model.head_dim


def qkv_size(model: ModelConfig) -> int:
    """Outputs of the projection to queries, keys and values."""
    return query_size(model) + 2 * model.num_query_groups * model.head_dim


def norm_parameters(model: ModelConfig) -> int:
    return model.hidden_size if model.normalization == "rmsnorm" else 2 * model.hidden_size


def ffn_matrices(model: ModelConfig) -> int:
    return 3 if model.gated else 2


def bank_parameters(model: ModelConfig) -> int:
    """Parameters of one feed-forward network with a row per neuron: all but the last bias."""
    biases = ffn_matrices(model) - 1 if model.add_bias else 0
    return (ffn_matrices(model) * model.hidden_size + biases) * model.ffn_hidden_size
