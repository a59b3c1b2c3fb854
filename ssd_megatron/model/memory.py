"""Memory of one rank of a layout, from the settings alone: what parallel/, ffn/ and DeepSpeed's ZeRO keep.

Sizes in formulas: T tokens of a microbatch, h hidden, f neurons, qkv outputs of the attention's projection, v padded
vocabulary; TP, PP, EP, DP sizes of the layout.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ssd_megatron.config.load import Dtype, RunConfig
from ssd_megatron.config.model import ModelConfig
from ssd_megatron.config.schema import SSDConfig
from ssd_megatron.model.cost import (
    Layer,
    bank_parameters,
    embedding_norms,
    ffn_matrices,
    head_bias,
    head_matrices,
    head_norms,
    layer_norms,
    masked_weights,
    norm_parameters,
    qkv_size,
    query_size,
    router_parameters,
    small_embeddings,
    split_attention,
    stage_layers,
    whole_attention,
)

BYTES: dict[Dtype, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
OPTIMIZER_BYTES = 12  # fp32 master and two fp32 moments (ZeRO, arXiv 1910.02054)
BUCKET_PADDING = 1.25  # at most, of the slots of sparse networks (ffn/kernels/dispatch.py)
OVERWRITING = ("relu", "reglu")  # activations whose output takes the place of their input
ROUTING_BYTES = 28  # of a token copy: its expert, its slot and the slot's token (int64), its softmax weight (fp32)


@dataclass(frozen=True)
class Layout:
    """How a job is cut: rank = (stage * data + d) * tensor + t; expert-parallel ranks are neighbours among the
    data-parallel ones.

    Attributes:
        tensor, pipeline, expert, data: sizes; `expert` divides `data`.
        micro_batch_size: samples of a rank in one forward pass.
        microbatches: forward passes of a rank in one optimizer step.
        zero_stage: 1 or 2.
        recompute: activations of layers are computed again in backward.
        gather_once: expert-parallel ranks gather dense weights once per optimizer step, not in every pass.
        loss_chunk_tokens: tokens whose logits are there at a time; None: a microbatch's.
        masked: weights are sparse (weight_sparsity).
    """

    tensor: int = 1
    pipeline: int = 1
    expert: int = 1
    data: int = 1
    micro_batch_size: int = 1
    microbatches: int = 1
    zero_stage: int = 1
    recompute: bool = False
    gather_once: bool = False
    loss_chunk_tokens: int | None = None
    masked: bool = False

    @property
    def ranks(self) -> int:
        return self.tensor * self.pipeline * self.data

    @property
    def homes(self) -> int:
        """Ranks over which the neurons of one feed-forward network are split."""
        return self.tensor * self.expert

    @property
    def batch(self) -> int:
        """Samples of one optimizer step over all ranks."""
        return self.micro_batch_size * self.microbatches * self.data


def layout_of(config: RunConfig) -> Layout:
    """The layout that a run will have."""
    sizes, training = config.ssd_megatron.parallel, config.ssd_megatron.training
    return Layout(
        tensor=sizes.tensor_parallel_size,
        pipeline=sizes.pipeline_parallel_size,
        expert=sizes.expert_parallel_size,
        data=config.data_parallel_size,
        micro_batch_size=config.micro_batch_size,
        microbatches=config.gradient_accumulation_steps,
        zero_stage=config.zero_stage,
        recompute=training.recompute == "full",
        gather_once=sizes.dense_gather == "step",
        loss_chunk_tokens=training.loss_chunk_tokens,
        masked=config.ssd_megatron.weight_sparsity is not None,
    )


@dataclass(frozen=True)
class RankParameters:
    """Parameters that one rank holds, by the ranks over which ZeRO splits their optimizer state: `plain` over all
    data-parallel ones, `bank` (rows of neurons) over those with the same neurons."""

    plain: int
    bank: int

    @property
    def total(self) -> int:
        return self.plain + self.bank

    def owned(self, layout: Layout) -> float:
        """Parameters whose optimizer state this rank keeps."""
        return self.plain / layout.data + self.bank * layout.expert / layout.data


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at its peak, estimated, by what they hold.

    Attributes:
        parameters, gradients, optimizer: of the whole step.
        masks: of sparse weights, a byte each.
        kept_weights: of all the stage's layers, gathered over the expert-parallel ranks once for the whole step.
        kept_gradients: of those weights, summed over microbatches; without those of the rank's own neurons, which are
            in `gradients` and come with the last microbatch.
        buckets: DeepSpeed's buffers for reducing gradients.
        activations: kept between forward and backward.
        logits: of the last stage, over which their gradient is written.
        gathered: weights of one layer, gathered over the expert-parallel ranks for a pass, and a gradient.
        working: largest need within one layer.
        update: gradients in fp32 during the optimizer step, when activations are gone.
    """

    parameters: int
    gradients: int
    optimizer: int
    masks: int
    kept_weights: int
    kept_gradients: int
    buckets: int
    activations: int
    logits: int
    gathered: int
    working: int
    update: int

    @property
    def resident(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.masks + self.kept_weights

    @property
    def total(self) -> int:
        """Peak: in a backward pass or in the update, whichever needs more."""
        # A layer's working memory is not needed while the logits are, at the very start of backward.
        backward = self.kept_gradients + self.buckets + self.activations
        backward += max(self.logits, self.gathered + self.working)
        return self.resident + max(backward, self.update)


def rank_parameters(model: ModelConfig, ssd: SSDConfig, layout: Layout, stage: int) -> RankParameters:
    """Parameters of one rank of a stage. Source: Megatron-LM (arXiv 1909.08053) for what TP splits; ffn/homes.py."""
    h, tp = model.hidden_size, layout.tensor
    word, norm = model.padded_vocab_size // tp * h, norm_parameters(model)
    layers = stage_layers(model, layout.pipeline, stage)
    plain = sum(split_attention(model, layer) // tp + layer_norms(layer) * norm for layer in layers)
    plain += len(layers) * (whole_attention(model) + model.add_bias * h + router_parameters(model, ssd))
    if stage == 0:
        plain += word + small_embeddings(model) + embedding_norms(model) * norm
    if stage == layout.pipeline - 1:
        plain += (0 if model.tie_embeddings and layout.pipeline == 1 else word) + head_bias(model) // tp
        plain += head_matrices(model) + head_norms(model) * norm
    return RankParameters(plain, len(layers) * bank_parameters(model) // layout.homes)


def memory_per_rank(
    model: ModelConfig, ssd: SSDConfig, layout: Layout, *, dtype: Dtype, reduce_bucket_size: int
) -> Memory:
    """The rank that needs most, over stages and modes of the run.

    Activations are those of GPUs (fused attention and norms), with experts loaded evenly.

    Args:
        reduce_bucket_size: elements of DeepSpeed's gradient buffer, `zero_optimization.reduce_bucket_size`.
    """
    return max(
        (
            stage_memory(model, ssd, layout, stage, mode, dtype=dtype, reduce_bucket_size=reduce_bucket_size)
            for stage in range(layout.pipeline)
            for mode in modes_of(ssd)
        ),
        key=lambda memory: memory.total,
    )


def modes_of(ssd: SSDConfig) -> tuple[str, ...]:
    """The modes that steps of the run can have."""
    return (ssd.schedule,) if ssd.schedule in ("dense", "sparse") else ("dense", "sparse")


def stage_memory(
    model: ModelConfig, ssd: SSDConfig, layout: Layout, stage: int, mode: str, *, dtype: Dtype, reduce_bucket_size: int
) -> Memory:
    """Memory of the ranks of one stage in one mode."""
    size = BYTES[dtype]
    parameters = rank_parameters(model, ssd, layout, stage)
    owned = parameters.owned(layout)
    samples = layout.micro_batch_size
    longest = max(layer.length for layer in stage_layers(model, layout.pipeline, stage))
    kept = owned if layout.zero_stage == 2 else parameters.total
    # One buffer; a second one with a pipeline (reduce_gradients makes it beside setup_buckets'); a flattened copy.
    buckets = (2 if layout.pipeline > 1 else 1) * reduce_bucket_size + min(reduce_bucket_size, parameters.total)
    buckets = buckets if layout.data > 1 else 0  # with nothing to reduce, gradients stay where they are (zero.py)
    last = stage == layout.pipeline - 1
    covered = [masked_weights(model, layer) for layer in stage_layers(model, layout.pipeline, stage)]
    masked = sum(attention / layout.tensor + ffn / layout.homes for attention, ffn in covered)
    kept_weights = kept_gradients = gathered = 0.0
    if mode == "dense" and layout.expert > 1:
        matrix = model.hidden_size * model.ffn_hidden_size / layout.tensor
        if not layout.gather_once:
            gathered = (ffn_matrices(model) + 1) * matrix
        elif layout.microbatches > 1:
            kept_weights = parameters.bank * layout.expert
            kept_gradients = kept_weights - parameters.bank
            gathered = matrix
        else:
            kept_weights = parameters.bank * layout.expert
            gathered = 2 * matrix  # a gradient, and the copy of it that is to be summed
    return Memory(
        parameters=parameters.total * size,
        gradients=round(kept * size),
        optimizer=round(owned * OPTIMIZER_BYTES),
        masks=round(masked) if layout.masked else 0,
        kept_weights=round(kept_weights * size),
        kept_gradients=round(kept_gradients * size),
        buckets=buckets * size,
        activations=round(samples * stage_activation_bytes(model, ssd, layout, stage, mode, size)),
        logits=logit_bytes(model, layout, size) if last else 0,
        gathered=round(gathered * size),
        working=round(samples * longest * working_bytes(model, ssd, layout, mode, size)),
        update=round(owned * (4 + size)),  # its own part of the gradients, flattened, and in fp32
    )


def stage_activation_bytes(
    model: ModelConfig, ssd: SSDConfig, layout: Layout, stage: int, mode: str, size: int
) -> float:
    """Bytes that a stage keeps for each sample of a microbatch, for all microbatches that it has in flight.

    1F1B (PipeDream-flush, arXiv 2006.09503): stage s waits for the backward of at most PP - s microbatches. With
    recomputation only the inputs of layers stay, and one layer's activations come back at a time.
    """
    in_flight = min(layout.pipeline - stage, layout.microbatches)
    layers, h = stage_layers(model, layout.pipeline, stage), model.hidden_size
    each = [layer.length * layer_activation_bytes(model, ssd, layout, mode, size, layer) for layer in layers]
    inputs = sum(layer.length for layer in layers) * h * size
    head = model.predicted_tokens * _head_activations(model) * size if stage == layout.pipeline - 1 else 0
    embedding = model.seq_length * h * size * embedding_norms(model) if stage == 0 else 0  # its norm's input
    kept = embedding + _bias_bytes(model, layout, layers, size) + (inputs if layout.recompute else sum(each))
    return in_flight * kept + (max(each) if layout.recompute else 0) + head


def _bias_bytes(model: ModelConfig, layout: Layout, layers: Sequence[Layer], size: int) -> float:
    """Bytes for each sample of the attention biases by distance, which the layers of a kind share; they are the same
    for all samples of a microbatch."""
    if model.position_embedding != "relative":
        return 0.0
    lengths = {layer.context > 0: layer.length for layer in layers}
    whole = sum(length * length for length in lengths.values()) * model.num_attention_heads / layout.tensor * size
    return whole / layout.micro_batch_size


def _head_activations(model: ModelConfig) -> int:
    """Numbers for each token that the head keeps beside the logits: its input, what comes out of its norm, and of
    BERT's transform the norm's input and output, and the activation's input where that is not overwritten."""
    tensors = 2 if model.norm_position == "pre" else 1
    if model.family == "bert":
        tensors += 2 if model.activation in OVERWRITING else 3
    return tensors * model.hidden_size


def layer_activation_bytes(
    model: ModelConfig, ssd: SSDConfig, layout: Layout, mode: str, size: int, layer: Layer
) -> float:
    """Bytes that autograd keeps of one layer for each token (tests compare them with what it saves).

    Whole on every tensor-parallel rank: inputs and outputs of norms (after the networks: one of them is the next
    layer's input, counted there). Split: queries, keys and values, the context,
    and of the feed-forward network its pre-activations and what the activation makes of them. Rotary embeddings keep
    queries and keys a second time, grouped queries without them the queries; dropout keeps two masks of a byte.
    """
    h, queries, tp = model.hidden_size, query_size(model), layout.tensor
    attention = (qkv_size(model) + queries) / tp
    if model.position_embedding == "rope":
        attention += (qkv_size(model) + queries) / 2 / tp
    elif model.num_query_groups != model.num_attention_heads:
        attention += queries / tp
    if layer.context:  # queries and context; keys and values of the encoder's tokens
        attention += 2 * queries / tp * (1 + layer.context / layer.length)
    networks = 2 + (layer.context > 0)
    masks = networks * h if model.dropout else 0
    norms = 2 * layer_norms(layer) * h
    return size * (norms + attention) + masks + _ffn_activation_bytes(model, ssd, layout, mode, size)


def _ffn_activation_bytes(model: ModelConfig, ssd: SSDConfig, layout: Layout, mode: str, size: int) -> float:
    neurons = model.ffn_hidden_size / layout.tensor
    if mode == "dense":
        # relu overwrites its input; the others keep it beside their output. A gate adds the other half and the product.
        tensors = (1 if model.activation in OVERWRITING else 2) + 2 * model.gated
        return size * tensors * neurons
    # Pre-activations (and the other half of a gate) of the chosen experts; the rest is computed again.
    hidden = size * (1 + model.gated) * neurons * ssd.top_k / ssd.num_experts
    kept = BUCKET_PADDING * hidden + ROUTING_BYTES * ssd.top_k / layout.tensor
    # With expert parallelism, the rows that arrive.
    arrived = expert_ranks_per_token(ssd, layout) * model.hidden_size * size if layout.expert > 1 else 0
    return kept + arrived


def working_bytes(model: ModelConfig, ssd: SSDConfig, layout: Layout, mode: str, size: int) -> float:
    """Bytes for each token that the backward of one layer needs for a moment, and what a pipeline receives and sends.

    Dense: gradients of the hidden values before and after the activation, and of the layer's input and output. Sparse
    (ffn/kernels/torch_bmm.py): a row of h for each token copy for x, dy and dx, and two gradients of hidden values.
    Backend cpp has no such rows and needs less.
    """
    h, neurons = model.hidden_size, model.ffn_hidden_size / layout.tensor
    rows = 4 * h if layout.pipeline > 1 else 2 * h
    if mode == "dense":
        return size * (2 * neurons + rows)
    slots = BUCKET_PADDING * ssd.top_k / layout.tensor
    return size * (slots * (3 * h + 2 * model.ffn_hidden_size / ssd.num_experts) + rows)


def logit_bytes(model: ModelConfig, layout: Layout, size: int) -> int:
    """Bytes of the logits that are there at a time (model/cross_entropy.py)."""
    tokens = layout.micro_batch_size * model.predicted_tokens
    return min(tokens, layout.loss_chunk_tokens or tokens) * model.padded_vocab_size // layout.tensor * size


def expert_ranks_per_token(ssd: SSDConfig, layout: Layout) -> float:
    """Expert-parallel ranks that hold at least one of a token's experts, expected for even and independent routing:
    EP * (1 - C(E - n, k) / C(E, k)) with n of E experts at each home."""
    experts, held = ssd.num_experts, ssd.num_experts // layout.homes
    missed = 1.0
    for chosen in range(ssd.top_k):
        missed *= max(0, experts - held - chosen) / (experts - chosen)
    return layout.expert * (1 - missed)
