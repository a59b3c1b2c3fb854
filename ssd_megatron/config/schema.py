"""The section "ssd_megatron" of ds.json as frozen, typed models. The description of a field is its documentation.

What one field may be is said here; what concerns several fields is in checks.py and layout_checks.py.
"""

import math
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from ssd_megatron.config.fields import (
    Blend,
    FilePath,
    Fraction,
    NonNegative,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    RecordedPartition,
    Section,
    Share,
    Split,
    only,
    optional,
    required,
)
from ssd_megatron.config.model import ModelConfig

Mode = Literal["dense", "sparse"]
Router = Literal["centroid", "avg_k", "switch", "pkm", "mlp", "hash", "rand_hash", "vanilla", "oracle", "random"]

HASH_ROUTERS: frozenset[str] = frozenset({"hash", "rand_hash"})
NEURON_ROUTERS: frozenset[str] = frozenset({"rand_hash", "vanilla"})  # whose experts are single neurons
TOKEN_ROUTERS: frozenset[str] = HASH_ROUTERS | {"oracle", "random"}  # that have nothing to say of a tile of tokens


class DataConfig(Section):
    """Where the tokens come from: IndexedDatasets, named by their path without .bin and .idx."""

    paths: Blend | None = optional(None, "One path, or weights and paths in turn, divided as `split` says.")
    train_paths: Blend | None = optional(None, "Training data, instead of `paths`; same form.")
    valid_paths: Blend | None = optional(None, "Validation data, with `train_paths`; same form.")
    test_paths: Blend | None = optional(None, "Test data, with `train_paths`, may be left out; same form.")
    split: Split = optional("969,30,1", "Shares of documents for train, validation and test (`paths` only).")
    tokenizer: FilePath = required("SentencePiece .model or Hugging Face tokenizer.json that made the data.")
    cache_dir: FilePath | None = optional(None, "Folder of the sample index cache; null: `<run_dir>/data_cache`.")
    mask_fraction: Annotated[float, Field(gt=0, lt=1)] = optional(0.15, "`bert`, `t5`: share of tokens to predict.")
    mean_span_length: Annotated[float, Field(ge=1)] = optional(3.0, "`t5`: mean tokens of a span to predict.")
    mask_token_fraction: Share = optional(0.8, "`bert`: share of those that the mask token replaces.")
    random_token_fraction: Share = optional(0.1, "`bert`: share that a random token replaces; the rest stay.")
    whole_words: bool = optional(True, "`bert`: choose whole words, not single tokens.")
    eod_mask_loss: bool = optional(False, "Leave the loss at end-of-document tokens out.")
    reset_position_ids: bool = optional(False, "Count positions from 0 again after each end of document.")
    reset_attention_mask: Annotated[
        bool,
        only(False, "is not supported yet: use false (attention crosses documents, as in GPT pre-training)"),
    ] = optional(False, "Keep attention inside documents; only false in this version.")
    num_workers: NonNegative = optional(0, "Loader processes per rank; 0 reads in the training process.")


class ParallelConfig(Section):
    """Sizes of the model-parallel groups; data parallelism follows from the number of processes."""

    tensor_parallel_size: Positive = optional(1, "Ranks that share each layer; best within a node.")
    pipeline_parallel_size: Positive = optional(1, "Pipeline stages; must divide the number of layers.")
    expert_parallel_size: Positive = optional(
        1, "Data-parallel ranks that share the neurons of each feed-forward network; divides the data parallel size."
    )
    dense_gather: Literal["microbatch", "step"] = optional(
        "microbatch",
        "Dense phases with expert parallelism: gather a layer's neurons in each forward and backward pass, or once per "
        "optimizer step, in memory for all layers and their gradients.",
    )
    timeout_seconds: Positive = optional(
        1800,
        "Longest wait for another rank; then the job ends and says what waited.",
    )

    @property
    def homes(self) -> int:
        """Ranks over which the neurons of one feed-forward network are split."""
        return self.tensor_parallel_size * self.expert_parallel_size


