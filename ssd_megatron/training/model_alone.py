"""A checkpoint's model in one process, without an engine: to be observed, measured, or tuned a little."""

from pathlib import Path

import torch

from ssd_megatron.config.schema import ParallelConfig, SsdMegatronConfig, TrainingConfig, expert_shape
from ssd_megatron.ffn.kernels.trial import fastest_right
from ssd_megatron.model.language_model import LanguageModel
from ssd_megatron.parallel.topology import Topology
from ssd_megatron.training.saved_model import SavedModel, Settings


def load_alone(saved: SavedModel, topology: Topology) -> LanguageModel:
    """The model, fp32, dense, with the checkpoint's weights.

    Args:
        topology: of one process.
    Raises:
        CheckpointError: the checkpoint has not exactly the tensors of the model.
    """
    model = build_alone(saved.settings, topology)
    saved.load_into(model.logical_parameters(), model.ffns)
    return model


def build_alone(settings: Settings, topology: Topology, backend: str | None = None) -> LanguageModel:
    """The model with initial values; sparse with the fastest backend that is right here, unless one is given."""
    section = SsdMegatronConfig.model_construct(
        run_dir=Path(),
        seed=0,
        model=settings.model,
        ssd=settings.ssd,
        parallel=ParallelConfig(),
        training=TrainingConfig(train_steps=1),
    )
    shape = expert_shape(settings.model, settings.ssd)
    backend = backend or fastest_right(topology.device, torch.float32, settings.model.activation, shape)
    return LanguageModel(section, backend, topology).to(topology.device).eval()
