"""benchmarks.dynsparse: arms that cost what they should, and can be run."""

import json
from argparse import Namespace
from pathlib import Path

import pytest

from benchmarks.dynsparse import _flops, config_of, masked_arm, small_arm
from ssd_megatron.config.load import Hardware, load_config

ARGUMENTS = Namespace(
    family="gpt", layers=4, hidden=256, sparsities=[0.9], blocks=[16], updates=50, steps=1000, seed=1, paper_rate=True
)


@pytest.mark.parametrize(("sparsity", "share"), [(0.5, 0.65), (0.9, 0.36)])
def test_the_small_model_costs_what_the_masked_one_does(sparsity: float, share: float) -> None:
    """Attention and head are not masked: at this size half of what remains."""
    masked = _flops(ARGUMENTS, 256, 1 - sparsity)
    assert masked / _flops(ARGUMENTS, 256) == pytest.approx(share, abs=0.01)
    hidden = small_arm(ARGUMENTS, sparsity)[1]["model"]["hidden_size"]
    assert _flops(ARGUMENTS, hidden) == pytest.approx(masked, rel=0.03)


@pytest.mark.parametrize("mask", ["static", "dynamic"])
def test_every_arm_is_a_run_that_can_be_made(tmp_path: Path, mask: str) -> None:
    path = tmp_path / "ds.json"
    for arm in (("dense", {}), small_arm(ARGUMENTS, 0.9), masked_arm(ARGUMENTS, 0.9, 16, mask)):
        path.write_text(json.dumps(config_of(ARGUMENTS, tmp_path, arm)))
        config = load_config(path, world_size=1, hardware=Hardware("cpu", False, "test"))
        assert config.ssd_megatron.run_dir == tmp_path / arm[0]
    assert config.ssd_megatron.weight_sparsity is not None and config.ssd_megatron.weight_sparsity.mask == mask