class PhaseConfig(Section):
    """One entry of `ssd.phases`."""

    start_step: Positive = required("First step of the phase; the first phase starts at step 1.")
    mode: Mode = required("`dense` or `sparse`.")


class SSDConfig(Section):
    """Switchable sparse-dense learning: when to switch, how neurons form experts, how tokens choose them."""

    schedule: Literal["adaptive", "fixed", "dense", "sparse"] = optional(
        "adaptive", "Who sets the phases: the activations as watched, the list `phases`, or one mode throughout."
    )
    phases: Annotated[tuple[PhaseConfig, ...], Field(strict=False)] | None = optional(
        None, 'Phases of `fixed`: `[{"start_step": 1, "mode": "dense"}, ...]`, modes in turn.'
    )
    num_experts: Positive = optional(16, "Experts per feed-forward network, all of equal size.")
    top_k: Positive = optional(4, "Experts that each token computes in sparse mode, mean over layers.")
    top_k_allocation: Literal["measured", "equal"] = optional(
        "measured",
        "Experts per layer: more where they save more of the probe loss, at the same cost; or `top_k` in each.",
    )
    partition: Literal["kmeans", "coactivation", "random", "kept"] | RecordedPartition = optional(
        "kmeans",
        "How neurons form experts: `kmeans`, `coactivation`, `random`, the path of a recorded partition, or `kept`: "
        "experts and routers stay those of `checkpoint.start_from`.",
    )
    routing: Literal["live"] | FilePath = optional(
        "live",
        "Which experts a token gets in training: as the router says, or the folder of a recorded routing of the same "
        "samples, on any layout (to compare runs where a tie would choose).",
    )
    record_routing: FilePath | None = optional(
        None, "Folder for the experts of every token of every sparse step, for `routing`; null: none; one process only."
    )
    router: Router = optional(
        "centroid",
        "Who chooses experts: their mean normalised row (`centroid`), their mean row as it is (`avg_k`), a learned "
        "softmax that scales outputs (`switch`), product keys (`pkm`), two layers that are trained elsewhere (`mlp`), "
        "a hash of the token's id for experts (`hash`) or single neurons (`rand_hash`), all pre-activations "
        "(`vanilla`), all activations as they will be (`oracle`, a ceiling), or the position (`random`, a control).",
    )
    router_update: Literal["straight_through", "frozen", "avg_k"] = optional(
        "straight_through",
        "A `centroid` router learns by gradient, stays, or is recomputed from the current weights, as router `avg_k`.",
    )
    load_balance: NonNegativeFloat = optional(0.01, "`switch`: weight of the load-balancing loss, by sequence.")
    z_loss: NonNegativeFloat = optional(0.001, "`switch`: weight of the loss that keeps scores small.")
    balance_bias: bool = optional(
        False,
        "Each expert has a bias that enters the choice alone and falls at the router's learning rate while the expert "
        "has more than its share of the load.",
    )
    routing_granularity: Positive = optional(
        1,
        "Tokens in a row that share their experts, chosen by the mean of as many tokens before them. With at least as "
        "many as an expert has neurons, small experts are no slower on a CPU.",
    )
    sparse_fraction: Annotated[Fraction, Field(gt=0)] = optional(
        0.5, "`adaptive`: target share of sparse steps in all steps."
    )
    sparse_phase_fraction: Annotated[Fraction, Field(gt=0)] = optional(
        0.25, "`adaptive`: longest sparse phase, as a share of all steps."
    )
    check_interval: Positive = optional(100, "Steps between two checks of the activation statistics.")
    stable_checks: Positive = optional(2, "`adaptive`: similar checks in a row that start a sparse phase.")
    similarity_threshold: Annotated[float, Field(gt=0, le=1)] = optional(
        0.65, "`adaptive`: a check is similar if structure similarity and expert overlap with the last one reach this."
    )
    min_dense_steps: Positive = optional(50, "`adaptive`: least dense steps between two sparse phases.")
    warmup_fraction: Fraction = optional(0.1, "`adaptive`: first share of the steps, always dense.")
    final_dense_fraction: Fraction = optional(0.15, "`adaptive`: last share of the steps, always dense.")
    backend: Literal["auto", "reference", "torch", "cpp", "triton"] = optional(
        "auto",
        "Kernels of sparse mode. `auto`: `triton` on CUDA devices (needs the package), `cpp` on CPUs with AVX-512 and "
        "for bf16 AMX (needs a C++ compiler) unless an expert's matrix has more than 1 MiB, else `torch`.",
    )
    probe_samples: Positive = optional(8, "Fixed held-out samples on which activation statistics are taken.")
    rebalance_limit: Annotated[float, Field(gt=1)] | None = optional(
        None,
        "Busiest rank's share of the tokens of a step's last microbatch over the mean at which, at a check in a sparse "
        "phase, experts move to other ranks; null: only at a switch.",
    )
    check_layers: Positive | None = optional(None, "Layers that a check between switches looks at; null: all.")
    kmeans_rounds: Positive = optional(20, "Most rounds of balanced k-means per clustering.")
    switch_tolerance: Literal["auto"] | PositiveFloat = optional(
        "auto", "Relative change of the dense probe loss tolerated at a switch; `auto`: by dtype."
    )
    on_spike: Literal["ignore", "dense"] = optional(
        "ignore", "`adaptive`: after a loss spike that follows a switch, only log it, or also go back to dense."
    )
    spike_factor: Annotated[float, Field(gt=1)] = optional(
        1.2, "A training loss above this many times the mean before the switch is a spike."
    )

    @property
    def router_kind(self) -> Router:
        """`router`, or what `router_update` makes of a centroid router."""
        return "avg_k" if self.router == "centroid" and self.router_update == "avg_k" else self.router

    @property
    def straight_through(self) -> bool:
        """The router learns by gates that are 1 in value."""
        return self.router == "pkm" or (self.router == "centroid" and self.router_update == "straight_through")

    @property
    def router_learns(self) -> bool:
        """Gates carry a gradient."""
        return self.straight_through or self.router == "switch"


