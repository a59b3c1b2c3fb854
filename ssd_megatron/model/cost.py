"""Parameters, FLOPs and memory of a model, from its settings alone (tests hold them against the built model)."""

from dataclasses import dataclass

from ssd_megatron.config.schema import ModelConfig, SSDConfig

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


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
class Memory:
    """Bytes of one rank, estimated."""

    parameters: int
    gradients: int
    optimizer: int
    reduce_bucket: int
    activations: int

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.reduce_bucket + self.activations


def parameter_counts(model: ModelConfig, ssd: SSDConfig) -> dict[str, int]:
    """Parameters by part of the model."""
    h, layers = model.hidden_size, model.num_layers
    bias = int(model.add_bias)
    qkv = h + 2 * model.num_query_groups * model.head_dim
    norm = h if model.normalization == "rmsnorm" else 2 * h
    positions = model.seq_length * h if model.position_embedding == "learned" else 0
    return {
        "embedding": model.padded_vocab_size * h + positions,
        "attention": layers * (h * qkv + h * h + bias * (qkv + h)),
        "ffn": layers * _ffn_parameters(model),
        "router": layers * ssd.num_experts * h,
        "norm": (2 * layers + 1) * norm,
        "head": 0 if model.tie_embeddings else model.padded_vocab_size * h,
    }


def flops_per_token(model: ModelConfig, ssd: SSDConfig) -> Flops:
    """FLOPs per token in both modes."""
    h, layers = model.hidden_size, model.num_layers
    qkv = h + 2 * model.num_query_groups * model.head_dim
    attention = 2 * h * (qkv + h) + 4 * model.seq_length * h
    ffn = 2 * _matrices(model) * h * model.ffn_hidden_size
    head = 2 * h * model.padded_vocab_size
    router = 2 * h * ssd.num_experts
    dense = layers * (attention + ffn) + head
    sparse = layers * (attention + ffn * ssd.top_k / ssd.num_experts + router) + head
    return Flops(3.0 * dense, 3.0 * sparse)


def memory_per_rank(
    model: ModelConfig,
    ssd: SSDConfig,
    *,
    dtype: str,
    micro_batch_size: int,
    data_parallel_size: int,
    zero_stage: int,
    reduce_bucket_size: int,
    recompute: bool,
) -> Memory:
    """Bytes of one data-parallel rank under ZeRO, dense mode; activations to about 20 %.

    Args:
        reduce_bucket_size: elements of DeepSpeed's gradient buffer, `zero_optimization.reduce_bucket_size`.
    """
    parameters = sum(parameter_counts(model, ssd).values())
    size = BYTES[dtype]
    tokens = micro_batch_size * model.seq_length
    h = model.hidden_size
    # What autograd keeps of a layer, elements per token: norms, attention in and out, residuals; pre- and activations.
    kept = 10 * h + 2 * _matrices(model) // 2 * model.ffn_hidden_size
    layers = model.num_layers * h + kept if recompute else model.num_layers * kept
    logits = model.padded_vocab_size * (size + 8)
    return Memory(
        parameters=parameters * size,
        gradients=parameters * size // (data_parallel_size if zero_stage == 2 else 1),
        optimizer=parameters * 12 // data_parallel_size,
        reduce_bucket=reduce_bucket_size * size,
        activations=tokens * (layers * size + logits),
    )


def _matrices(model: ModelConfig) -> int:
    return 3 if model.gated else 2


def _ffn_parameters(model: ModelConfig) -> int:
    h, neurons = model.hidden_size, model.ffn_hidden_size
    biases = (_matrices(model) - 1) * neurons + h if model.add_bias else 0
    return _matrices(model) * h * neurons + biases
