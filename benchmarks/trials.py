"""What benchmarks.time_to_loss trains: a model on real text, with settings that may matter for time."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssd_megatron.parallel.device import IS_CUDA

Phase = tuple[int, str]


@dataclass(frozen=True)
class Problem:
    """What is trained; sizes as in the sections `model` and `training`.

    Attributes:
        widening: neurons of a layer over the hidden size.
        expert_size: neurons of an expert.
        steps: of the dense run.
    """

    num_layers: int
    hidden_size: int
    num_attention_heads: int
    widening: int
    expert_size: int
    seq_length: int
    vocab_size: int
    batch_size: int
    learning_rate: float
    steps: int


PROBLEMS = {
    "wide": Problem(4, 256, 4, 8, 128, 128, 4096, 16, 1e-3, 600),
    "gpt-124m": Problem(12, 768, 12, 4, 256, 1024, 32_768, 128, 6e-4, 1500),
}


@dataclass(frozen=True)
class Trial:
    """What differs from the default.

    Attributes:
        first, sparse: shares of the steps: the first switch comes after `first`, and after `sparse` more the last one.
        one_in: experts for each that a token computes.
        widening, expert_size: as in Problem; None: its own.
        ssd, model: further settings of these sections.
    """

    first: float = 0.1
    sparse: float = 0.7
    one_in: int = 4
    widening: int | None = None
    expert_size: int | None = None
    ssd: tuple[tuple[str, Any], ...] = ()
    model: tuple[tuple[str, Any], ...] = ()


TRIALS = {
    "default": Trial(),
    "half of the steps sparse": Trial(sparse=0.5),
    "85 % of the steps sparse": Trial(first=0.05, sparse=0.85),
    "first switch at 5 %": Trial(first=0.05),
    "first switch at 20 %": Trial(first=0.2, sparse=0.6),
    "one expert in eight": Trial(one_in=8, expert_size=128),
    "experts of 64": Trial(expert_size=64),
    "experts of 256": Trial(expert_size=256),
    "equal top_k": Trial(ssd=(("top_k_allocation", "equal"),)),
    "frozen router": Trial(ssd=(("router_update", "frozen"),)),
    "d_ff 4h": Trial(widening=4),
    "d_ff 8h": Trial(widening=8),
    "squared relu": Trial(model=(("activation", "squared_relu"),)),
    "reglu": Trial(model=(("activation", "reglu"),)),
    "reglu, 85 % of the steps sparse": Trial(first=0.05, sparse=0.85, model=(("activation", "reglu"),)),
}


def dense_trial(trial: Trial) -> Trial:
    """What matters of a trial to a run that is dense throughout."""
    return Trial(widening=trial.widening, model=trial.model)


def trial_phases(trial: Trial, steps: int) -> list[Phase]:
    """Dense, sparse, dense."""
    first = round(trial.first * steps)
    return [(1, "dense"), (first + 1, "sparse"), (first + round(trial.sparse * steps) + 1, "dense")]


def trial_model(problem: Problem, trial: Trial) -> dict[str, Any]:
    """The section `model`."""
    return {
        "num_layers": problem.num_layers,
        "hidden_size": problem.hidden_size,
        "num_attention_heads": problem.num_attention_heads,
        "ffn_hidden_size": (trial.widening or problem.widening) * problem.hidden_size,
        "seq_length": problem.seq_length,
        "vocab_size": problem.vocab_size,
    } | dict(trial.model)


def trial_config(
    problem: Problem, trial: Trial, corpus: str, steps: int, phases: Sequence[Phase], seed: int, run_dir: Path
) -> dict[str, Any]:
    """A ds.json.

    Args:
        corpus: folder of the corpus and its tokenizer.
        phases: none for a dense run.
    """
    model = trial_model(problem, trial)
    experts = model["ffn_hidden_size"] // (trial.expert_size or problem.expert_size)
    schedule = {"schedule": "fixed", "phases": [{"start_step": step, "mode": mode} for step, mode in phases]}
    ssd = {"num_experts": experts, "top_k": experts // trial.one_in} | dict(trial.ssd)
    return {
        "train_batch_size": problem.batch_size,
        "optimizer": {
            "type": "AdamW",
            "params": {"lr": problem.learning_rate, "betas": [0.9, 0.95], "weight_decay": 0.1},
        },
        "scheduler": {
            "type": "WSD",
            "params": {"warmup_num_steps": max(1, steps // 20), "decay_num_steps": steps * 3 // 10},
        },
        "gradient_clipping": 1.0,
        "bf16": {"enabled": IS_CUDA},
        "ssd_megatron": {
            "run_dir": str(run_dir),
            "seed": seed,
            "model": model,
            "data": {
                "paths": [f"{corpus}/corpus"],
                "tokenizer": f"{corpus}/tokenizer.model",
                "split": "949,50,1",
                "cache_dir": str(run_dir.parent / "data_cache"),
            },
            "ssd": ssd | (schedule if phases else {"schedule": "dense"}),
            "training": {"train_steps": steps, "eval_interval": max(1, steps // 10), "eval_steps": 32},
            "checkpoint": {"interval": max(1, steps // 4), "keep_last": 1},
            "logging": {"plots": False},
        },
    }
