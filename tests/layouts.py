"""Small real runs on many layouts: what the layout tests compare."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ssd_megatron.config.schema import ParallelConfig
from tests.curves.corpus import write_corpus
from tests.small_run import records, small_config, train, write_config


@dataclass(frozen=True)
class Layout:
    """How a model and the samples of a step are cut up; `data` ranks, `expert` of which share a copy of the banks."""

    tensor: int = 1
    pipeline: int = 1
    expert: int = 1
    data: int = 1
    stage: int = 1
    micro: int = 2

    @property
    def ranks(self) -> int:
        return self.tensor * self.pipeline * self.data

    @property
    def homes(self) -> int:
        """Ranks over which the neurons of one network are split."""
        return self.tensor * self.expert

    @property
    def parallel(self) -> ParallelConfig:
        return ParallelConfig(
            tensor_parallel_size=self.tensor,
            pipeline_parallel_size=self.pipeline,
            expert_parallel_size=self.expert,
            timeout_seconds=120,
        )

    def apply(self, config: dict[str, Any]) -> dict[str, Any]:
        """A ds.json with this layout."""
        section = config["ssd_megatron"] | {"parallel": self.parallel.model_dump()}
        return config | {
            "train_micro_batch_size_per_gpu": self.micro,
            "zero_optimization": {"stage": self.stage},
            "ssd_megatron": section,
        }

    def __str__(self) -> str:
        """As in `TP2xEP2xDP2, ZeRO 2`: DP counts the copies of the banks."""
        copies = self.data // self.expert
        sizes = (("TP", self.tensor), ("PP", self.pipeline), ("EP", self.expert), ("DP", copies))
        named = "x".join(f"{name}{size}" for name, size in sizes if size > 1) or "1 process"
        return ", ".join([named, f"ZeRO {self.stage}"] + [f"micro batch {self.micro}"] * (self.micro != 2))


# One name per layout that several tests use.
ONE, DP2, TP2, PP2, EP2 = Layout(), Layout(data=2), Layout(tensor=2), Layout(pipeline=2), Layout(expert=2, data=2)
DP4, EP4, EP2_DP2 = Layout(data=4), Layout(expert=4, data=4), Layout(expert=2, data=4)
TP2_PP2, TP2_EP2, PP2_EP2 = Layout(2, 2), Layout(2, 1, 2, 2), Layout(1, 2, 2, 2)
TP2_PP2_DP2, TP2_PP2_EP2, PP2_EP2_DP2 = Layout(2, 2, 1, 2), Layout(2, 2, 2, 2), Layout(1, 2, 2, 4)


def zero2(layout: Layout) -> Layout:
    return replace(layout, stage=2)


def oracle_config(folder: Path, phases: list[tuple[int, str]], steps: int) -> dict[str, Any]:
    """A run whose losses and gradient norms show every wrong gradient.

    The partition is random, by seed: labels do not depend on rounding. Adam's eps of 1 makes an update proportional to
    the gradient, and clipping at half of a usual norm to the norm, so a wrong scale of either is in every later loss.
    """
    config = small_config(write_corpus(folder), folder / "run")
    config |= {
        "optimizer": {"type": "AdamW", "params": {"lr": 0.2, "eps": 1.0, "weight_decay": 0.05}},
        "scheduler": {"type": "WSD", "params": {"warmup_num_steps": 2, "decay_num_steps": steps // 3}},
        "gradient_clipping": 0.5,
    }
    section = config["ssd_megatron"]
    section["model"] |= {"dropout": 0.0, "vocab_size": 128}
    section["ssd"] |= {
        "phases": [{"start_step": step, "mode": mode} for step, mode in phases],
        "partition": "random",
        "top_k": 3,
    }
    section["training"] = {"train_steps": steps, "eval_interval": steps // 2, "eval_steps": 1}
    return config


def run_layout(folder: Path, layout: Layout, config: dict[str, Any], *overrides: str) -> Path:
    """Train on a layout in `folder` and return the run folder."""
    folder.mkdir(parents=True, exist_ok=True)
    run_dir = folder / "run"
    config = layout.apply(config)
    config["ssd_megatron"] = config["ssd_megatron"] | {"run_dir": str(run_dir)}
    train(write_config(config, folder / "run.json"), *overrides, world_size=layout.ranks)
    return run_dir


def deviation(run_dir: Path, reference: Path, kind: str, *names: str) -> list[float]:
    """Largest relative difference of some numbers to the reference's, record by record of one kind."""
    pairs = list(zip(records(run_dir, kind), records(reference, kind), strict=True))
    assert [mine["step"] for mine, _ in pairs] == [expected["step"] for _, expected in pairs]
    return [
        max((abs(mine[name] / expected[name] - 1) for name in names if expected[name] is not None), default=0.0)
        for mine, expected in pairs
    ]
