"""Small real runs: `pretrain_ssd.main` on forked ranks, a tiny GPT, real text."""

import io
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rich.console

from ssd_megatron.data.documents import DocumentReader, find_inputs
from ssd_megatron.data.preprocess import preprocess
from ssd_megatron.data.tokenizers import train_sentencepiece
from tests.ranks import forkserver, free_port, rank_environment

# Two switches to sparse within 16 steps: dense 1-4, sparse 5-8, dense 9-11, sparse 12-14, dense 15-16.
PHASES = [
    {"start_step": 1, "mode": "dense"},
    {"start_step": 5, "mode": "sparse"},
    {"start_step": 9, "mode": "dense"},
    {"start_step": 12, "mode": "sparse"},
    {"start_step": 15, "mode": "dense"},
]


@dataclass(frozen=True)
class Corpus:
    """Paths as ds.json wants them."""

    prefix: Path
    tokenizer: Path


def make_corpus(folder: Path, sources: Sequence[Path], tokenizer: Path | None = None) -> Corpus:
    """With a tokenizer of its own, unless there is one."""
    reader = DocumentReader(find_inputs(sources, "text"))
    if tokenizer is None:
        tokenizer = folder / "tokenizer.model"
        train_sentencepiece((document.text for document in reader), tokenizer, 512, max_lines=5_000)
    quiet = rich.console.Console(file=io.StringIO())
    prefix = folder / "corpus"
    preprocess(
        reader, tokenizer_path=tokenizer, prefix=prefix, total_bytes=reader.total_bytes, workers=1, console=quiet
    )
    return Corpus(prefix, tokenizer)


def small_config(corpus: Corpus, run_dir: Path) -> dict[str, Any]:
    """A ds.json as a dict: 2 layers, hidden 32, 64 neurons in 8 experts, 16 steps of 8 samples, PHASES."""
    return {
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01, "weight_decay": 0.1}},
        "scheduler": {"type": "WarmupCosineLR", "params": {"warmup_num_steps": 2, "cos_min_ratio": 0.1}},
        "gradient_clipping": 1.0,
        "bf16": {"enabled": False},
        "ssd_megatron": {
            "run_dir": str(run_dir),
            "model": {
                "num_layers": 2,
                "hidden_size": 32,
                "num_attention_heads": 2,
                "ffn_hidden_size": 64,
                "seq_length": 16,
                "vocab_size": 512,
                "dropout": 0.1,
            },
            "data": {"paths": [str(corpus.prefix)], "tokenizer": str(corpus.tokenizer), "split": "8,2,0"},
            "ssd": {
                "schedule": "fixed",
                "phases": PHASES,
                "num_experts": 8,
                "top_k": 2,
                "check_interval": 3,
                "backend": "torch",
            },
            "training": {"train_steps": 16, "eval_interval": 8, "eval_steps": 1},
            "checkpoint": {"interval": 100, "keep_last": None},
            "logging": {"plots": False},
        },
    }


def write_config(config: dict[str, Any], path: Path) -> Path:
    path.write_text(json.dumps(config))
    return path


class Ranks:
    """Ranks of one started job, each running `pretrain_ssd.main`; their output goes to files beside the config.

    Args:
        overrides: for --set.
        prepare: called in each rank's process with its number, before `main`.
        differently: another ds.json for single ranks.
    """

    def __init__(
        self,
        ds_config: Path,
        *overrides: str,
        world_size: int = 1,
        prepare: Callable[[int], None] | None = None,
        differently: Mapping[int, Path] | None = None,
    ) -> None:
        port = free_port()
        self.outputs = [ds_config.with_name(f"{ds_config.stem}-rank{rank}.log") for rank in range(world_size)]
        others = differently or {}
        sets = [word for item in overrides for word in ("--set", item)]
        self.processes = [
            forkserver().Process(
                target=_main,
                args=(
                    rank,
                    world_size,
                    port,
                    ["--ds_config", str(others.get(rank, ds_config)), *sets],
                    self.outputs[rank],
                    prepare,
                ),
                daemon=True,
            )
            for rank in range(world_size)
        ]
        for process in self.processes:
            process.start()

    def wait(self, seconds: float = 240) -> list[int]:
        """Exit status of each rank."""
        for process in self.processes:
            process.join(seconds)
            assert process.exitcode is not None, f"a rank is still running after {seconds} s: {self.output()}"
        return [process.exitcode for process in self.processes if process.exitcode is not None]

    def wait_for(self, text: str, seconds: float = 120) -> None:
        """Return once rank 0 has printed `text`."""
        end = time.monotonic() + seconds
        while text not in self.output():
            assert time.monotonic() < end, f"{text!r} was not printed: {self.output()}"
            assert self.processes[0].is_alive(), f"rank 0 ended without {text!r}: {self.output()}"
            time.sleep(0.02)

    def output(self, rank: int = 0) -> str:
        path = self.outputs[rank]
        return path.read_text() if path.exists() else ""

    def signal(self, number: signal.Signals, rank: int = 0) -> None:
        pid = self.processes[rank].pid
        assert pid is not None
        os.kill(pid, number)


def train(ds_config: Path, *overrides: str, world_size: int = 1) -> str:
    """Run a job to its end, which must be good, and return what rank 0 printed."""
    ranks = Ranks(ds_config, *overrides, world_size=world_size)
    codes = ranks.wait()
    assert codes == [0] * world_size, "".join(ranks.output(rank) for rank in range(world_size))
    return ranks.output()


def records(run_dir: Path, kind: str) -> list[dict[str, Any]]:
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def curve(run_dir: Path) -> list[tuple[int, float, float]]:
    """(step, loss, gradient norm) of every step."""
    return [(record["step"], record["loss"], record["grad_norm"]) for record in records(run_dir, "train")]


def _main(
    rank: int,
    world_size: int,
    port: int,
    arguments: list[str],
    output: Path,
    prepare: Callable[[int], None] | None = None,
) -> None:
    import torch

    import pretrain_ssd

    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    # One thread, whatever the machine: sums by several threads differ in the last bit.
    os.environ.update(rank_environment(rank, world_size, port), OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    if prepare is not None:
        prepare(rank)
    sys.exit(pretrain_ssd.main(arguments))
