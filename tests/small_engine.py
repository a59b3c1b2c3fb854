"""A tiny GPT under the real engine, on ranks that a test has joined, fed with random tokens."""

import json
import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssd_megatron.config.load import Hardware, RunConfig, load_config
from ssd_megatron.config.schema import ParallelConfig
from ssd_megatron.model.language_model import LanguageModel, ffn_names
from ssd_megatron.parallel.topology import Topology
from ssd_megatron.switching.coordinator import Coordinator
from ssd_megatron.switching.networks import Networks
from ssd_megatron.switching.schedule import Schedule
from ssd_megatron.switching.statistics import ProbeBatch
from ssd_megatron.training.assembly import make_engine
from ssd_megatron.training.engine import Engine
from ssd_megatron.training.synthetic import random_batch as synthetic_batch
from tests.small_run import Corpus, small_config

# What run_config takes beside settings of the model.
OTHERS = ("bf16", "stage", "parallel", "training", "steps", "phases", "weight_sparsity", "ssd")
NOWHERE = Corpus(Path("corpus"), Path("tokenizer.model"))


def run_config(world_size: int = 1, **model: Any) -> RunConfig:
    """The configuration of small_run with other model settings, without dropout; data is never opened."""
    settings = {key: model.pop(key) for key in OTHERS if key in model}
    raw = small_config(NOWHERE, Path("run"))
    raw["ssd_megatron"]["model"] |= {"dropout": 0.0} | model
    raw["ssd_megatron"]["parallel"] = settings.get("parallel", {})
    raw["ssd_megatron"]["training"] |= settings.get("training", {})
    raw["ssd_megatron"]["ssd"] |= settings.get("ssd", {})
    if "steps" in settings:
        raw["ssd_megatron"]["training"]["train_steps"] = settings["steps"]
    if "phases" in settings:
        phases = [{"start_step": step, "mode": mode} for step, mode in settings["phases"]]
        raw["ssd_megatron"]["ssd"]["phases"] = phases
    if "weight_sparsity" in settings:
        raw["ssd_megatron"]["weight_sparsity"] = settings["weight_sparsity"]
        raw["ssd_megatron"]["ssd"] = {"schedule": "dense", "num_experts": 8}
    raw["bf16"] = {"enabled": settings.get("bf16", False)}
    raw["zero_optimization"] = {"stage": settings.get("stage", 1)}
    sizes = ParallelConfig(**raw["ssd_megatron"]["parallel"])
    data = world_size // (sizes.tensor_parallel_size * sizes.pipeline_parallel_size)
    raw["train_batch_size"] = math.lcm(12, 2 * data)  # for 1, 2, 3 and 4 data-parallel ranks
    raw["tensorboard"] = {"enabled": False}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ds.json"
        path.write_text(json.dumps(raw))
        return load_config(path, world_size=world_size, hardware=Hardware("cpu", False, "test"))


def build(topology: Topology, config: RunConfig, backend: str = "torch") -> tuple[LanguageModel, Engine]:
    model = LanguageModel(config.ssd_megatron, backend, topology)
    return model, make_engine(model, config, topology)


def random_batch(config: RunConfig, seed: int) -> dict[str, Tensor]:
    """A microbatch of random tokens, all of them valid."""
    samples = [config.micro_batch_size * seed + sample for sample in range(config.micro_batch_size)]
    return dict(synthetic_batch(config, samples, torch.device("cpu")))


def make_coordinator(topology: Topology, config: RunConfig, model: LanguageModel, engine: Engine) -> Coordinator:
    """As a job makes it, with one probe batch on each data-parallel rank."""
    section = config.ssd_megatron
    probe = ProbeBatch([random_batch(config, 10**6 + topology.data.rank)], engine.mean_loss, topology)
    schedule = Schedule(section.ssd, section.training.train_steps)
    networks = Networks(ffn_names(section.model.total_layers), model.ffns, topology)
    return Coordinator(section.ssd, networks, engine.state, probe, schedule, section.seed)


def train_steps(engine: Engine, config: RunConfig, steps: range, coordinator: Coordinator | None = None) -> list[float]:
    """Some optimizer steps on random batches, other ones on each data-parallel rank, with the coordinator's switches.
    Returns their losses."""
    ranks = config.data_parallel_size
    rank = torch.distributed.get_rank() // config.ssd_megatron.parallel.tensor_parallel_size % ranks
    losses = []
    for step in steps:
        first = (step * config.gradient_accumulation_steps) * ranks + rank
        batches = [random_batch(config, first + m * ranks) for m in range(config.gradient_accumulation_steps)]
        if coordinator is not None:
            coordinator.before_step(step)
        losses.append(engine.train_step(batches).loss)
        if coordinator is not None:
            coordinator.after_step(step, losses[-1])
    return losses
