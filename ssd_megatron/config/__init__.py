"""The config room: one ds.json, checked as a whole before anything is built."""

from ssd_megatron.config.load import Hardware, RunConfig, load_config
from ssd_megatron.config.schema import (
    CheckpointConfig,
    DataConfig,
    LoggingConfig,
    ModelConfig,
    ParallelConfig,
    PhaseConfig,
    SSDConfig,
    SsdMegatronConfig,
    TrainingConfig,
)

__all__ = [
    "CheckpointConfig",
    "DataConfig",
    "Hardware",
    "LoggingConfig",
    "ModelConfig",
    "ParallelConfig",
    "PhaseConfig",
    "RunConfig",
    "SSDConfig",
    "SsdMegatronConfig",
    "TrainingConfig",
    "load_config",
]
