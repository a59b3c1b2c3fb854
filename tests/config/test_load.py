import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from ssd_megatron.config.load import Hardware, load_config
from ssd_megatron.errors import ConfigError
from tests.config.conftest import CPU, DROP, GPU, Load

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted(ROOT.glob("examples/**/*.json"))
AMX = Hardware(device="cpu", bf16=True, name="AMX CPU")
SSD = "ssd_megatron.ssd"


def test_defaults_are_filled_in(load: Load) -> None:
    config = load()
    model = config.ssd_megatron.model
    assert (model.num_query_groups, model.ffn_hidden_size, model.head_dim) == (4, 256, 16)
    assert model.padded_vocab_size == 1024
    assert config.ssd_megatron.data_cache_dir == Path("runs/test/data_cache")
    assert config.deepspeed["gradient_clipping"] == 1.0
    assert config.deepspeed["zero_optimization"]["stage"] == config.zero_stage == 1
    assert config.deepspeed["tensorboard"] == {
        "enabled": True,
        "output_path": "runs/test/tensorboard",
        "job_name": "",
    }
    assert "ssd_megatron" not in config.deepspeed
    assert "auto" not in json.dumps(config.deepspeed)


@pytest.mark.parametrize("given", [{}, {"ssd_megatron.model.ffn_hidden_size": 256}])
def test_larger_networks_compute_as_many_neurons(load: Load, given: dict[str, int]) -> None:
    config = load({"ssd_megatron.ffn_expansion": 4, f"{SSD}.schedule": "sparse", f"{SSD}.top_k": DROP} | given)
    section = config.ssd_megatron
    assert (section.model.ffn_hidden_size, section.ssd.num_experts, section.ssd.top_k) == (1024, 16, 4)
    assert config.resolved()["ssd_megatron"]["ffn_expansion"] is None  # what it meant is there


@pytest.mark.parametrize(
    ("hardware", "enabled", "dtype", "note"),
    [
        (CPU, "auto", "float32", "precision fp32 (auto: plain CPU has no fast bf16)"),
        (AMX, "auto", "bfloat16", "precision bf16 with fp32 masters (auto: AMX CPU computes bf16 fast)"),
        (GPU, "auto", "bfloat16", "precision bf16 with fp32 masters (auto: H200 computes bf16 fast)"),
        (CPU, True, "bfloat16", "bf16.enabled is true, but plain CPU has no fast bf16: fp32 is faster here"),
        (GPU, False, "float32", None),
    ],
)
def test_precision(load: Load, hardware: Hardware, enabled: object, dtype: str, note: str | None) -> None:
    config = load({"bf16": {"enabled": enabled}}, hardware=hardware)
    assert config.dtype == dtype
    assert config.deepspeed["bf16"] == {"enabled": dtype == "bfloat16"}
    about_precision = [line for line in config.notes if "bf16" in line or "fp32" in line]
    assert about_precision == ([] if note is None else [note])


@pytest.mark.parametrize("hardware", [CPU, AMX, GPU])
def test_optimizer_implementation(load: Load, hardware: Hardware) -> None:
    params = load(hardware=hardware).deepspeed["optimizer"]["params"]
    assert (params["torch_adam"], params["fused"]) == (True, True)
    assert "adam_w_mode" not in params


@pytest.mark.parametrize(
    ("hardware", "ranks", "batch", "micro", "accumulation"),
    [(CPU, 1, 256, 64, 4), (GPU, 1, 256, 128, 2), (CPU, 2, 32, 16, 1), (GPU, 4, 96, 24, 1)],
)
def test_micro_batch_keeps_to_the_token_budget(
    load: Load, hardware: Hardware, ranks: int, batch: int, micro: int, accumulation: int
) -> None:
    config = load({"train_batch_size": batch}, world_size=ranks, hardware=hardware)
    assert (config.micro_batch_size, config.gradient_accumulation_steps) == (micro, accumulation)
    assert config.deepspeed["train_micro_batch_size_per_gpu"] == micro
    assert (config.train_batch_size, config.data_parallel_size) == (batch, ranks)
    assert any(line.startswith(f"micro batch {micro}, accumulation {accumulation} (auto") for line in config.notes)


def test_deepspeed_scheduler_gets_steps_and_peak_rate(load: Load) -> None:
    config = load({"scheduler": {"type": "WarmupDecayLR", "params": {"warmup_num_steps": 10}}})
    assert config.scheduler is None
    assert config.deepspeed["scheduler"] == {
        "type": "WarmupDecayLR",
        "params": {
            "warmup_num_steps": 10,
            "warmup_type": "log",
            "warmup_min_lr": 0.0,
            "warmup_max_lr": 0.001,
            "total_num_steps": 1000,
        },
    }


