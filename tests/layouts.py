"""Small real runs on many layouts: what the layout tests compare."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.curves.corpus import write_corpus
from tests.small_run import small_config, train, write_config


@dataclass(frozen=True)
class Layout:
    """How a model and the samples of a step are cut up; `data` copies of the model."""

    tensor: int = 1
    pipeline: int = 1
    expert: int = 1
    data: int = 1
    stage: int = 1
    micro: int = 2

    @property
    def ranks(self) -> int:
        return self.tensor * self.pipeline * self.data

    def apply(self, config: dict[str, Any]) -> dict[str, Any]:
        """A ds.json with this layout."""
        section = config["ssd_megatron"] | {
            "parallel": {
                "tensor_parallel_size": self.tensor,
                "pipeline_parallel_size": self.pipeline,
                "expert_parallel_size": self.expert,
                "timeout_seconds": 120,
            }
        }
        return config | {
            "train_micro_batch_size_per_gpu": self.micro,
            "zero_optimization": {"stage": self.stage},
            "ssd_megatron": section,
        }

    def __str__(self) -> str:
        sizes = (("TP", self.tensor), ("PP", self.pipeline), ("EP", self.expert), ("DP", self.data))
        named = " x ".join(f"{name}{size}" for name, size in sizes if size > 1) or "1 process"
        return f"{named}, ZeRO {self.stage}, micro batch {self.micro}"


def oracle_config(folder: Path, phases: list[tuple[int, str]], steps: int) -> dict[str, Any]:
    """A run whose losses and gradient norms show every wrong gradient.

    The partition is random, by seed: labels do not depend on rounding. Adam's eps of 1 makes an update proportional to
    the gradient, and clipping at half of a usual norm to the norm, so a wrong scale of either is in every later loss.
    """
    config = small_config(write_corpus(folder), folder / "run")
    config |= {
        "optimizer": {"type": "AdamW", "params": {"lr": 1.0, "eps": 1.0, "weight_decay": 0.01}},
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
