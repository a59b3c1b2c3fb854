"""Masked weights under the real engine: what is dead is exactly 0, and everywhere; what grows begins at 0."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ssd_megatron.config.load import RunConfig
from ssd_megatron.model.memory import layout_of, memory_per_rank
from ssd_megatron.parallel.topology import Topology
from ssd_megatron.parallel.zero import EXP_AVG, EXP_AVG_SQ, KINDS, MASTER
from ssd_megatron.sparse_weights.masked_weights import MaskedWeights, MaskReport
from ssd_megatron.training.assembly import make_masks
from ssd_megatron.training.checkpoint import Checkpointer, Trained
from ssd_megatron.training.engine import Engine
from tests.layouts import DP2, EP2, ONE, TP2, TP2_EP2, Layout, zero2
from tests.ranks import run_ranks
from tests.small_engine import build, make_coordinator, random_batch, run_config


def masked(
    topology: Topology, layout: Layout, bf16: bool = False, steps: int = 50, **settings: Any
) -> tuple[RunConfig, Engine, Any]:
    config = run_config(
        topology.world.size,
        parallel=layout.parallel.model_dump(),
        stage=layout.stage,
        bf16=bf16,
        weight_sparsity=settings,
        steps=steps,
    )
    model, engine = build(topology, config)
    masks = make_masks(model, engine, config.ssd_megatron, topology)
    assert masks is not None
    return config, engine, masks


def train(topology: Topology, config: RunConfig, engine: Engine, masks: MaskedWeights, step: int) -> MaskReport | None:
    masks.before_step(step)
    count = config.gradient_accumulation_steps
    first = step * count * topology.data.size + topology.data.rank
    engine.train_step([random_batch(config, first + m * topology.data.size) for m in range(count)])
    return masks.after_step(step)


def expand(mask: Tensor, size: int) -> Tensor:
    return mask.repeat_interleave(size, 0).repeat_interleave(size, 1)


def watch(topology: Topology, layout: Layout, bf16: bool, steps: int) -> list[Tensor]:
    """Whatever is dead is 0 after every step, masters, moments and parameters; regrown weights begin without moments.
    Returns the masks at the end."""
    config, engine, masks = masked(topology, layout, bf16, steps=steps, sparsity=0.75, block_size=4, updates=5)
    state, size = engine.state, 4
    names = list(masks.live)
    leaves = {name.rpartition("layer.")[2] for name in names}
    assert leaves == {
        "self_attention.linear_qkv.weight",
        "self_attention.linear_proj.weight",
        "mlp.bank.w_in",
        "mlp.bank.w_out",
    }
    before = masks.live
    for step in range(1, steps + 1):
        report = train(topology, config, engine, masks, step)
        for name in names:
            live = expand(masks.live[name], size)
            kinds = {kind: state.read(name, kind) for kind in KINDS}
            assert not any(bool(values[~live].any()) for values in kinds.values()), (step, name)
            assert int(masks.live[name].sum()) == int(before[name].sum())
            rows = state.parameter(name).shape[0]
            first = state.offset(name) // state.parameter(name).shape[1]
            mine = kinds[MASTER][first : first + rows].to(state.parameter(name).dtype)
            assert torch.equal(state.parameter(name).detach(), mine)
            if report is None:
                assert torch.equal(masks.live[name], before[name])
                assert int(kinds[MASTER][live].count_nonzero()) > 0.5 * int(live.sum()), (step, name)
            else:
                grown_MN = masks.live[name] & ~before[name]
                assert int(grown_MN.sum()) == int(report.share * int(before[name].sum()))
                grown = expand(grown_MN, size)
                assert not any(bool(values[grown].any()) for values in kinds.values())
                kept = expand(masks.live[name] & before[name], size)
                assert bool(kinds[EXP_AVG][kept].any()) and bool((kinds[EXP_AVG_SQ][kept] >= 0).all())
        before = masks.live
    return list(before.values())


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_what_is_dead_stays_zero_through_momentum_and_decay(bf16: bool) -> None:
    run_ranks(1, watch, ONE, bf16, 50)


@pytest.mark.parametrize("layout", [zero2(DP2), TP2_EP2], ids=str)
def test_and_on_any_layout(layout: Layout) -> None:
    ranks = run_ranks(layout.ranks, watch, layout, False, 10, parallel=layout.parallel)
    assert all(torch.equal(a, b) for rank in ranks for a, b in zip(rank, ranks[0], strict=True))


def started(topology: Topology, layout: Layout, folder: Path) -> None:
    """Weights of a dense run under static masks: dead ones are 0 from the start, for the model too, and stay it."""

    def checkpointer(of: RunConfig, masks: MaskedWeights | None) -> Checkpointer:
        coordinator = make_coordinator(topology, of, model, engine)
        trained = Trained(engine, model, coordinator, masks, of.identity())
        return Checkpointer(folder, trained, topology, keep_last=None, async_save=False, tell=print)

    dense = run_config(topology.world.size, parallel=layout.parallel.model_dump(), stage=layout.stage)
    model, engine = build(topology, dense)
    weights = {name: engine.state.read(name, MASTER) for name in engine.state.specs}
    checkpointer(dense, None).save(1, {})
    engine.close()
    config, engine, masks = masked(topology, layout, sparsity=0.75, block_size=4, mask="static")
    state, model = engine.state, engine.deepspeed.module
    checkpointer(config, masks).start_from(folder, keep_experts=False)
    for name, mask in masks.live.items():
        live, master = expand(mask, 4), state.read(name, MASTER)
        assert torch.equal(master, weights[name] * live)
        first, mine = state.offset(name), state.parameter(name).detach().flatten()
        assert torch.equal(mine, master.flatten().narrow(0, first, mine.numel()))
    assert torch.equal(state.read("head.norm.weight", MASTER), weights["head.norm.weight"])
    for step in (1, 2):
        train(topology, config, engine, masks, step)
    for name, mask in masks.live.items():
        assert not any(bool(state.read(name, kind)[~expand(mask, 4)].any()) for kind in KINDS)


@pytest.mark.parametrize("layout", [zero2(DP2), TP2], ids=str)
def test_masks_lie_on_the_weights_that_a_run_starts_from(layout: Layout, tmp_path: Path) -> None:
    run_ranks(layout.ranks, started, layout, tmp_path, parallel=layout.parallel)


def norm_of_live(topology: Topology) -> tuple[float, float]:
    """Gradient norm that the engine reports in the first step, and that of the live weights by hand."""
    config, engine, masks = masked(topology, ONE, sparsity=0.75, block_size=4, updates=5)
    batches = [random_batch(config, m) for m in range(config.gradient_accumulation_steps)]
    model = engine.deepspeed.module
    losses = [model(batch)["loss_mask"].mean() for batch in batches]
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(sum(losses) / len(batches), list(parameters.values()), allow_unused=True)
    total = 0.0
    for name, gradient in zip(parameters, gradients, strict=True):
        if gradient is not None:
            live = expand(masks.live[name], 4) if name in masks.live else torch.ones_like(gradient)
            total += float((gradient * live).square().sum(dtype=torch.float64))
    return engine.train_step(batches).grad_norm, total**0.5


def test_the_gradient_norm_counts_live_weights() -> None:
    reported, expected = run_ranks(1, norm_of_live)[0]
    assert reported == pytest.approx(expected, rel=1e-5)


def mask_bytes(topology: Topology) -> tuple[int, int]:
    """Bytes of masks that this rank keeps beside its parameters, and what is predicted."""
    config, _, masks = masked(topology, TP2_EP2, sparsity=0.5, block_size=4, updates=5)
    section, layout = config.ssd_megatron, layout_of(config)
    predicted = memory_per_rank(section.model, section.ssd, layout, dtype="float32", reduce_bucket_size=2)
    return sum(dead.nbytes for dead in vars(masks)["_dead"].values()), predicted.masks


def test_masks_take_a_byte_for_each_weight_of_the_rank() -> None:
    for held, predicted in run_ranks(4, mask_bytes, parallel=TP2_EP2.parallel):
        assert held == predicted == 2 * (4 * 32 * 32 // 2 + 2 * 32 * 64 // 4)


def reports(topology: Topology) -> list[MaskReport]:
    config, engine, masks = masked(topology, ONE, sparsity=0.5, block_size=1, updates=5)
    return [r for step in range(1, 51) if (r := train(topology, config, engine, masks, step)) is not None]


def test_reports_count_what_lives_and_what_ever_did() -> None:
    found = run_ranks(1, reports)[0]
    assert [r.update for r in found] == [1, 2, 3, 4]
    assert [r.share for r in found] == pytest.approx([0.4523, 0.3273, 0.1727, 0.0477], abs=1e-4)
    assert [r.live for r in found] == pytest.approx([0.5] * 4)
    assert found[0].regrown_pruned is None and all(0 < (r.regrown_pruned or 0) < 1 for r in found[1:])
    assert found[0].ever == pytest.approx(0.5 + 0.5 * found[0].share, abs=1e-3)
    assert all(a.ever < b.ever <= 1 for a, b in pairwise(found))


def grown_by_gradient(topology: Topology, layout: Layout) -> list[Tensor]:
    """Masks after an update by gradients, which every rank knows of its own samples and rows only."""
    config, engine, masks = masked(topology, layout, sparsity=0.75, block_size=4, updates=25, regrow="gradient")
    for step in (1, 2):
        assert (train(topology, config, engine, masks, step) is not None) == (step == 2)
    return [masks.live[name] for name in sorted(masks.live)]


def test_blocks_grow_where_the_gradient_is_large_on_any_layout() -> None:
    one = run_ranks(1, grown_by_gradient, ONE)[0]
    for layout in (TP2, EP2):
        for rank in run_ranks(layout.ranks, grown_by_gradient, layout, parallel=layout.parallel):
            assert all(torch.equal(a, b) for a, b in zip(rank, one, strict=True)), layout
