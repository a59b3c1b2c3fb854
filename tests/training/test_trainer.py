"""What a run leaves behind, and what it does with learning rates, losses that are not finite, and spikes."""

import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import pretrain_ssd
from ssd_megatron.config.load import Hardware, RunConfig, load_config
from ssd_megatron.model.cost import flops_per_token, parameter_counts
from ssd_megatron.training import checkpoint_files
from ssd_megatron.training.dry_run import print_dry_run
from ssd_megatron.training.trainer import first_non_finite
from tests.curves.corpus import write_corpus
from tests.small_run import Corpus, Ranks, curve, records, small_config, train, write_config

STEPS = 16
SPARSE = {5, 6, 7, 8, 12, 13, 14}  # steps of tests.small_run.PHASES
EXAMPLES = sorted((Path(__file__).parents[2] / "examples" / "gpt").glob("*.json"))
CPU = Hardware("cpu", False, "test")

# As ssd_megatron/training/metrics.py documents them.
KEYS = {
    "train": "loss grad_norm lr mode tokens_per_second seconds flops flops_dense skipped loss_scale peak_memory",
    "eval": "loss_dense loss_sparse seconds",
    "save": "seconds",
    "check": "similarity similarity_layers overlap active_fraction stable seconds",
    "switch": "from to seconds seconds_statistics seconds_cluster seconds_transfer seconds_verify bytes_moved "
    "loss_before loss_after loss_sparse reason similarity top_k imbalance_before imbalance_after",
    "load": "expert_load home_load",
    "resume": "checkpoint",
    "fault": "what",
}


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return write_corpus(tmp_path_factory.mktemp("chain"))