def expert_shape(model: ModelConfig, ssd: SSDConfig) -> tuple[int, int]:
    """Neurons and hidden size of an expert."""
    return model.ffn_hidden_size // ssd.num_experts, model.hidden_size


class WeightSparsityConfig(Section):
    """Sparse weights (arXiv 2108.06277): each matrix of attention and feed-forward networks keeps a mask of blocks."""

    sparsity: Annotated[float, Field(gt=0, lt=1)] = optional(0.9, "Share of each matrix's weights that are 0.")
    block_size: Literal[1, 4, 8, 16] = optional(1, "Weights live and die in square blocks of this side.")
    mask: Literal["dynamic", "static"] = optional("dynamic", "Blocks move in the course of the run, or never.")
    updates: Annotated[int, Field(ge=2)] = optional(
        160, "`dynamic`: stretches of equal length in the run, between which blocks move; the paper has 80 for 16x16."
    )
    prune_ratio: Annotated[float, Field(gt=0, lt=1)] = optional(
        0.5, "`dynamic`: share of the live blocks pruned and regrown at first; it falls to 0 by a cosine."
    )
    criterion: Literal["l1", "l2", "linf"] = optional("l1", "`dynamic`: blocks with the least of this norm are pruned.")
    regrow: Literal["random", "gradient"] = optional(
        "random", "`dynamic`: blocks grow at random places, or where the gradient's norm is largest."
    )
    scale_learning_rate: bool = optional(
        False, "Multiply learning rates by exp(1.969 s^2 + 0.2905 s), s the sparsity: best for BERT in the paper."
    )

    @property
    def live(self) -> float:
        """Share of the weights that are not masked."""
        return 1 - self.sparsity

    @property
    def learning_rate_factor(self) -> float:
        """What learning rates are multiplied with."""
        return math.exp(1.969 * self.sparsity**2 + 0.2905 * self.sparsity) if self.scale_learning_rate else 1.0


