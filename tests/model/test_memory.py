"""Memory of layouts: against numbers worked out by hand, against what autograd keeps, and against each other."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from ssd_megatron.config.schema import ParallelConfig
from ssd_megatron.model.cost import Layer, parameter_counts
from ssd_megatron.model.language_model import LanguageModel
from ssd_megatron.model.memory import (
    Layout,
    Memory,
    RankParameters,
    layer_activation_bytes,
    layout_of,
    memory_per_rank,
    modes_of,
    rank_parameters,
    stage_memory,
)
from ssd_megatron.parallel.topology import Topology
from ssd_megatron.training.assembly import make_engine
from tests.planning.helpers import model, ssd
from tests.ranks import run_ranks
from tests.small_engine import run_config

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gated, rotary, untied, without bias": {
        "activation": "reglu",
        "position_embedding": "rope",
        "add_bias": False,
        "tie_embeddings": False,
    },
    "grouped queries, gelu": {"num_attention_heads": 4, "num_query_groups": 2, "activation": "gelu"},
    "heads of an own size, rope": {
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "kv_channels": 24,
        "position_embedding": "rope",
    },
    "swiglu": {"activation": "swiglu"},
    "bert with sentences": {"family": "bert", "num_token_types": 2, "sentence_objective": "order"},
    "pre-norm bert, gelu, untied": {
        "family": "bert",
        "norm_position": "pre",
        "activation": "gelu",
        "tie_embeddings": False,
    },
}
# What autograd keeps of attention with a bias is more on a CPU, which has no fused kernel for it.
T5 = {
    "t5": {"family": "t5", "decoder_seq_length": 8, "num_decoder_layers": 4},
    "t5 1.1": {"family": "t5", "decoder_seq_length": 8, "kv_channels": 12, "activation": "geglu_tanh"},
}
KEYS = {"reduce_bucket_size": 1000}


def small_memory(layout: Layout, mode: str = "dense", stage: int = 0, **changes: Any) -> Memory:
    return stage_memory(model(**changes), ssd(), layout, stage, mode, dtype="bfloat16", **KEYS)


@pytest.mark.parametrize("name", SETTINGS)
def test_one_rank_holds_all_parameters(name: str) -> None:
    settings = model(**SETTINGS[name])
    held = rank_parameters(settings, ssd(), Layout(), 0)
    assert held.total == sum(parameter_counts(settings, ssd()).values())
    assert held.bank == parameter_counts(settings, ssd())["ffn"] - 4 * 64 * settings.add_bias  # without b_out


@pytest.mark.parametrize("name", SETTINGS)
def test_tensor_and_expert_ranks_together_hold_each_neuron_once(name: str) -> None:
    settings = model(**SETTINGS[name])
    whole = rank_parameters(settings, ssd(), Layout(), 0).bank
    for layout in (Layout(tensor=2), Layout(expert=4, data=4), Layout(tensor=2, expert=2, data=4, pipeline=2)):
        stages = [rank_parameters(settings, ssd(), layout, stage).bank for stage in range(layout.pipeline)]
        assert sum(stages) * layout.homes == whole


def built_parameters(topology: Topology, settings: dict[str, Any]) -> tuple[int, int]:
    config = run_config(world_size=1, **settings)
    gpt = LanguageModel(config.ssd_megatron, "torch", topology)
    banks = {id(p) for ffn in gpt.ffns.values() for p in ffn.bank.neuron_parameters().values()}
    bank = sum(p.numel() for p in gpt.parameters() if id(p) in banks)
    return sum(p.numel() for p in gpt.parameters()) - bank, bank


@pytest.mark.parametrize("name", SETTINGS | T5)
@pytest.mark.parametrize(
    "layout", [Layout(tensor=2), Layout(pipeline=2), Layout(expert=2, data=2)], ids=["TP2", "PP2", "EP2"]
)
def test_parameters_of_each_rank_are_those_of_the_built_model(name: str, layout: Layout) -> None:
    settings = (SETTINGS | T5)[name]
    config = run_config(**settings).ssd_megatron
    sizes = ParallelConfig(
        tensor_parallel_size=layout.tensor,
        pipeline_parallel_size=layout.pipeline,
        expert_parallel_size=layout.expert,
    )
    for rank, (plain, bank) in enumerate(run_ranks(2, built_parameters, settings, parallel=sizes)):
        stage = rank if layout.pipeline == 2 else 0
        assert rank_parameters(config.model, config.ssd, layout, stage) == RankParameters(plain, bank)


def kept_bytes(topology: Topology, mode: str, settings: dict[str, Any]) -> int:
    """What autograd keeps of the first block, each storage once, without parameters."""
    gpt = LanguageModel(kept_config(settings).ssd_megatron, "torch", topology).bfloat16()
    for ffn in gpt.ffns.values():
        ffn.mode = "sparse" if mode == "sparse" else "dense"
    parameters = {p.untyped_storage().data_ptr() for p in gpt.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    x = torch.randn(64, 8, 64, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        gpt.blocks["0"](x)
    return sum(t.untyped_storage().nbytes() for pointer, t in kept.items() if pointer not in parameters)


def kept_config(settings: dict[str, Any]) -> Any:
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "ffn_hidden_size": 512, "seq_length": 64}
    return run_config(**(sizes | settings))


@pytest.mark.parametrize("mode", ["dense", "sparse"])
@pytest.mark.parametrize("name", SETTINGS)
def test_activations_of_a_layer_are_what_autograd_keeps(name: str, mode: str) -> None:
    section = kept_config(SETTINGS[name]).ssd_megatron
    predicted = 64 * 8 * layer_activation_bytes(section.model, section.ssd, Layout(), mode, 2, Layer(64))
    measured = run_ranks(1, kept_bytes, mode, SETTINGS[name])[0]
    assert measured == pytest.approx(predicted, rel=0.1 if mode == "sparse" else 0.03)


def test_zero_splits_gradients_in_stage_2_only() -> None:
    one, two = (small_memory(Layout(data=4, zero_stage=stage)) for stage in (1, 2))
    parameters = sum(parameter_counts(model(), ssd()).values())
    assert one.parameters == two.parameters == one.gradients == 2 * parameters
    assert two.gradients == pytest.approx(2 * parameters / 4, abs=1)
    assert one.optimizer == two.optimizer == pytest.approx(12 * parameters / 4, abs=1)


def test_expert_ranks_split_banks_and_so_their_optimizer_state_over_fewer() -> None:
    plain, split = small_memory(Layout(data=4)), small_memory(Layout(data=4, expert=2))
    bank = rank_parameters(model(), ssd(), Layout(), 0).bank
    assert plain.parameters - split.parameters == 2 * bank / 2
    assert plain.optimizer == split.optimizer
    assert (plain.gathered, split.gathered) == (0, 2 * 3 * 64 * 256)  # two matrices and a gradient


@pytest.mark.parametrize(("microbatches", "gradients", "passing"), [(1, 0, 2), (3, 1, 1)])
def test_weights_gathered_once_are_kept_for_the_step_with_gradients_of_several_microbatches(
    microbatches: int, gradients: int, passing: int
) -> None:
    layout = Layout(tensor=2, pipeline=2, data=4, expert=4, microbatches=microbatches)
    once, passes = (small_memory(replace(layout, gather_once=once)) for once in (True, False))
    matrix = 64 * 256 // 2 * 2  # bytes, of half of the neurons
    banks = 2 * (2 * matrix + 256 // 2 * 2)  # layers, matrices and a bias
    assert once.kept_weights == banks
    assert once.kept_gradients == banks * 3 / 4 * gradients
    assert (once.gathered, passes.gathered) == (passing * matrix, 3 * matrix)
    assert passes.kept_weights == passes.kept_gradients == 0
    kept = once.kept_weights + once.kept_gradients
    assert once.total == passes.total + kept - (3 - passing) * matrix
    sparse, plain = (small_memory(replace(layout, gather_once=once), "sparse") for once in (True, False))
    assert sparse == plain


def test_stages_keep_the_microbatches_that_they_wait_for() -> None:
    layout = Layout(pipeline=4, microbatches=8)
    kept = [small_memory(layout, stage=stage, tie_embeddings=False).activations for stage in range(4)]
    head = 32 * 2 * 64 * 2
    assert [k / (kept[3] - head) for k in kept[:3]] == [4, 3, 2]
    fewer = small_memory(replace(layout, microbatches=2))
    assert fewer.activations == 2 * (kept[3] - head)


def test_recomputation_keeps_inputs_of_layers_and_one_layer() -> None:
    whole, again = small_memory(Layout()), small_memory(Layout(recompute=True))
    head, layer = 32 * 2 * 64 * 2, (whole.activations - 32 * 2 * 64 * 2) / 4
    assert again.activations == 4 * 32 * 64 * 2 + layer + head


@pytest.mark.parametrize("mode", ["dense", "sparse"])
@pytest.mark.parametrize(("less", "more"), [(1, 2), (2, 4)])
def test_more_of_anything_that_splits_the_model_needs_less_memory(less: int, more: int, mode: str) -> None:
    for change in ("tensor", "data"):
        before, after = (small_memory(Layout(microbatches=4, **{change: size}), mode).total for size in (less, more))
        assert after < before, change
    for stage in range(less):
        layout = Layout(microbatches=8, pipeline=less)
        before = small_memory(layout, mode, stage, num_layers=8).resident
        assert small_memory(replace(layout, pipeline=more), mode, stage, num_layers=8).resident < before


def test_memory_is_that_of_the_fullest_stage_and_mode() -> None:
    layout = Layout(pipeline=2, microbatches=4)
    each = [small_memory(layout, mode, stage).total for mode in ("dense", "sparse") for stage in (0, 1)]
    assert memory_per_rank(model(), ssd(), layout, dtype="bfloat16", **KEYS).total == max(each) > min(each)


def test_the_peak_is_in_backward_or_in_the_update() -> None:
    resident = {"masks": 3, "kept_weights": 0}
    memory = Memory(
        1, 2, 4, **resident, kept_gradients=0, buckets=10, activations=20, logits=5, gathered=2, working=4, update=7
    )
    assert memory.resident == 10 and memory.total == 10 + 10 + 20 + 6
    assert replace(memory, update=100).total == 110


def test_a_scheduled_mode_is_the_only_one() -> None:
    assert modes_of(ssd(schedule="dense")) == ("dense",)
    assert modes_of(ssd()) == ("dense", "sparse")


def engine_bytes(topology: Topology, settings: dict[str, Any]) -> tuple[int, int]:
    """Bytes of parameters, and of masters and moments, as DeepSpeed's optimizer holds them."""
    config = run_config(world_size=topology.data.size, bf16=True, **settings)
    engine = make_engine(LanguageModel(config.ssd_megatron, "torch", topology), config, topology)
    optimizer: Any = engine.deepspeed.optimizer
    flat = optimizer.single_partition_of_fp32_groups
    states = [optimizer.optimizer.state[f][kind] for f in flat for kind in ("exp_avg", "exp_avg_sq")]
    held = (
        sum(t.nbytes for t in optimizer.bit16_groups_flat),
        sum(t.nbytes for t in (*flat, *states)),
    )
    engine.close()
    return held


def test_deepspeed_holds_what_is_predicted() -> None:
    config = run_config(world_size=2, bf16=True)
    assert layout_of(config) == Layout(data=2, micro_batch_size=2, microbatches=3)
    section = config.ssd_megatron
    expected = memory_per_rank(section.model, section.ssd, layout_of(config), dtype=config.dtype, **KEYS)
    for parameters, optimizer in run_ranks(2, engine_bytes, {}):
        assert parameters == pytest.approx(expected.parameters, rel=0.01)
        assert optimizer == pytest.approx(expected.optimizer, rel=0.01)
