"""What several ranks hold alike stays alike to the last bit, through training and switches."""

import hashlib
from collections import defaultdict
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType

from ssd_megatron.model.attention import ScaledDotProductCore
from ssd_megatron.model.language_model import WORD_EMBEDDING
from ssd_megatron.parallel.topology import Topology
from tests.layouts import (
    EP2_DP2,
    PP2_EP2_DP2,
    TP2,
    TP2_EP2,
    TP2_PP2_DP2,
    TP2_PP2_EP2,
    Layout,
    zero2,
)
from tests.ranks import run_ranks
from tests.small_engine import build, make_coordinator, random_batch, run_config, train_steps

STEPS, PHASES = 50, [(1, "dense"), (16, "sparse"), (28, "dense"), (38, "sparse")]
# A part of a tensor: its logical name, what it is (parameter, master or moment), its first element and their number.
Part = tuple[str, str, int, int]


class Held(NamedTuple):
    """What a rank holds in the end: digests of its parts, and the losses that it saw."""

    digests: dict[Part, str]
    losses: list[float]


def train_and_digest(topology: Topology, layout: Layout, steps: int, settings: dict[str, Any]) -> Held:
    config = run_config(
        topology.world.size,
        parallel=layout.parallel.model_dump(),
        stage=layout.stage,
        steps=STEPS,
        phases=PHASES,
        **settings,
    )
    torch.manual_seed(topology.data.rank)  # tensor-parallel ranks draw alike
    model, engine = build(topology, config)
    coordinator = make_coordinator(topology, config, model, engine)
    losses = train_steps(engine, config, range(1, steps + 1), coordinator)
    engine.mean_loss([random_batch(config, 0)])  # the last stage takes a tied embedding from the first before each use
    digests = {}
    for name in engine.state.specs:
        parameter = engine.state.parameter(name).detach()
        digests[name, "parameter", engine.state.offset(name), parameter.numel()] = digest(parameter)
    for name, kind, fragment in engine.state.held():
        if not (name == WORD_EMBEDDING and model.tied_weight is not None and topology.is_last_stage):
            digests[name, kind, fragment.start, fragment.values.numel()] = digest(fragment.values)
    return Held(digests, losses)


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def copies(ranks: list[Held]) -> dict[tuple[str, str], int]:
    """Ranks that hold each part of a tensor, by name and kind; all must hold the same and have seen equal losses."""
    found = defaultdict(list)
    for held in ranks:
        for part, value in held.digests.items():
            found[part].append(value)
    assert [part for part, values in found.items() if len(set(values)) > 1] == []
    assert all(held.losses == ranks[0].losses for held in ranks)
    counts = defaultdict(set)
    for (name, kind, *_), values in found.items():
        counts[name, kind].add(len(values))
    return {tensor: min(numbers) for tensor, numbers in counts.items()}


FEW = [(TP2_EP2, False), (PP2_EP2_DP2, True)]
MORE = [
    *((layout, False) for layout in (zero2(EP2_DP2), TP2_PP2_EP2, TP2_PP2_DP2, PP2_EP2_DP2)),
    *((layout, True) for layout in (TP2_EP2, zero2(EP2_DP2), TP2_PP2_EP2, TP2_PP2_DP2)),
]


@pytest.mark.parametrize(
    ("layout", "bf16"),
    [
        pytest.param(
            *case, id=f"{case[0]}, {'bf16' if case[1] else 'fp32'}", marks=[pytest.mark.layouts] * (case in MORE)
        )
        for case in (*FEW, *MORE)
    ],
)
def test_copies_stay_equal_through_switches(layout: Layout, bf16: bool) -> None:
    arguments = (layout, STEPS, {"bf16": bf16})
    held = copies(run_ranks(layout.ranks, train_and_digest, *arguments, parallel=layout.parallel))
    of_a_stage, ends = layout.tensor * layout.data, min(layout.pipeline, 2)
    block = "blocks.0.layer.mlp"
    for name in ("head.norm.weight", f"{block}.router.weight", f"{block}.bank.b_out"):
        assert held[name, "parameter"] == of_a_stage
        assert held[name, "master"] == held[name, "exp_avg"] == layout.tensor  # data-parallel ranks have a part each
    assert held[f"{block}.bank.w_in", "parameter"] == layout.data // layout.expert
    assert held[f"{block}.bank.w_in", "master"] == 1
    assert held["embedding.word.weight", "parameter"] == layout.data * ends


@pytest.mark.parametrize("layout", [TP2, pytest.param(TP2_PP2_EP2, marks=pytest.mark.layouts)], ids=str)
def test_copies_stay_equal_with_dropout(layout: Layout) -> None:
    arguments = (layout, 20, {"dropout": 0.2})
    held = copies(run_ranks(layout.ranks, train_and_digest, *arguments, parallel=layout.parallel))
    assert held["head.norm.weight", "parameter"] == layout.tensor * layout.data


def attend(topology: Topology, dropout: float) -> tuple[float, float, float]:
    """Sums of what two attention calls on equal inputs give, and what is drawn after them."""
    core = ScaledDotProductCore(
        SimpleNamespace(attention_dropout=dropout), 1, AttnMaskType.causal, SimpleNamespace(tp=topology.tensor.handle)
    )
    query, key, value = torch.randn(3, 8, 2, 4, 16, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    first, second = (float(core(query, key, value).double().sum()) for _ in range(2))
    return first, second, float(torch.rand(()))


def test_attention_dropout_differs_between_tensor_parallel_ranks_and_nothing_else_does() -> None:
    (a, a_again, a_after), (b, b_again, b_after) = run_ranks(2, attend, 0.5, parallel=TP2.parallel)
    assert len({a, a_again, b, b_again}) == 4
    assert a_after == b_after
    (a, a_again, _), (b, b_again, _) = run_ranks(2, attend, 0.0, parallel=TP2.parallel)
    assert a == a_again == b == b_again