class TrainingConfig(Section):
    """Length of the run, evaluation, recomputation, and what happens to steps that fail."""

    train_steps: Positive = required("Optimizer steps of the whole run; schedules run to here.")
    stop_after_step: Positive | None = optional(None, "Save after this step and end with status 0; null: run on.")
    eval_interval: Positive = optional(100, "Steps between two evaluations.")
    eval_steps: Positive = optional(4, "Batches of the global batch size in one evaluation, always the same.")
    recompute: Literal["none", "full"] = optional("none", "Activations recomputed in backward: none, or every layer's.")
    compile: Literal["none", "blocks"] = optional(
        "none", "torch.compile of every block's training passes; needs a C++ compiler, on GPUs also the package triton."
    )
    loss_chunk_tokens: Positive | None = optional(
        None,
        "Keep no logits: compute those of so many tokens at a time, and again in backward; null: keep a microbatch's.",
    )
    max_bad_steps: Positive = optional(5, "Steps in a row with NaN or infinite loss or gradients that end the run.")


class CheckpointConfig(Section):
    """When checkpoints are written into `<run_dir>/checkpoints` and how many stay."""

    interval: Positive = optional(500, "Steps between two checkpoints; one is always written at the end.")
    keep_last: Positive | None = optional(2, "Complete checkpoints kept; null: all.")
    async_save: bool = optional(False, "Write files in the background while training goes on.")
    start_from: FilePath | None = optional(
        None,
        "Weights that a new run starts from: those of a run_dir, of a checkpoint's folder, or of a model imported by "
        "`tools/convert_checkpoint.py`, with the same `model` settings. All else starts anew, but for experts and "
        "routers with `ssd.partition` `kept`.",
    )


class LoggingConfig(Section):
    """What is shown and drawn; metrics.jsonl has every step."""

    log_interval: Positive = optional(10, "Steps between two lines on the console.")
    plots: bool = optional(True, "Draw the loss curves into `<run_dir>/plots` at the end.")
    peak_tflops: PositiveFloat | None = optional(
        None, "Peak TFLOP/s of one device, for the utilisation (MFU); null: known devices only."
    )


class SsdMegatronConfig(Section):
    """The section "ssd_megatron" of ds.json."""

    run_dir: FilePath = required("Folder of this run: config, metrics, checkpoints, logs and plots.")
    seed: Annotated[int, Field(ge=0, lt=2**31)] = optional(1234, "Seed of initial weights, data order and dropout.")
    model: ModelConfig = required("Shape of the Transformer.")
    data: DataConfig = required("Data and tokenizer.")
    parallel: ParallelConfig = optional(ParallelConfig(), "Model-parallel sizes.")
    ssd: SSDConfig = optional(SSDConfig(), "Switchable sparse-dense learning.")
    training: TrainingConfig = required("Length of the run and evaluation.")
    checkpoint: CheckpointConfig = optional(CheckpointConfig(), "Checkpoints.")
    logging: LoggingConfig = optional(LoggingConfig(), "Console, plots, utilisation.")
    weight_sparsity: WeightSparsityConfig | None = optional(None, "Sparse weights; null: dense ones.")
    ffn_expansion: Positive | None = optional(
        None,
        "Feed-forward networks with so many times the neurons, of which a token computes as many as before: short for "
        "`model.ffn_hidden_size` so many times larger and `ssd.top_k` as small a share of `ssd.num_experts`; with "
        "`ssd.schedule` `sparse`.",
    )

    @property
    def live_weights(self) -> float:
        """Share of the weights of attention and feed-forward networks that are not masked."""
        return 1.0 if self.weight_sparsity is None else self.weight_sparsity.live

    @property
    def data_cache_dir(self) -> Path:
        """Folder of the sample index cache."""
        return self.data.cache_dir or self.run_dir / "data_cache"