@pytest.fixture(scope="module")
def finished(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of 16 steps that was stopped after 10, evaluated every 4, saved after each step."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    config = small_config(corpus, run_dir)
    config["ssd_megatron"]["training"]["eval_interval"] = 4
    config["ssd_megatron"]["checkpoint"]["interval"] = 1
    config["ssd_megatron"]["logging"] = {"plots": True, "log_interval": 1}
    path = write_config(config, run_dir.with_suffix(".json"))
    train(path, "ssd_megatron.training.stop_after_step=10")
    train(path)
    return run_dir


def settings(run_dir: Path) -> RunConfig:
    return load_config(run_dir / "config.json", world_size=1, hardware=CPU)


# What a run leaves behind.


def test_every_record_has_the_documented_keys_at_the_steps_where_it_is_due(finished: Path) -> None:
    due = {
        "train": list(range(1, STEPS + 1)),
        "eval": [4, 8, 12, 16],
        "save": list(range(1, STEPS + 1)),
        "check": [3, 6, 9, 12, 15],
        "switch": [5, 9, 12, 15],
        "load": sorted(SPARSE),
        "resume": [10],
        "fault": [],
    }
    for kind, steps in due.items():
        found = records(finished, kind)
        assert [record["step"] for record in found] == steps, kind
        for record in found:
            assert set(record) == {"step", "kind", *KEYS[kind].split()}, kind


def test_flops_add_up_by_the_mode_of_each_step(finished: Path) -> None:
    section = settings(finished).ssd_megatron
    flops, tokens = flops_per_token(section.model, section.ssd), 8 * 16
    spent = 0.0
    for record in records(finished, "train"):
        spent += flops.of("sparse" if record["step"] in SPARSE else "dense") * tokens
        assert record["flops"] == pytest.approx(spent, rel=1e-12)
        assert record["flops_dense"] == pytest.approx(flops.dense * tokens * record["step"], rel=1e-12)
    assert flops.sparse < flops.dense


def test_the_summary_says_what_the_records_say(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    flops = flops_per_token(settings(finished).ssd_megatron.model, settings(finished).ssd_megatron.ssd)
    saved = len(SPARSE) / STEPS * (1 - flops.sparse / flops.dense)
    assert summary["status"] == "finished"
    spent = {
        kind: sum(r["seconds"] for r in records(finished, kind)) for kind in KEYS if "seconds" in KEYS[kind].split()
    }
    assert set(spent) == {"train", "eval", "save", "check", "switch"} and min(spent.values()) > 0
    assert summary["seconds"] == pytest.approx(sum(spent.values()))
    assert [summary[key] for key in ("steps", "train_steps", "tokens", "resumes")] == [16, 16, 16 * 8 * 16, 1]
    assert [(p["start_step"], p["end_step"], p["mode"]) for p in summary["phases"]] == [
        (1, 4, "dense"),
        (5, 8, "sparse"),
        (9, 11, "dense"),
        (12, 14, "sparse"),
        (15, 16, "dense"),
    ]
    assert summary["flops_saved_fraction"] == pytest.approx(saved, rel=1e-9)
    last = records(finished, "eval")[-1]
    assert (summary["loss_dense"], summary["loss_sparse"]) == (last["loss_dense"], last["loss_sparse"])
    assert [switch["step"] for switch in summary["switches"]] == [5, 9, 12, 15]
    assert summary["versions"] == json.loads((finished / "versions.json").read_text())
    assert summary["versions"]["torch"] == torch.__version__


def test_the_sparse_loss_is_there_once_experts_are_formed(finished: Path) -> None:
    known = [(record["step"], record["loss_sparse"] is not None) for record in records(finished, "eval")]
    assert known == [(4, False), (8, True), (12, True), (16, True)]


@pytest.fixture(scope="module")
def repeated(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run from the config.json of the finished one, with another run_dir."""
    folder = tmp_path_factory.mktemp("repeated")
    shutil.copy(finished / "config.json", folder / "ds.json")
    train(folder / "ds.json", f"ssd_megatron.run_dir={folder / 'run'}")
    return folder / "run"


def test_config_json_gives_the_same_run(finished: Path, repeated: Path) -> None:
    # The finished run was resumed, on the same layout: dropout goes on where it was.
    assert curve(repeated) == curve(finished)


def test_a_repeated_run_writes_below_its_own_run_dir(finished: Path, repeated: Path) -> None:
    assert list((repeated / "tensorboard").rglob("events.*"))
    assert len(list((finished / "tensorboard").rglob("events.*"))) == 2  # of two processes


def test_plots_are_drawn(finished: Path) -> None:
    plots = list((finished / "plots").glob("*.png"))
    assert len(plots) >= 3 and all(plot.read_bytes().startswith(b"\x89PNG") for plot in plots)


def test_tensorboard_has_losses_structure_loads_and_switches(finished: Path) -> None:
    folder = next((finished / "tensorboard").rglob("events.*")).parent
    events = EventAccumulator(str(folder))
    events.Reload()
    steps = {tag: [event.step for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    assert steps["train/loss"] == list(range(1, STEPS + 1))
    assert steps["ssd/similarity"] == [6, 9, 12, 15]
    assert steps["expert_load/max_over_mean/layer_00"] == sorted(SPARSE)
    losses = {record["step"]: record["loss_sparse"] for record in records(finished, "eval") if record["loss_sparse"]}
    assert {event.step: event.value for event in events.Scalars("eval/loss_sparse")} == pytest.approx(losses)
    texts = events.Tensors("switch/text_summary")
    assert [text.step for text in texts] == [5, 9, 12, 15]
    assert "from: dense, to: sparse" in texts[0].tensor_proto.string_val[0].decode()


# Learning rates.

Rate = Callable[[int], float]
PEAK = 0.01


def cosine(step: int) -> float:
    """DeepSpeed's: 0 at steps 1 and 2, up by the logarithm to the peak at step 4, then a cosine."""
    if step <= 4:
        return PEAK * math.log(max(1, step - 1)) / math.log(3)
    return PEAK * (0.1 + 0.9 * (1 + math.cos(math.pi * (step - 4) / (STEPS - 3))) / 2)


def linear_decay(step: int) -> float:
    """DeepSpeed's: 0 at steps 1 and 2, the peak at step 5, on the way to 0 two steps after the last."""
    return PEAK * max(0.0, min((step - 2) / 3, (STEPS + 2 - step) / (STEPS - 3)))


def warmup_stable_decay(step: int) -> float:
    """Up in 3 steps, down in the last 5 to 0.2 of the peak one step after the last."""
    return PEAK * min(1.0, step / 3, 0.2 + 0.8 * (STEPS - step + 1) / 5)


SCHEDULERS: list[tuple[str, dict[str, Any], Rate]] = [
    ("WarmupCosineLR", {"warmup_num_steps": 3, "cos_min_ratio": 0.1}, cosine),
    ("WarmupDecayLR", {"warmup_num_steps": 3, "warmup_type": "linear"}, linear_decay),
    ("WSD", {"warmup_num_steps": 3, "decay_num_steps": 5, "min_lr_ratio": 0.2}, warmup_stable_decay),
]


@pytest.mark.parametrize(("name", "params", "rate"), SCHEDULERS, ids=[name for name, _, _ in SCHEDULERS])
def test_the_learning_rate_follows_its_formula_through_all_phases(
    corpus: Corpus, tmp_path: Path, name: str, params: dict[str, Any], rate: Rate
) -> None:
    config = small_config(corpus, tmp_path / "run") | {"scheduler": {"type": name, "params": params}}
    train(write_config(config, tmp_path / "run.json"))
    rates = [record["lr"] for record in records(tmp_path / "run", "train")]
    assert rates == pytest.approx([rate(step) for step in range(1, STEPS + 1)], rel=1e-12, abs=1e-15)


def router(run_dir: Path, step: int, kind: str) -> torch.Tensor:
    """Router rows of the first layer after `step`, from the checkpoint."""
    folder = run_dir / "checkpoints" / checkpoint_files.folder_name(step)
    index = checkpoint_files.read_index(folder)
    key = checkpoint_files.key_of("blocks.0.layer.mlp.router.weight", kind)
    return checkpoint_files.read_interval(folder, index, key, 0, 8 * 32)


def test_the_router_learns_in_sparse_phases_only(finished: Path) -> None:
    master = {step: router(finished, step, "master") for step in range(1, STEPS + 1)}
    moved = {step for step in range(2, STEPS + 1) if not torch.equal(master[step], master[step - 1])}
    assert moved == SPARSE
    # With moments left over from the sparse phase, Adam would move it on at any learning rate but 0.
    assert router(finished, 9, "exp_avg").abs().max() > 0


# Losses.


def test_with_all_experts_chosen_the_sparse_loss_is_the_dense_one(corpus: Corpus, tmp_path: Path) -> None:
    config = small_config(corpus, tmp_path / "run")
    config["ssd_megatron"]["ssd"]["top_k"] = 8
    config["ssd_megatron"]["training"]["eval_interval"] = 4
    train(write_config(config, tmp_path / "run.json"))
    evals = records(tmp_path / "run", "eval")[1:]
    assert len(evals) == 3
    for record in evals:
        assert record["loss_sparse"] == pytest.approx(record["loss_dense"], rel=1e-5)
    for record in records(tmp_path / "run", "switch"):
        assert record["loss_sparse"] == pytest.approx(record["loss_before"], rel=1e-5)


@pytest.fixture(scope="module")
def masked(chain: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[tuple[int, float, float]]]:
    """Trains 4 steps on short documents whose ends have no loss, and returns the curve."""
    folder = tmp_path_factory.mktemp("masked")

    def run(name: str, micro: int, world_size: int = 1, mask: bool = True) -> list[tuple[int, float, float]]:
        config = small_config(chain, folder / name) | {"train_micro_batch_size_per_gpu": micro}
        config["ssd_megatron"]["model"]["dropout"] = 0.0
        config["ssd_megatron"]["data"]["eod_mask_loss"] = mask
        config["ssd_megatron"]["ssd"] = {"schedule": "dense"}
        config["ssd_megatron"]["training"]["train_steps"] = 4
        train(write_config(config, folder / f"{name}.json"), world_size=world_size)
        return curve(folder / name)

    return run


def test_every_valid_token_weighs_the_same_wherever_it_is_computed(masked: Any) -> None:
    expected = masked("one", micro=2)
    for name, micro, world_size in (("two", 2, 2), ("large", 4, 1), ("whole", 8, 1)):
        for (_, loss, norm), (_, loss_1, norm_1) in zip(masked(name, micro, world_size), expected, strict=True):
            assert loss == pytest.approx(loss_1, rel=1e-6)
            assert norm == pytest.approx(norm_1, rel=1e-5)
    unmasked = masked("unmasked", micro=2, mask=False)
    assert abs(unmasked[0][1] / expected[0][1] - 1) > 1e-4


# What goes wrong while training.


def blown_up(
    corpus: Corpus, tmp_path: Path, lr: float, async_save: bool = False, prepare: Callable[[int], None] | None = None
) -> Ranks:
    """A run whose third update, the first with a learning rate above 0, is far too large."""
    config = small_config(corpus, tmp_path / "run")
    config["optimizer"]["params"]["lr"] = lr
    config["ssd_megatron"]["model"]["dropout"] = 0.0
    config["ssd_megatron"]["ssd"] = {"schedule": "dense", "check_interval": 3}
    config["ssd_megatron"]["training"]["max_bad_steps"] = 3
    config["ssd_megatron"]["checkpoint"] |= {"interval": 2, "async_save": async_save}
    return Ranks(write_config(config, tmp_path / "run.json"), prepare=prepare)


@pytest.mark.parametrize(
    ("lr", "where"), [(8e37, "the output of blocks.0.layer.input_layernorm"), (3e4, "the gradients")]
)
def test_losses_or_gradients_that_are_not_finite_are_skipped_and_end_the_run(
    corpus: Corpus, tmp_path: Path, lr: float, where: str
) -> None:
    ranks = blown_up(corpus, tmp_path, lr)
    assert ranks.wait() == [1]
    assert (
        "error: 3 steps in a row up to step 6 had a loss or gradients that are not finite (training.max_bad_steps is 3)"
        f"; first not finite: {where}." in ranks.output()
    )
    run_dir = tmp_path / "run"
    trained = records(run_dir, "train")
    assert [record["skipped"] for record in trained] == [False] * 3 + [True] * 3
    assert {record["grad_norm_text"] for record in trained[3:]} == {"nan"}
    faults = records(run_dir, "fault")
    assert [record["step"] for record in faults] == [4, 5, 6]
    assert [f"the update is skipped ({i} in a row)" in record["what"] for i, record in enumerate(faults, 1)] == [
        True
    ] * 3


def test_bad_steps_write_no_checkpoints_and_the_one_from_before_is_whole(corpus: Corpus, tmp_path: Path) -> None:
    ranks = blown_up(corpus, tmp_path, 8e37)
    assert ranks.wait() == [1]
    folders = checkpoint_files.checkpoints(tmp_path / "run" / "checkpoints")
    assert [folder.name for folder in folders] == ["step_00000002"]  # every 2 steps, but 4 to 6 are bad
    for folder in folders:
        assert checkpoint_files.damages(folder, checkpoint_files.read_index(folder), rank=0, ranks=1) == []
    again = Ranks(tmp_path / "run.json")
    assert again.wait() == [1]
    assert "resuming after step 2 of 16" in again.output()
    assert "error: 3 steps in a row up to step 6" in again.output()
    assert [record["step"] for record in records(tmp_path / "run", "train")] == [1, 2, 3, 4, 5, 6]


@dataclass(frozen=True)
class WritesAfter:
    """Files of checkpoints take until a text stands in the output of the run."""

    output: Path
    text: str

    def __call__(self, rank: int) -> None:
        write = checkpoint_files.write_tensors

        def late(*arguments: Any) -> checkpoint_files.FileRecord:
            while self.text not in self.output.read_text():
                time.sleep(0.05)
            return write(*arguments)

        checkpoint_files.write_tensors = late


def test_a_checkpoint_in_the_background_is_completed_when_the_run_fails(corpus: Corpus, tmp_path: Path) -> None:
    last_words = WritesAfter(tmp_path / "run-rank0.log", "the update is skipped (3 in a row)")
    ranks = blown_up(corpus, tmp_path, 3e4, async_save=True, prepare=last_words)
    assert ranks.wait() == [1]
    assert "error: 3 steps in a row up to step 6" in ranks.output()
    (folder,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert folder.name == "step_00000002"
    assert checkpoint_files.damages(folder, checkpoint_files.read_index(folder), rank=0, ranks=1) == []


def test_the_first_module_that_gives_nan_is_named() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    x = torch.ones(1, 2)
    assert first_non_finite(model, lambda: model(x)) is None
    with torch.no_grad():
        model[1].weight.fill_(torch.inf)
    assert first_non_finite(model, lambda: model(x)) == "1"


@pytest.mark.parametrize(("on_spike", "end", "reason"), [("dense", 52, "rose"), ("ignore", 56, "length")])
def test_a_loss_that_rises_after_a_switch_is_recorded_and_may_end_the_sparse_phase(
    chain: Corpus, tmp_path: Path, on_spike: str, end: int, reason: str
) -> None:
    """2 of 64 experts, drawn at random, lose 5 %; the learning rate is 0 long before, so the loss is level to 2 %."""
    config = small_config(chain, tmp_path / "run")
    config |= {"train_batch_size": 64, "train_micro_batch_size_per_gpu": 64}
    config["optimizer"]["params"]["lr"] = 0.03
    wsd = {"warmup_num_steps": 2, "decay_num_steps": 6, "total_num_steps": 30}
    config["scheduler"] = {"type": "WSD", "params": wsd}
    config["ssd_megatron"]["model"]["dropout"] = 0.0
    config["ssd_megatron"]["ssd"] = {
        "backend": "torch",
        "num_experts": 64,
        "top_k": 2,
        "partition": "random",
        "check_interval": 4,
        "stable_checks": 1,
        "similarity_threshold": 0.1,
        "warmup_fraction": 0.8,
        "sparse_fraction": 0.12,
        "sparse_phase_fraction": 0.12,
        "final_dense_fraction": 0.05,
        "on_spike": on_spike,
        "spike_factor": 1.005,
    }
    config["ssd_megatron"]["training"]["train_steps"] = 60
    train(write_config(config, tmp_path / "run.json"))
    switches = records(tmp_path / "run", "switch")
    assert [(record["step"], record["to"]) for record in switches] == [(49, "sparse"), (end, "dense")]
    assert reason in switches[1]["reason"]
    faults = records(tmp_path / "run", "fault")
    assert [(record["step"], record["what"]) for record in faults] == [(51, "the loss rose after the last switch")]


# Without a run.


def test_there_is_an_example_of_each_size() -> None:
    assert [path.stem for path in EXAMPLES] == ["1.3b", "124m", "13b", "238m_reglu", "350m", "6.7b", "70b"]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_a_dry_run_shows_what_the_run_would_be(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = load_config(path, world_size=8, hardware=CPU)
    section = config.ssd_megatron
    print_dry_run(config)
    output = capsys.readouterr().out
    resolved, end = json.JSONDecoder().raw_decode(output)
    assert resolved == config.resolved()
    tables = [line.split() for line in output[end:].splitlines()]
    totals = [words[3] for words in tables if words[1:2] in (["all"], ["peak"])]
    assert totals[0] == f"{sum(parameter_counts(section.model, section.ssd).values()):,}"
    assert float(totals[1]) > 0
    flops = flops_per_token(section.model, section.ssd)
    assert f"FLOPs per token: {flops.dense:.4g} dense, {flops.sparse:.4g} sparse" in output
    batch, length = config.train_batch_size, section.model.seq_length
    assert f"tokens per step: {batch} samples x {length} = {batch * length} (8 ranks x" in output


def test_the_command_line_option_makes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    example = next(path for path in EXAMPLES if path.stem == "124m")
    assert pretrain_ssd.main(["--ds_config", str(example), "--dry_run"]) == 0
    assert list(tmp_path.iterdir()) == []
    # GPT-2's 124,439,808, 47 rows of padding in the vocabulary, and 12 routers of 12 experts.
    assert f"{124_439_808 + 47 * 768 + 12 * 12 * 768:,}" in capsys.readouterr().out


def test_a_dry_run_shows_weights_that_are_gathered_once_a_step(capsys: pytest.CaptureFixture[str]) -> None:
    example = next(path for path in EXAMPLES if path.stem == "13b")
    kept = []
    for gather in ("microbatch", "step"):
        settings = ["expert_parallel_size=8", f"dense_gather={gather}"]
        overrides = ["--set", "bf16.enabled=true", *(f"ssd_megatron.parallel.{setting}" for setting in settings)]
        arguments = ["--ds_config", str(example), "--dry_run", "--world_size", "8", *overrides]
        assert pretrain_ssd.main(arguments) == 0
        rows = [line.split() for line in capsys.readouterr().out.splitlines()]
        kept += [float(words[3]) for words in rows if words[1:2] == ["kept_weights"]]
    assert kept == [0.0, pytest.approx(40 * 2 * 5120 * 20480 * 2 / 2**30, rel=0.01)]
