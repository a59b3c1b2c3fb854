"""A job on random tokens: the real model, engine and coordinator, without data, run folder and checkpoints. For
benchmarks and the self-check of a cluster."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ssd_megatron.config.load import RunConfig
from ssd_megatron.model.families import batch_fields
from ssd_megatron.model.language_model import LanguageModel
from ssd_megatron.parallel.topology import Topology
from ssd_megatron.switching.coordinator import Coordinator
from ssd_megatron.switching.reports import SwitchReport
from ssd_megatron.training.assembly import assemble, probe_parts
from ssd_megatron.training.data_loader import StepSampler
from ssd_megatron.training.engine import Batch, Engine, StepResult


@dataclass
class SyntheticJob:
    """What `run_job` puts together, as far as it computes."""

    config: RunConfig
    topology: Topology
    model: LanguageModel
    engine: Engine
    coordinator: Coordinator

    @classmethod
    def build(cls, config: RunConfig, topology: Topology) -> "SyntheticJob":
        batches = [
            random_batch(config, [-1 - sample for sample in part], topology.device)
            for part in probe_parts(config, topology)
        ]
        parts = assemble(config, topology, batches)
        return cls(config, topology, parts.model, parts.engine, parts.coordinator)

    def switch(self, step: int) -> SwitchReport | None:
        """Into the mode of a step, the first of which is 1."""
        return self.coordinator.before_step(step)

    def train_step(self, step: int) -> StepResult:
        """One optimizer step; its samples do not depend on the layout."""
        return self.engine.train_step(step_batches(self.config, self.topology, step))


def step_batches(config: RunConfig, topology: Topology, step: int) -> list[Batch]:
    """This rank's microbatches of a step, the first of which is 1."""
    sampler = StepSampler(
        first_step=step,
        last_step=step,
        micro_batch_size=config.micro_batch_size,
        accumulation=config.gradient_accumulation_steps,
        rank=topology.data.rank,
        ranks=topology.data.size,
    )
    return [random_batch(config, ids, topology.device) for ids in sampler]


def random_batch(config: RunConfig, samples: list[int], device: torch.device) -> Batch:
    """Samples by their numbers (any integers, or none): random tokens, all of them valid."""
    model = config.ssd_megatron.model
    length, count = model.seq_length, len(samples)
    rows = [_sample(number, model.sample_tokens + 1, model.vocab_size) for number in samples]
    tokens = torch.cat([torch.empty(0, model.sample_tokens + 1, dtype=torch.int64), *rows])
    predicted = model.predicted_tokens
    values = {
        "tokens": tokens[:, :length],
        "decoder_tokens": tokens[:, -predicted - 1 : -1],
        "labels": tokens[:, -predicted:],
        "loss_mask": torch.ones(count, predicted),
        "position_ids": torch.arange(length).expand(count, length),
        "token_types": (torch.arange(length) * 2 // length).expand(count, length),
        "sentence_labels": tokens[:, 0] % 2,
        "sentence_mask": torch.ones(count),
    }
    return {name: values[name].contiguous().to(device) for name in batch_fields(model).all}


def _sample(number: int, length: int, vocab_size: int) -> Tensor:
    return torch.randint(0, vocab_size, (1, length), generator=torch.Generator().manual_seed(number % 2**31))
