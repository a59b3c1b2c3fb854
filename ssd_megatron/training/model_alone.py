"""A checkpoint's model in one process, without an engine: to be observed, measured, or tuned a little."""

from pathlib import Path

import torch

from ssd_megatron.config.schema import ParallelConfig, SsdMegatronConfig, TrainingConfig, expert_shape
from ssd_megatron.ffn.kernels.trial import fastest_right
from ssd_megatron.model.language_model import LanguageModel
from ssd_megatron.parallel.topology import Topology
from ssd_megatron.training.saved_model import SavedModel, Settings


def load_alone(saved: SavedModel, topology: Topology, num_experts: int | None = None) -> LanguageModel:
    """The model, fp32, dense, with the checkpoint's weights.

    Args:
        topology: of one process.
        num_experts: that its networks are going to have, for which kernels are chosen; without it those they have.
    Raises:
        CheckpointError: the checkpoint has not exactly the tensors of the model.
    """
    settings = saved.settings
    ssd = settings.ssd if num_experts is None else settings.ssd.model_copy(update={"num_experts": num_experts})
    shape = expert_shape(settings.model, ssd)
    backend = fastest_right(topology.device, torch.float32, settings.model.activation, shape)
    model = build_alone(settings, topology, backend)
    saved.load_into(model.logical_parameters(), model.ffns)
    return model


def build_alone(settings: Settings, topology: Topology, backend: str) -> LanguageModel:
    """The model with initial values.

    Args:
        backend: of its sparse mode.
    """
    section = SsdMegatronConfig.model_construct(
        run_dir=Path(),
        seed=0,
        model=settings.model,
        ssd=settings.ssd,
        parallel=ParallelConfig(),
        training=TrainingConfig(train_steps=1),
    )
    return LanguageModel(section, backend, topology).to(topology.device).eval()