def test_own_scheduler_is_kept_from_deepspeed(load: Load) -> None:
    config = load({"scheduler": {"type": "WSD", "params": {"warmup_num_steps": 10, "decay_num_steps": 100}}})
    assert config.scheduler is not None
    assert (config.scheduler.total_num_steps, config.scheduler.min_lr_ratio) == (1000, 0.0)
    assert "scheduler" not in config.deepspeed
    assert config.resolved()["scheduler"]["type"] == "WSD"


def test_notes_say_what_costs(load: Load) -> None:
    assert "no scheduler: the learning rate is constant" in load().notes
    gelu = load({"ssd_megatron.model.activation": "gelu"})
    assert any(line.startswith("model.activation gelu leaves more neurons active than relu") for line in gelu.notes)
    relu = load({"ssd_megatron.model.activation": "reglu"})
    assert not any("more neurons active" in line for line in relu.notes)


def test_note_when_the_adaptive_schedule_cannot_switch(load: Load) -> None:
    short = load({"ssd_megatron.training.train_steps": 300})
    assert any("can make no switch: 2 similar checks every 100 steps end at step 300" in line for line in short.notes)
    assert not any("can make no switch" in line for line in load().notes)
    assert not any("no switch" in line for line in load({f"{SSD}.schedule": "dense"}).notes)


@pytest.mark.parametrize("scale", [True, False])
def test_sparse_weights_may_have_higher_learning_rates(load: Load, scale: bool) -> None:
    masks = {"sparsity": 0.5, "scale_learning_rate": scale}
    settings = {"ssd_megatron.weight_sparsity": masks, f"{SSD}.schedule": "dense"}
    scheduler = {"type": "WarmupLR", "params": {"warmup_num_steps": 9, "warmup_min_lr": 1e-4}}
    config = load(settings | {"scheduler": scheduler})
    factor = math.exp(1.969 * 0.25 + 0.2905 * 0.5) if scale else 1.0
    deepspeed = config.for_deepspeed()
    assert deepspeed["optimizer"]["params"]["lr"] == pytest.approx(1e-3 * factor)
    rates = {name: deepspeed["scheduler"]["params"][name] for name in ("warmup_min_lr", "warmup_max_lr")}
    assert rates == pytest.approx({"warmup_min_lr": 1e-4 * factor, "warmup_max_lr": 1e-3 * factor})
    assert config.resolved()["optimizer"]["params"]["lr"] == 1e-3
    assert any("learning rates times 1.892" in note for note in config.notes) == scale


