"""A small valid ds.json, and a loader that takes changes to it."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ssd_megatron.config.load import Hardware, RunConfig, load_config

CPU = Hardware(device="cpu", bf16=False, name="plain CPU")
GPU = Hardware(device="cuda", bf16=True, name="H200", fp16=True)

BASE: dict[str, Any] = {
    "train_batch_size": 32,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
    "ssd_megatron": {
        "run_dir": "runs/test",
        "model": {
            "num_layers": 2,
            "hidden_size": 64,
            "num_attention_heads": 4,
            "seq_length": 128,
            "vocab_size": 1000,
        },
        "data": {"paths": ["corpus"], "tokenizer": "tokenizer.model"},
        "ssd": {},
        "training": {"train_steps": 1000},
    },
}
DROP = object()


def changed(changes: dict[str, Any]) -> dict[str, Any]:
    """BASE with values set (or dropped) by their dotted path in the file."""
    config = copy.deepcopy(BASE)
    for path, value in changes.items():
        *parents, name = path.split(".")
        section = config
        for step in parents:
            section = section.setdefault(step, {})
        section.pop(name, None)
        if value is not DROP:
            section[name] = copy.deepcopy(value)
    return config


Load = Callable[..., RunConfig]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def load_changed(
        changes: dict[str, Any] | None = None, *overrides: str, world_size: int = 1, hardware: Hardware = CPU
    ) -> RunConfig:
        path = tmp_path / "ds.json"
        path.write_text(json.dumps(changed(changes or {})))
        return load_config(path, overrides, world_size=world_size, hardware=hardware)

    return load_changed
