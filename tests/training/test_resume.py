"""A run that is stopped and goes on gives, bit by bit, the losses and gradient norms of the run that was not."""

from pathlib import Path

import pytest
import torch

from ssd_megatron.parallel.zero import MASTER
from ssd_megatron.training.checkpoint_files import checkpoints, read_index, read_interval
from tests.curves.corpus import write_corpus
from tests.small_run import Corpus, curve, records, small_config, train, write_config


def start(corpus: Corpus, tmp_path: Path, name: str, **settings: object) -> tuple[Path, Path]:
    config = small_config(corpus, tmp_path / name) | settings
    return write_config(config, tmp_path / f"{name}.json"), tmp_path / name


# The last dense step before a switch, the first after it, the middle of a phase; the same for sparse phases.
STOPS = (2, 4, 5, 7, 8, 9, 11, 13)


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_one_process_resumes_bit_by_bit(corpus: Corpus, tmp_path: Path, bf16: bool) -> None:
    whole, whole_dir = start(corpus, tmp_path, "whole", bf16={"enabled": bf16})
    train(whole)
    parts, parts_dir = start(corpus, tmp_path, "parts", bf16={"enabled": bf16})
    for stop in STOPS:
        train(parts, f"ssd_megatron.training.stop_after_step={stop}")
    train(parts)
    assert curve(parts_dir) == curve(whole_dir)
    assert [r["loss_sparse"] for r in records(parts_dir, "eval")] == [
        r["loss_sparse"] for r in records(whole_dir, "eval")
    ]
    assert len(records(parts_dir, "resume")) == len(STOPS)
    assert len(records(parts_dir, "switch")) == 4


@pytest.mark.parametrize("stage", [1, 2])
def test_two_processes_resume_bit_by_bit(corpus: Corpus, tmp_path: Path, stage: int) -> None:
    whole, whole_dir = start(corpus, tmp_path, "whole", zero_optimization={"stage": stage})
    train(whole, world_size=2)
    parts, parts_dir = start(corpus, tmp_path, "parts", zero_optimization={"stage": stage})
    train(parts, "ssd_megatron.training.stop_after_step=6", "ssd_megatron.checkpoint.async_save=true", world_size=2)
    train(parts, "ssd_megatron.training.stop_after_step=11", world_size=2)
    train(parts, world_size=2)
    assert curve(parts_dir) == curve(whole_dir)


def test_bert_resumes_bit_by_bit(tmp_path: Path) -> None:
    """Its masks, too, are those that the run would have had."""
    corpus = write_corpus(tmp_path)
    for name in ("whole", "parts"):
        config = small_config(corpus, tmp_path / name)
        config["ssd_megatron"]["model"] |= {"family": "bert", "num_token_types": 2, "sentence_objective": "next"}
        write_config(config, tmp_path / f"{name}.json")
    train(tmp_path / "whole.json")
    for stop in (3, 6):
        train(tmp_path / "parts.json", f"ssd_megatron.training.stop_after_step={stop}")
    train(tmp_path / "parts.json")
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")


def test_the_adaptive_schedule_resumes_as_it_would_have_gone_on(corpus: Corpus, tmp_path: Path) -> None:
    adaptive = {
        "backend": "torch",
        "num_experts": 8,
        "top_k": 2,
        "check_interval": 2,
        "stable_checks": 1,
        "similarity_threshold": 0.05,
        "sparse_phase_fraction": 0.25,
        "min_dense_steps": 2,
    }
    for name in ("whole", "parts"):
        config = small_config(corpus, tmp_path / name)
        config["ssd_megatron"]["ssd"] = adaptive
        write_config(config, tmp_path / f"{name}.json")
    train(tmp_path / "whole.json")
    for stop in (3, 5, 10):
        train(tmp_path / "parts.json", f"ssd_megatron.training.stop_after_step={stop}")
    train(tmp_path / "parts.json")
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")
    switches = [(r["step"], r["to"]) for r in records(tmp_path / "whole", "switch")]
    assert switches[:2] == [(5, "sparse"), (9, "dense")]
    assert switches == [(r["step"], r["to"]) for r in records(tmp_path / "parts", "switch")]


def test_a_finished_run_is_not_trained_again(corpus: Corpus, tmp_path: Path) -> None:
    config, run_dir = start(corpus, tmp_path, "run")
    train(config)
    before = curve(run_dir)
    output = train(config)
    assert "is finished: all 16 steps are trained" in output
    assert curve(run_dir) == before and not records(run_dir, "resume")


def test_a_run_that_stopped_where_it_was_told_does_not_go_on_unasked(corpus: Corpus, tmp_path: Path) -> None:
    config, run_dir = start(corpus, tmp_path, "run")
    for _ in range(2):
        output = train(config, "ssd_megatron.training.stop_after_step=6")
    assert "training.stop_after_step (6) is reached" in output
    assert curve(run_dir)[-1][0] == 6


def test_a_constant_learning_rate_is_one_and_reaches_the_router(corpus: Corpus, tmp_path: Path) -> None:
    settings = small_config(corpus, tmp_path / "run")
    del settings["scheduler"]
    config = write_config(settings, tmp_path / "run.json")
    train(config, "ssd_megatron.training.stop_after_step=7")
    train(config)
    assert {record["lr"] for record in records(tmp_path / "run", "train")} == {0.01}
    newest = checkpoints(tmp_path / "run" / "checkpoints")
    router = [read_interval(f, read_index(f), f"blocks.0.layer.mlp.router.weight|{MASTER}", 0, 256) for f in newest]
    assert len(router) == 2 and not torch.equal(*router)
    assert read_index(newest[1]).values["adam_steps"]["router"] == 3  # steps 5, 6, 7 since the switch
