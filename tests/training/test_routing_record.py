"""A recorded routing decides on any layout, and ties at the last bit do not."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.ffn.test_switchable import make_ffn
from tests.layouts import EP2, EP2_DP2, ONE, PP2_EP2_DP2, TP2_EP2, TP2_PP2, Layout, deviation, oracle_config, run_layout
from tests.small_run import Ranks, curve, write_config

STEPS = 16
PHASES = [(1, "dense"), (5, "sparse"), (9, "dense"), (11, "sparse")]
OTHERS = [TP2_EP2, TP2_PP2, EP2_DP2, PP2_EP2_DP2]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run of one process in bf16, its routing in `routing` beside it."""
    folder = tmp_path_factory.mktemp("one")
    return run(folder, ONE, f"ssd_megatron.ssd.record_routing={folder / 'routing'}")


def run(folder: Path, layout: Layout, *overrides: str) -> Path:
    """With as many experts in each layer: in bf16 their measured worth depends on the layout."""
    config = oracle_config(folder, PHASES, STEPS)
    config["ssd_megatron"]["ssd"]["top_k_allocation"] = "equal"
    return run_layout(folder, layout, config, "bf16.enabled=true", *overrides)


def replay(folder: Path, layout: Layout, routing: Path) -> Path:
    return run(folder, layout, f"ssd_megatron.ssd.routing={routing}")


def test_every_sparse_step_is_recorded(recorded: Path) -> None:
    files = sorted((recorded.parent / "routing").iterdir())
    assert [file.name for file in files] == [f"step_{step:08d}.safetensors" for step in (5, 6, 7, 8, *range(11, 17))]
    for tensors in map(load_file, files):
        assert sorted(tensors) == ["blocks.0.layer.mlp", "blocks.1.layer.mlp"]
        assert all(ids.shape == (8, 16, 3) for ids in tensors.values())  # samples, tokens, experts per token


def test_a_replay_on_the_same_layout_is_the_same_run(recorded: Path, tmp_path: Path) -> None:
    assert curve(replay(tmp_path, ONE, recorded.parent / "routing")) == curve(recorded)


def test_what_is_replayed_decides(recorded: Path, tmp_path: Path) -> None:
    """Other experts, other losses, from the first sparse step on."""
    others = tmp_path / "others"
    others.mkdir()
    for file in (recorded.parent / "routing").iterdir():
        save_file({name: (ids + 1) % 8 for name, ids in load_file(file).items()}, others / file.name)
    mine, original = curve(replay(tmp_path, ONE, others)), curve(recorded)
    assert mine[:4] == original[:4]
    assert mine[4] != original[4]


def test_bf16_replays_on_another_layout_within_rounding(recorded: Path, tmp_path: Path) -> None:
    same_within_rounding(replay(tmp_path, EP2, recorded.parent / "routing"), recorded)


@pytest.mark.layouts
@pytest.mark.parametrize("layout", OTHERS, ids=str)
def test_bf16_replays_on_all_layouts_within_rounding(recorded: Path, tmp_path: Path, layout: Layout) -> None:
    same_within_rounding(replay(tmp_path, layout, recorded.parent / "routing"), recorded)


def same_within_rounding(run_dir: Path, one: Path) -> None:
    """The bounds of dense steps (test_layouts) hold in sparse ones too: without replay tokens find other experts."""
    assert max(deviation(run_dir, one, "train", "loss")) < 3e-4
    assert max(deviation(run_dir, one, "train", "grad_norm")) < 6e-3


def test_a_step_that_is_not_recorded_is_refused(tmp_path: Path) -> None:
    empty = tmp_path / "routing"
    empty.mkdir()
    config = oracle_config(tmp_path, PHASES, STEPS)
    ranks = Ranks(write_config(config, tmp_path / "run.json"), f"ssd_megatron.ssd.routing={empty}")
    assert ranks.wait() == [2]
    assert f"ssd.routing ({empty}) has no step 5 that can be read" in ranks.output()


def test_recording_needs_one_process(tmp_path: Path) -> None:
    config = oracle_config(tmp_path, PHASES, STEPS)
    ranks = Ranks(write_config(config, tmp_path / "run.json"), "ssd_megatron.ssd.record_routing=new", world_size=2)
    assert ranks.wait() == [2, 2]
    assert "ssd.record_routing (new) works in one process, and this job has 2" in ranks.output()


def test_numbers_of_experts_do_not_depend_on_their_order() -> None:
    ffn = make_ffn(num_experts=4)
    placed = ffn.bank.neuron_ids.view(4, -1)[torch.tensor([2, 0, 3, 1])].flip(1)  # and their neurons turned round
    ffn.bank.neuron_ids.copy_(placed.flatten())
    assert ffn.bank.expert_numbers(4).tolist() == [2, 0, 3, 1]
