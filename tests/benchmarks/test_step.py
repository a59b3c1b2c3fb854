"""benchmarks.step on a tiny model: rows, and trainers that do the same work."""

import gzip
import json
from pathlib import Path

import pytest

from benchmarks.jobs import MODELS, job_config, sparse_settings
from benchmarks.references import hugging_face_model, plain_step
from ssd_megatron.model.cost import parameter_counts
from ssd_megatron.parallel.topology import Topology
from ssd_megatron.training.synthetic import SyntheticJob
from tests.benchmarks.helpers import run_benchmark
from tests.ranks import run_ranks

TINY = MODELS["small"] | {"num_layers": 2, "vocab_size": 512}


def test_rows_and_profiles_of_a_small_run(tmp_path: Path) -> None:
    small = ["--model", "small", "--layers", "1", "--tokens", "256", "--turns", "1", "--eager", "--quick"]
    rows = run_benchmark("step", tmp_path, *small, "--experts", "8", "--profile", str(tmp_path / "profile"))
    by_name = {row["name"]: row for row in rows}
    assert list(by_name) == [
        "peak memory of a step, sparse / dense",
        "dense step / the same with a plain network",
        "dense step / Hugging Face OPT",
        "speed-up of a sparse step / what the network's implies",
        "router, top-k and metadata / sparse network",
        "MFU of dense steps against 790 TFLOP/s",
    ]
    assert by_name["MFU of dense steps against 790 TFLOP/s"]["reason"] == "needs CUDA"
    for name in ("the same with a plain network", "Hugging Face OPT"):
        details = by_name[f"dense step / {name}"]["details"]
        assert details["parameters theirs / ours"] == pytest.approx(1, abs=0.01)
        assert details["ours tokens/s"] * details["ours s"] == pytest.approx(256)
    for mode in ("dense", "sparse"):
        assert "aten::mm" in (tmp_path / "profile" / f"{mode}.txt").read_text()
        with gzip.open(tmp_path / "profile" / f"{mode}.trace.json.gz") as trace:
            assert json.load(trace)["traceEvents"]


def _losses(topology: Topology) -> tuple[list[float], list[float]]:
    config = job_config(TINY, samples=2, micro_batch=1, bf16=False, ssd=sparse_settings(8))
    job = SyntheticJob.build(config, topology)
    plain = plain_step(config, job)
    return [job.train_step(step).loss for step in (1, 2, 3)], [plain.step(turn) for turn in (0, 1, 2)]


def test_the_plain_model_trains_as_ours() -> None:
    ours, plain = run_ranks(1, _losses)[0]
    assert ours[0] != ours[1]
    assert plain == pytest.approx(ours, rel=1e-5)


@pytest.mark.parametrize("family", ["opt", "gpt2"])
def test_models_of_hugging_face_have_our_size(family: str) -> None:
    config = job_config(TINY, samples=2, bf16=False)
    section = config.ssd_megatron
    counts = parameter_counts(section.model, section.ssd)
    ours = sum(counts.values()) - counts["router"]
    theirs = sum(p.numel() for p in hugging_face_model(family, config).parameters())
    assert theirs == pytest.approx(ours, rel=0.01)