def test_overrides_use_the_paths_of_the_file(load: Load) -> None:
    config = load(
        {f"{SSD}.sparse_fraction": 0.6},
        "ssd_megatron.ssd.top_k=8",
        "train_batch_size=64",
        "optimizer.params.lr=3e-4",
        "ssd_megatron.run_dir=runs/other",
        "ssd_megatron.ssd.sparse_fraction=",
        "ssd_megatron.checkpoint.keep_last=null",
        'ssd_megatron.data.paths=[0.7, "a", 0.3, "b"]',
    )
    section = config.ssd_megatron
    assert (section.ssd.top_k, config.train_batch_size) == (8, 64)
    assert config.deepspeed["optimizer"]["params"]["lr"] == 3e-4
    assert section.run_dir == Path("runs/other")
    assert section.ssd.sparse_fraction == 0.5
    assert section.checkpoint.keep_last is None
    assert section.data.paths == (0.7, "a", 0.3, "b")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("ssd.top_k=8", "--set ssd.top_k: no such field: did you mean ssd_megatron.ssd.top_k?"),
        ("train_batchsize=8", "--set train_batchsize: no such field: did you mean train_batch_size?"),
        ("qqq=8", "--set qqq: no such field: paths are those of the file, see docs/config.md"),
        ("elasticity={}", "elasticity ({}) is not accepted: removed from DeepSpeed"),
        ("ssd_megatron.ssd.top_k=many", 'ssd.top_k ("many") must be a whole number'),
        ("train_batch_size", "--set train_batch_size: must be path=value"),
    ],
)
def test_bad_override_is_a_problem_like_others(load: Load, override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load({}, override)
    assert message in str(caught.value)


def test_one_path_may_stand_alone_and_null_is_the_default_size(load: Load) -> None:
    config = load({"ssd_megatron.data.paths": "corpus", "ssd_megatron.model.ffn_hidden_size": None})
    assert config.ssd_megatron.data.paths == ("corpus",)
    assert config.ssd_megatron.model.ffn_hidden_size == 256


def test_heads_of_an_own_size_need_not_divide_the_hidden_size(load: Load) -> None:
    model = load({"ssd_megatron.model.num_attention_heads": 5, "ssd_megatron.model.kv_channels": 10}).ssd_megatron.model
    assert (model.kv_channels, model.head_dim) == (10, 10)


def test_config_is_frozen(load: Load) -> None:
    config: Any = load()
    with pytest.raises(ValidationError, match="frozen"):
        config.ssd_megatron.ssd.top_k = 8
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.dtype = "float32"


@pytest.mark.parametrize(
    "override",
    [
        "ssd_megatron.run_dir=elsewhere",
        "ssd_megatron.training.stop_after_step=5",
        "ssd_megatron.training.eval_interval=7",
        "ssd_megatron.training.recompute=full",
        "ssd_megatron.training.compile=blocks",
        "ssd_megatron.training.loss_chunk_tokens=8",
        "ssd_megatron.checkpoint.interval=7",
        "ssd_megatron.logging.log_interval=1",
        "ssd_megatron.ssd.backend=reference",
        "ssd_megatron.data.num_workers=2",
        "train_micro_batch_size_per_gpu=2",
        "zero_optimization.stage=2",
        "bf16.enabled=true",
        "optimizer.params.fused=true",
    ],
)
def test_fingerprint_allows_what_a_resumed_run_may_change(load: Load, override: str) -> None:
    assert load({}, override).fingerprint() == load().fingerprint()


def test_fingerprint_does_not_depend_on_the_layout(load: Load) -> None:
    homes = load({f"{SSD}.rebalance_limit": 1.2, "ssd_megatron.parallel.tensor_parallel_size": 2}, world_size=2)
    assert homes.ssd_megatron.ssd.rebalance_limit == 1.2
    assert homes.fingerprint() == load().fingerprint()


@pytest.mark.parametrize(
    ("override", "path"),
    [
        ("ssd_megatron.seed=1", "seed"),
        ("ssd_megatron.model.num_layers=3", "model.num_layers"),
        ("ssd_megatron.data.split=90,9,1", "data.split"),
        ("ssd_megatron.ssd.top_k=8", "ssd.top_k"),
        ("ssd_megatron.training.train_steps=999", "training.train_steps"),
        ("train_batch_size=16", "train_batch_size"),
        ("optimizer.params.lr=0.01", "optimizer.params.lr"),
        ("gradient_clipping=0.5", "gradient_clipping"),
    ],
)
def test_fingerprint_sees_what_changes_the_run(load: Load, override: str, path: str) -> None:
    before, after = load(), load({}, override)
    assert before.fingerprint() != after.fingerprint()
    differing = {name for name in before.identity() if before.identity()[name] != after.identity()[name]}
    assert differing == {path}


def test_fingerprint_does_not_depend_on_the_machine(load: Load) -> None:
    assert load(world_size=4, hardware=GPU).fingerprint() == load().fingerprint()


@pytest.mark.parametrize("schedule", ["adaptive", "dense", "fixed"])
def test_resolved_config_loads_to_the_same_run(load: Load, tmp_path: Path, schedule: str) -> None:
    phases = [{"start_step": 1, "mode": "dense"}, {"start_step": 500, "mode": "sparse"}]
    changes = {
        f"{SSD}.schedule": schedule,
        f"{SSD}.phases": phases if schedule == "fixed" else DROP,
        "scheduler": {"type": "WSD", "params": {"warmup_num_steps": 10, "decay_num_steps": 100}},
    }
    config = load(changes, hardware=AMX)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config.resolved()))
    again = load_config(path, world_size=1, hardware=CPU)
    assert again.resolved() == config.resolved()
    assert again.fingerprint() == config.fingerprint()


@pytest.mark.parametrize("path", EXAMPLES, ids=[path.stem for path in EXAMPLES])
@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_examples_load_on_any_machine(path: Path, world_size: int) -> None:
    for hardware in (CPU, AMX, GPU):
        config = load_config(path, world_size=world_size, hardware=hardware)
        ssd = config.ssd_megatron.ssd
        assert ssd.top_k / ssd.num_experts == 0.25
        assert not any("no switch" in note for note in config.notes)


def test_gpt_examples_have_the_usual_shapes_and_wide_experts() -> None:
    shapes = {}
    for path in sorted((ROOT / "examples/gpt").glob("*.json")):
        section = load_config(path, world_size=8, hardware=GPU).ssd_megatron
        neurons = section.model.ffn_hidden_size // section.ssd.num_experts
        shapes[path.stem] = (section.model.num_layers, section.model.hidden_size, neurons)
    assert shapes == {
        "124m": (12, 768, 256),
        "238m_reglu": (12, 768, 256),
        "350m": (24, 1024, 256),
        "1.3b": (24, 2048, 256),
        "6.7b": (32, 4096, 512),
        "13b": (40, 5120, 512),
        "70b": (80, 8192, 896),
    }


def test_room_is_fast_to_import_without_torch() -> None:
    code = "import sys, ssd_megatron.config; assert not {'torch', 'deepspeed', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
