"""One global batch gives one result: how it is cut into ranks, microbatches and ZeRO stages does not show."""

from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.curves.corpus import write_corpus
from tests.small_run import curve, records, small_config, train, write_config

STEPS, FIRST_SWITCH = 12, 5
PHASES = [{"start_step": step, "mode": mode} for step, mode in ((1, "dense"), (5, "sparse"), (9, "dense"))]


@dataclass(frozen=True)
class Layout:
    """How the 8 samples of a step are cut up."""

    ranks: int
    micro: int
    stage: int = 1


LAYOUTS = {
    "1 rank, micro batch 1": Layout(1, 1),
    "1 rank, micro batch 4": Layout(1, 4),
    "1 rank, micro batch 8": Layout(1, 8),
    "1 rank, ZeRO 2": Layout(1, 2, stage=2),
    "2 ranks, ZeRO 1": Layout(2, 2),
    "2 ranks, ZeRO 2": Layout(2, 2, stage=2),
    "4 ranks": Layout(4, 2),
    "4 ranks, ZeRO 2, micro batch 1": Layout(4, 1, stage=2),
}


def run(folder: Path, layout: Layout) -> Path:
    """Train on a layout and return the run folder.

    The partition is random, by seed: labels do not depend on rounding. Adam's eps of 1 makes an update proportional to
    the gradient, and clipping at half of a usual norm to the norm, so a wrong scale of either is in every later loss.
    """
    folder.mkdir()
    config = small_config(write_corpus(folder), folder / "run")
    config |= {
        "train_micro_batch_size_per_gpu": layout.micro,
        "zero_optimization": {"stage": layout.stage},
        "optimizer": {"type": "AdamW", "params": {"lr": 1.0, "eps": 1.0, "weight_decay": 0.01}},
        "scheduler": {"type": "WSD", "params": {"warmup_num_steps": 2, "decay_num_steps": 4}},
        "gradient_clipping": 0.5,
    }
    config["ssd_megatron"]["model"] |= {"dropout": 0.0, "vocab_size": 128}
    config["ssd_megatron"]["ssd"] |= {"phases": PHASES, "partition": "random", "top_k": 3}
    config["ssd_megatron"]["training"] = {"train_steps": STEPS, "eval_interval": 6, "eval_steps": 1}
    train(write_config(config, folder / "run.json"), world_size=layout.ranks)
    return folder / "run"


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(tmp_path_factory.mktemp("layouts") / "reference", Layout(1, 2))


def deviation(run_dir: Path, reference: Path, name: str, kind: str = "train") -> list[float]:
    """Relative difference of a number to the reference's, record by record."""
    pairs = zip(records(run_dir, kind), records(reference, kind), strict=True)
    return [abs(mine[name] / expected[name] - 1) for mine, expected in pairs if expected[name] is not None]


def test_the_reference_learns_in_both_modes_and_clips(reference: Path) -> None:
    losses, norms = zip(*[(loss, norm) for _, loss, norm in curve(reference)], strict=True)
    assert losses[-1] < losses[0] - 0.2
    assert min(norms) > 0.5  # gradient_clipping
    assert [record["to"] for record in records(reference, "switch")] == ["sparse", "dense"]


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_losses_and_gradient_norms_do_not_depend_on_the_layout(reference: Path, tmp_path: Path, layout: Layout) -> None:
    """Sums in another order differ by 1e-7, before and after the switches. The bounds after the first leave room for
    a token whose third and fourth expert score alike to the last bit, and which goes to the other one: it is one of 128
    tokens of a step, and moves the gradient more than the loss."""
    run_dir = run(tmp_path / "layout", layout)
    losses, norms = (deviation(run_dir, reference, name) for name in ("loss", "grad_norm"))
    dense = slice(FIRST_SWITCH - 1)
    assert len(losses) == STEPS
    assert max(losses[dense]) < 1e-5 and max(losses) < 1e-4
    assert max(norms[dense]) < 1e-5 and max(norms) < 1e-3
    for name in ("loss_dense", "loss_sparse"):
        assert max(deviation(run_dir, reference, name, "eval")) < 1e-4
    for name in ("loss_before", "loss_after", "loss_sparse"):
        assert max(deviation(run_dir, reference, name, "switch")) < 1e-4
    assert [r["top_k"] for r in records(run_dir, "switch")] == [r["top_k"] for r in records(reference, "switch")]
    for mine, expected in zip(records(run_dir, "check"), records(reference, "check"), strict=True):
        assert mine["active_fraction"] == pytest.approx(expected["active_fraction"], abs=1e-3)
