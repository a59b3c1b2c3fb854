"""Configurations of jobs on random tokens, for benchmarks that train the real model with the real engine."""

import json
import tempfile
from pathlib import Path
from typing import Any

from ssd_megatron.config.load import RunConfig, load_config
from ssd_megatron.parallel.device import detect_hardware

MODELS: dict[str, dict[str, Any]] = {
    "gpt-1.3b": {"num_layers": 24, "hidden_size": 2048, "num_attention_heads": 16, "seq_length": 2048},
    "gpt-350m": {"num_layers": 24, "hidden_size": 1024, "num_attention_heads": 16, "seq_length": 2048},
    "gpt-124m": {"num_layers": 12, "hidden_size": 768, "num_attention_heads": 12, "seq_length": 1024},
    "small": {"num_layers": 4, "hidden_size": 256, "num_attention_heads": 4, "seq_length": 128},
    # Most of a step is feed-forward network, as in models that pay.
    "wide": {
        "num_layers": 4,
        "hidden_size": 512,
        "num_attention_heads": 8,
        "ffn_hidden_size": 4096,
        "seq_length": 128,
        "vocab_size": 2048,
    },
}


def job_config(
    model: dict[str, Any],
    *,
    samples: int,
    micro_batch: int | None = None,
    ranks: int = 1,
    bf16: bool | str = "auto",
    ssd: dict[str, Any] | None = None,
    parallel: dict[str, Any] | None = None,
    training: dict[str, Any] | None = None,
    bucket: int = 50_000_000,
    steps: int = 1000,
) -> RunConfig:
    """A job that needs no data and no folder.

    Args:
        model: the section `ssd_megatron.model`.
        samples: of one optimizer step over all ranks.
        micro_batch: samples of a rank in one forward pass; as many as it has without it.
        ssd: the section `ssd_megatron.ssd`; always dense without it.
        parallel: the section `ssd_megatron.parallel`.
        training: the section `ssd_megatron.training`, beside the number of steps.
        bucket: elements of ZeRO's reduction bucket.
    """
    raw: dict[str, Any] = {
        "train_batch_size": samples,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "gradient_clipping": 1.0,
        "bf16": {"enabled": bf16},
        "zero_optimization": {"stage": 1, "reduce_bucket_size": bucket},
        "tensorboard": {"enabled": False},
        "ssd_megatron": {
            "run_dir": "unused",
            "model": model,
            "data": {"paths": ["unused"], "tokenizer": "unused"},
            "parallel": parallel or {},
            "ssd": ssd or {"schedule": "dense"},
            "training": {"train_steps": steps} | (training or {}),
        },
    }
    if micro_batch is not None:
        raw["train_micro_batch_size_per_gpu"] = micro_batch
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ds.json"
        path.write_text(json.dumps(raw))
        return load_config(path, world_size=ranks, hardware=detect_hardware())


def sparse_settings(num_experts: int, start_step: int = 1) -> dict[str, Any]:
    """A quarter of the experts for each token from `start_step` on, the same number in each layer."""
    phases = [{"start_step": start_step, "mode": "sparse"}]
    sizes = {"num_experts": num_experts, "top_k": num_experts // 4, "top_k_allocation": "equal"}
    return {"schedule": "fixed", "phases": phases} | sizes
