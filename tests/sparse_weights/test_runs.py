"""Whole runs with sparse weights: the same masks and losses on every layout, bit by bit on the same one, and what they
say of themselves."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ssd_megatron.config.model import ModelConfig
from ssd_megatron.config.schema import SSDConfig
from ssd_megatron.model.cost import flops_per_token
from ssd_megatron.parallel.zero import KINDS
from ssd_megatron.training import checkpoint_files as files
from ssd_megatron.training.checkpoint_tools import find_checkpoint
from ssd_megatron.training.dry_run import print_dry_run
from ssd_megatron.training.monitor import scalars_of
from tests.checkpoints import model_by_identity
from tests.layouts import (
    DP2,
    EP2,
    EP2_DP2,
    ONE,
    PP2,
    PP2_EP2,
    TP2,
    TP2_EP2,
    TP2_PP2_DP2,
    Layout,
    deviation,
    oracle_config,
    run_layout,
    zero2,
)
from tests.small_engine import run_config
from tests.small_run import curve, records, train, write_config

Reference = Callable[[str], Path]
STEPS = 12
# ZeRO cuts inside rows of 40, and so inside blocks, and pads.
MODEL = {"hidden_size": 40, "num_attention_heads": 4, "ffn_hidden_size": 64}
MASKS = {"sparsity": 0.75, "block_size": 4, "updates": 6}
CASES: dict[str, dict[str, Any]] = {
    "4x4": MASKS,
    "1x1, by gradient": {"sparsity": 0.5, "block_size": 1, "updates": 4, "regrow": "gradient", "criterion": "linf"},
    "gathered once": MASKS,
}
FEW = [("4x4", zero2(TP2)), ("4x4", PP2), ("4x4", zero2(EP2)), ("1x1, by gradient", DP2)]
MATRIX = [
    *(("4x4", layout) for layout in (DP2, zero2(DP2), TP2_EP2, zero2(EP2_DP2), PP2_EP2, TP2_PP2_DP2)),
    *(("1x1, by gradient", layout) for layout in (TP2, EP2, PP2, TP2_PP2_DP2)),
    *(("gathered once", layout) for layout in (EP2, PP2_EP2)),
]


def config_of(folder: Path, case: str) -> dict[str, Any]:
    config = oracle_config(folder, [], STEPS)
    section = config["ssd_megatron"]
    section["ssd"] = {"schedule": "dense", "num_experts": 8}
    section["model"] |= MODEL
    section["weight_sparsity"] = CASES[case]
    return config


def run(folder: Path, case: str, layout: Layout, *overrides: str) -> Path:
    folder.mkdir(exist_ok=True)
    gathered = ("ssd_megatron.parallel.dense_gather=step",) if case == "gathered once" and layout.expert > 1 else ()
    return run_layout(folder, layout, config_of(folder, case), *gathered, *overrides)


def saved_masks(run_dir: Path) -> dict[str, Tensor]:
    shared = files.read_tensors(find_checkpoint(run_dir), files.SHARED)
    return {key: bits for key, bits in shared.items() if key.startswith("mask_")}


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """Run folder of one process by case."""
    return cache(lambda case: run(tmp_path_factory.mktemp("one"), case, ONE))


def same_run(mine: Path, expected: Path) -> None:
    """Losses and norms to rounding, masks exactly, and the state."""
    for name in ("loss", "grad_norm"):
        assert max(deviation(mine, expected, "train", name)) < 1e-5, name
    reports = [[{**record, "seconds": 0} for record in records(folder, "mask")] for folder in (mine, expected)]
    assert reports[0] == reports[1] and len(reports[0]) > 2
    masks, wanted = saved_masks(mine), saved_masks(expected)
    assert masks.keys() == wanted.keys() and len(masks) == 3 * 2 * 4
    assert all(torch.equal(masks[key], wanted[key]) for key in wanted)
    for kind in KINDS:
        ours, theirs = (
            model_by_identity(find_checkpoint(folder), mine.with_suffix(".safetensors"), kind)
            for folder in (mine, expected)
        )
        for name, tensor in theirs.items():
            assert torch.dist(ours[name], tensor) <= 1e-4 * tensor.norm(), (kind, name)


@pytest.mark.parametrize(("case", "layout"), FEW, ids=[f"{case}: {layout}" for case, layout in FEW])
def test_some_layouts_train_as_one_process(one: Reference, tmp_path: Path, case: str, layout: Layout) -> None:
    same_run(run(tmp_path, case, layout), one(case))


@pytest.mark.layouts
@pytest.mark.parametrize(("case", "layout"), MATRIX, ids=[f"{case}: {layout}" for case, layout in MATRIX])
def test_all_layouts_train_as_one_process(one: Reference, tmp_path: Path, case: str, layout: Layout) -> None:
    same_run(run(tmp_path, case, layout), one(case))


STOP = "ssd_megatron.training.stop_after_step"


def test_it_resumes_bit_by_bit_and_goes_on_on_another_layout(one: Reference, tmp_path: Path) -> None:
    """Right after the update of step 4, and between two; then on two stages."""
    run(tmp_path, "4x4", ONE, f"{STOP}=4")
    mine = run(tmp_path, "4x4", ONE, f"{STOP}=9")
    assert curve(mine) == curve(one("4x4"))[:9]
    stopped = [{**r, "seconds": 0} for r in records(mine, "mask")]
    assert stopped == [{**r, "seconds": 0} for r in records(one("4x4"), "mask")][:4]
    same_run(run(tmp_path, "4x4", PP2), one("4x4"))


def test_a_run_says_what_its_masks_did(one: Reference) -> None:
    run_dir, masks = one("4x4"), records(one("4x4"), "mask")
    assert [(r["step"], r["update"]) for r in masks] == [(2, 1), (4, 2), (6, 3), (8, 4), (10, 5)]
    assert [r["live"] for r in masks] == pytest.approx([0.25] * 5, abs=1e-3)
    assert masks[0]["regrown_pruned"] is None and all(0 <= r["regrown_pruned"] <= 1 for r in masks[1:])
    tags = {"mask/share", "mask/live", "mask/ever"}
    assert [scalars_of("mask", record).keys() for record in masks[:2]] == [tags, tags | {"mask/regrown_pruned"}]
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["masks"]["update"] == 5 and summary["masks"]["ever"] == masks[-1]["ever"]
    section = json.loads((run_dir / "config.json").read_text())["ssd_megatron"]
    model, ssd = ModelConfig(**section["model"]), SSDConfig(schedule="dense", num_experts=8)
    h, f, layers, tokens = 40, 64, 2, 8 * 16
    weights = layers * (h * 3 * h + h * h + 2 * h * f)
    saved = 3 * 2 * tokens * weights * 0.75 * STEPS
    assert summary["flops_dense"] == pytest.approx(flops_per_token(model, ssd).dense * tokens * STEPS)
    assert summary["flops_dense"] - summary["flops"] == pytest.approx(saved)


def test_a_dry_run_counts_live_weights(capsys: pytest.CaptureFixture[str]) -> None:
    print_dry_run(run_config(weight_sparsity=MASKS, steps=50))
    out = capsys.readouterr().out
    assert "FLOPs per token: 2.089e+05 dense, 1.352e+05 with masked weights (64.7%)" in out


def test_a_checkpoint_of_dense_weights_is_refused(tmp_path: Path) -> None:
    config = config_of(tmp_path, "4x4")
    del config["ssd_megatron"]["weight_sparsity"]
    path = write_config(ONE.apply(config), tmp_path / "ds.json")
    train(path, f"{STOP}=1")
    config["ssd_megatron"]["weight_sparsity"] = MASKS
    write_config(ONE.apply(config), path)
    with pytest.raises(AssertionError, match=r"weight_sparsity\.block_size was None and is 4"):
        train(path)
