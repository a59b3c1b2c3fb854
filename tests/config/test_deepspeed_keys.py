"""What is accepted agrees with the DeepSpeed that is installed."""

from pathlib import Path

import pytest
from deepspeed.monitor.config import CometConfig, CSVConfig, TensorBoardConfig, WandbConfig
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.precision_config import DeepSpeedBF16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from pydantic import BaseModel

from ssd_megatron.config.deepspeed_keys import Bf16Keys, CometKeys, CsvKeys, TensorBoardKeys, WandbKeys, ZeroKeys
from ssd_megatron.config.load import Hardware, load_config
from ssd_megatron.config.refused import reason_for
from tests.config.conftest import CPU, GPU, Load

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("name", "ours", "theirs"),
    [
        ("zero_optimization", ZeroKeys, DeepSpeedZeroConfig),
        ("bf16", Bf16Keys, DeepSpeedBF16Config),
        ("tensorboard", TensorBoardKeys, TensorBoardConfig),
        ("csv_monitor", CsvKeys, CSVConfig),
        ("wandb", WandbKeys, WandbConfig),
        ("comet", CometKeys, CometConfig),
    ],
)
def test_every_key_of_deepspeed_is_accepted_or_refused_by_name(
    name: str, ours: type[BaseModel], theirs: type[BaseModel]
) -> None:
    accepted = set(ours.model_fields)
    known = {field.alias or key for key, field in theirs.model_fields.items()}
    assert accepted <= known
    assert [key for key in sorted(known - accepted) if reason_for(f"{name}.{key}") is None] == []


def test_zero_defaults_are_deepspeeds() -> None:
    ours, theirs = ZeroKeys().model_dump(), DeepSpeedZeroConfig(stage=1).model_dump()
    assert {name: theirs[name] for name in ours} == ours


@pytest.mark.parametrize("hardware", [CPU, GPU])
def test_deepspeed_takes_the_resolved_config(hardware: Hardware) -> None:
    config = load_config(ROOT / "examples/quickstart/ds.json", world_size=1, hardware=hardware)
    taken = DeepSpeedConfig(config.deepspeed)
    assert taken.train_micro_batch_size_per_gpu == config.micro_batch_size
    assert taken.gradient_accumulation_steps == config.gradient_accumulation_steps
    assert taken.bfloat16_config.enabled == (config.dtype == "bfloat16")
    assert taken.zero_optimization_stage == config.zero_stage
    assert taken.gradient_clipping == 1.0
    assert taken.scheduler_params["total_num_steps"] == config.ssd_megatron.training.train_steps
    assert taken.monitor_config.tensorboard.output_path == "runs/quickstart/tensorboard"
    assert taken.dump_state is False


def test_tuning_keys_reach_deepspeed(load: Load) -> None:
    config = load({"zero_optimization": {"stage": 2, "reduce_bucket_size": 5e6, "overlap_comm": True}})
    assert config.zero_stage == 2
    zero = DeepSpeedConfig(config.deepspeed).zero_config
    assert (zero.reduce_bucket_size, zero.overlap_comm) == (5_000_000, True)
