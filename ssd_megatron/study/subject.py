"""What a run's checkpoints are studied with: its model in one process, without an engine, and its probe samples."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ssd_megatron.config.load import Hardware, RunConfig, load_config
from ssd_megatron.config.schema import ParallelConfig
from ssd_megatron.data.tokenizers import load_tokenizer
from ssd_megatron.errors import ConfigError, DataError
from ssd_megatron.model.language_model import LanguageModel
from ssd_megatron.model.loss_parts import loss_parts, mean_of_parts
from ssd_megatron.parallel.topology import Topology
from ssd_megatron.switching.statistics import Batch, ProbeBatch
from ssd_megatron.training import checkpoint_files as files
from ssd_megatron.training.job import probe_samples
from ssd_megatron.training.run_folder import read_written
from ssd_megatron.training.saved_model import open_model

LEAST_TOKENS = 4096  # a neuron that fires on one token in a thousand should not look dead
ANY_HARDWARE = Hardware("cpu", bf16=True, name="any", fp16=True)  # nothing of a resolved config depends on it


@dataclass(frozen=True)
class Subject:
    """A run's model, fp32 and dense, and samples like those on which its checks were made.

    Attributes:
        samples: of the probe batch.
    """

    config: RunConfig
    model: LanguageModel
    probe: ProbeBatch
    samples: int

    def load(self, folder: Path) -> int:
        """Give the model the weights of one of the run's checkpoints, and return its step.

        Raises:
            CheckpointError: it cannot be read, or is not of this model.
        """
        saved = open_model(folder)
        saved.load_into(self.model.logical_parameters(), self.model.ffns)
        return saved.index.step


def prepare(run_dir: Path, topology: Topology, samples: int | None = None) -> Subject:
    """The subject of a run's folder, its weights not loaded yet.

    Args:
        topology: of one process.
        samples: of the probe batch; without it as many as the run had, or for LEAST_TOKENS.
    Raises:
        DataError: the folder holds no run, or its data is not there any more.
        ConfigError: the run's settings cannot be read, or there are no samples.
    """
    if samples is not None and samples < 1:
        raise ConfigError(f"samples ({samples}) must be at least 1")
    config = _one_process(run_dir, samples)
    section = config.ssd_megatron
    model = LanguageModel(section, "torch", topology).to(topology.device).eval()
    batches = probe_samples(config, load_tokenizer(section.data.tokenizer), topology)

    @torch.no_grad()
    def forward(batches: Sequence[Batch]) -> float:
        return float(mean_of_parts(torch.stack([loss_parts(model(batch), batch) for batch in batches]).sum(0)))

    return Subject(config, model, ProbeBatch(batches, forward, topology), section.ssd.probe_samples)


def find_checkpoints(run_dir: Path) -> list[Path]:
    """Folders of a run's checkpoints, oldest first.

    Raises:
        DataError: there is none.
    """
    found = files.checkpoints(run_dir / "checkpoints")
    if not found:
        raise DataError(f"{run_dir} has no checkpoints/: give the run_dir of a run that has saved one")
    return found[::-1]


def _one_process(run_dir: Path, samples: int | None) -> RunConfig:
    """The run's configuration, with all layers and samples on one rank."""
    path = run_dir / "config.json"
    raw = read_written(path)
    if raw is None:
        raise DataError(f"{run_dir} has no {path.name}: give the run_dir of a run that has started")
    sizes = raw["ssd_megatron"].get("parallel", {})
    model_parallel = sizes.get("tensor_parallel_size", 1) * sizes.get("pipeline_parallel_size", 1)
    batch = raw["train_micro_batch_size_per_gpu"] * raw["gradient_accumulation_steps"]
    config = load_config(path, world_size=raw["train_batch_size"] // batch * model_parallel, hardware=ANY_HARDWARE)
    section = config.ssd_megatron
    if samples is None:
        samples = max(section.ssd.probe_samples, -(-LEAST_TOKENS // section.model.seq_length))
    ssd = section.ssd.model_copy(update={"probe_samples": samples})
    alone = {"parallel": ParallelConfig(), "run_dir": run_dir, "ssd": ssd}
    return replace(config, ssd_megatron=section.model_copy(update=alone))
