"""A run that is stopped on one layout and goes on on another gives the losses and gradient norms of the run that was
not, on the same samples; on the same layout bit by bit, with dropout too."""

import json
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from ssd_megatron.parallel.device import detect_hardware
from ssd_megatron.parallel.topology import Topology
from ssd_megatron.parallel.zero import KINDS
from ssd_megatron.training import checkpoint_files as files
from ssd_megatron.training.checkpoint_tools import find_checkpoint
from tests.checkpoints import assert_written_once, model_by_identity
from tests.curves.corpus import write_corpus
from tests.layouts import Layout, oracle_config, run_layout
from tests.ranks import free_port, start_process
from tests.small_run import curve, records, small_config, write_config

STEPS, SWITCHES = 12, (4, 8, 11)
PHASES = [(1, "dense"), (4, "sparse"), (8, "dense"), (11, "sparse")]
# The middle of a dense phase, the last step before a switch, the first after it, the next; then the same once more.
STOPS = (2, 3, 4, 5, 6, 7, 8, 9)

ONE, TP2, PP2, EP2, DP2 = (
    Layout(),
    Layout(tensor=2),
    Layout(pipeline=2),
    Layout(expert=2, data=2),
    Layout(data=2, micro=1),
)
TP2_EP2, TP2_PP2 = Layout(tensor=2, expert=2, data=2), Layout(tensor=2, pipeline=2)
PP2_EP2_DP4, TP2_PP2_DP2 = Layout(pipeline=2, expert=2, data=4, micro=1), Layout(tensor=2, pipeline=2, data=2)
PAIRS = {
    "EP2 to TP2": (EP2, TP2),
    "PP2 to DP2": (PP2, DP2),
    "1 to 8 by PP2 x EP2": (ONE, PP2_EP2_DP4),
    "1 to 8 by TP2 x PP2": (ONE, TP2_PP2_DP2),
    "8 to 1 from PP2 x EP2": (PP2_EP2_DP4, ONE),
    "8 to 1 from TP2 x PP2": (TP2_PP2_DP2, ONE),
    "TP2 x PP2 to EP2": (TP2_PP2, EP2),
    "ZeRO 1 to 2": (DP2, Layout(data=2, stage=2)),
    "TP2 x EP2 to PP2": (TP2_EP2, PP2),
}

Whole = Callable[..., Path]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """Runs that were not stopped, by layout and settings, each made once: with a checkpoint of every step."""
    made: dict[str, Path] = {}

    def run(layout: Layout, **settings: Any) -> Path:
        name = f"{layout} {settings}"
        if name not in made:
            folder = tmp_path_factory.mktemp("whole")
            made[name] = run_layout(folder, layout, config_of(folder, **settings))
        return made[name]

    return run


def config_of(folder: Path, *, bf16: bool = False, dropout: float = 0.0, async_save: bool = False) -> dict[str, Any]:
    config = oracle_config(folder, PHASES, STEPS)
    config["bf16"] = {"enabled": bf16}
    config["ssd_megatron"]["model"]["dropout"] = dropout
    config["ssd_megatron"]["checkpoint"] = {"interval": 1, "keep_last": None, "async_save": async_save}
    return config


def resumed(run_dir: Path, stop: int, layout: Layout, folder: Path) -> Path:
    """What becomes of a run that was stopped after a step, on a layout: its run folder."""
    (folder / "run" / "checkpoints").mkdir(parents=True)
    shutil.copy(run_dir / "metrics.jsonl", folder / "run")
    name = files.folder_name(stop)
    shutil.copytree(run_dir / "checkpoints" / name, folder / "run" / "checkpoints" / name)
    config = json.loads((run_dir / "config.json").read_text())
    for key in ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "zero_optimization"):
        del config[key]
    return run_layout(folder, layout, config)


def compare(run_dir: Path, whole_dir: Path, stop: int) -> None:
    """Losses and gradient norms to rounding; after a further switch a token may find experts that score alike to the
    last bit."""
    steps, expected = curve(run_dir), curve(whole_dir)
    assert [step for step, _, _ in steps] == list(range(1, STEPS + 1))
    assert [r["step"] for r in records(run_dir, "resume")][-1] == stop
    further = next(switch for switch in (*SWITCHES, STEPS + 1) if switch > stop)
    for (step, loss, norm), (_, expected_loss, expected_norm) in zip(steps, expected, strict=True):
        bound = 1e-5 if step < further else 1e-4
        assert loss == pytest.approx(expected_loss, rel=bound), step
        assert norm == pytest.approx(expected_norm, rel=bound), step
    for kind in ("switch", "eval"):
        for mine, theirs in zip(records(run_dir, kind), records(whole_dir, kind), strict=True):
            assert mine.get("top_k") == theirs.get("top_k")
            assert mine["loss_sparse"] == pytest.approx(theirs["loss_sparse"], rel=1e-4)
    out = run_dir.with_suffix(".safetensors")
    for kind in KINDS:
        mine, theirs = (model_by_identity(find_checkpoint(folder), out, kind) for folder in (run_dir, whole_dir))
        assert mine.keys() == theirs.keys()
        for name, expected in theirs.items():
            assert torch.dist(mine[name], expected) <= 1e-4 * expected.norm(), (kind, name)


@pytest.mark.layouts
@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
def test_a_run_goes_on_on_another_layout(whole: Whole, tmp_path: Path, pair: tuple[Layout, Layout], stop: int) -> None:
    source, target = pair
    run_dir = resumed(whole(source), stop, target, tmp_path)
    compare(run_dir, whole(source), stop)
    for folder, layout in ((whole(source), source), (run_dir, target)):
        assert_written_once(find_checkpoint(folder), layout.ranks)


EXACT = {"TP2": TP2, "PP2": PP2, "EP2": EP2, "TP2 x PP2": TP2_PP2}


def assert_bit_by_bit(whole_dir: Path, layout: Layout, stop: int, folder: Path) -> None:
    run_dir = resumed(whole_dir, stop, layout, folder)
    assert curve(run_dir) == curve(whole_dir)
    evaluated = [[r["loss_sparse"] for r in records(d, "eval")] for d in (run_dir, whole_dir)]
    assert evaluated[0] == evaluated[1]


@pytest.mark.layouts
@pytest.mark.parametrize("stop", (2, 3, 5, 7, 9))
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("layout", EXACT.values(), ids=EXACT)
def test_the_same_layout_goes_on_bit_by_bit(
    whole: Whole, tmp_path: Path, layout: Layout, bf16: bool, stop: int
) -> None:
    assert_bit_by_bit(whole(layout, bf16=bf16, dropout=0.2), layout, stop, tmp_path)


@pytest.mark.parametrize(("layout", "bf16"), [(TP2, True), (PP2, False)], ids=["TP2 bf16", "PP2 fp32"])
def test_two_ranks_go_on_bit_by_bit(whole: Whole, tmp_path: Path, layout: Layout, bf16: bool) -> None:
    assert_bit_by_bit(whole(layout, bf16=bf16, dropout=0.2), layout, 5, tmp_path)


@pytest.mark.skipif(not detect_hardware().fp16, reason="this CPU does not compute in fp16")
@pytest.mark.parametrize("layout", [ONE, TP2, PP2], ids=["1 process", "TP2", "PP2"])
def test_the_loss_scale_goes_on_where_it_was(tmp_path: Path, layout: Layout) -> None:
    """The first steps overflow and are skipped, and the scale grows again."""
    config = config_of(tmp_path, dropout=0.2)
    config["fp16"] = {"enabled": True, "initial_scale_power": 20, "hysteresis": 1, "loss_scale_window": 3}
    whole_dir = run_layout(tmp_path / "whole", layout, config)
    expected = loss_scales(whole_dir)
    scales = [scale for _, scale in expected]
    assert expected[0][0] and any(later > earlier for earlier, later in pairwise(scales)), expected
    for stop in (1, 4):
        run_dir = resumed(whole_dir, stop, layout, tmp_path / f"from {stop}")
        assert loss_scales(run_dir) == expected
        assert curve(run_dir) == curve(whole_dir)


def loss_scales(run_dir: Path) -> list[tuple[bool, float]]:
    """Whether each step was skipped, and the loss scale."""
    return [(record["skipped"], record["loss_scale"]) for record in records(run_dir, "train")]


def test_a_checkpoint_written_in_the_background_is_as_good(whole: Whole, tmp_path: Path) -> None:
    whole_dir = whole(TP2_EP2, dropout=0.2, async_save=True)
    written = files.checkpoints(whole_dir / "checkpoints")
    assert [folder.name for folder in written] == [files.folder_name(step) for step in range(STEPS, 0, -1)]
    for folder in written:
        assert_written_once(folder, TP2_EP2.ranks)
    assert_bit_by_bit(whole_dir, TP2_EP2, 6, tmp_path)


def recording_main(rank: int, world_size: int, port: int, arguments: list[str], output: Path, record: Path) -> None:
    """A rank that writes down each sample that it trains on, once for all ranks that share the batch."""
    from ssd_megatron.training import job
    from tests.small_run import _main

    batches_of = job._train_batches

    def recorded(config: Any, datasets: Any, topology: Topology, first_step: int) -> Any:
        accumulation = config.gradient_accumulation_steps
        for number, batch in enumerate(batches_of(config, datasets, topology, first_step)):
            if topology.tensor.rank == topology.pipeline.rank == 0:
                with record.open("a") as file:
                    for tokens in batch["tokens"].tolist():
                        file.write(json.dumps([first_step + number // accumulation, tokens]) + "\n")
            yield batch

    job._train_batches = recorded
    _main(rank, world_size, port, arguments, output)


def train_recorded(folder: Path, layout: Layout, config: dict[str, Any], *overrides: str) -> list[Any]:
    """Train on a layout and return the (step, tokens) of every sample trained on, sorted."""
    record = folder / f"{len(list(folder.glob('*.record')))}.record"
    path = write_config(layout.apply(config), folder / "run.json")
    port, output = free_port(), folder / "out.log"
    arguments = ["--ds_config", str(path), *(word for item in overrides for word in ("--set", item))]
    processes = [
        start_process(recording_main, rank, layout.ranks, port, arguments, output.with_suffix(f".{rank}"), record)
        for rank in range(layout.ranks)
    ]
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * layout.ranks, output.with_suffix(".0").read_text()
    return sorted(json.loads(line) for line in record.read_text().splitlines())


def test_a_run_that_moves_through_layouts_reads_every_sample_once(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    config["ssd_megatron"]["run_dir"] = str(tmp_path / "whole")
    expected = train_recorded(tmp_path, ONE, config)
    assert len(expected) == STEPS * config["train_batch_size"]
    assert len({str(tokens) for _, tokens in expected}) == len(expected)
    config["ssd_megatron"]["run_dir"] = str(tmp_path / "parts")
    seen, stops = [], {2: ONE, 3: TP2_EP2, 5: PP2, 8: Layout(data=4, stage=2), STEPS: TP2_PP2}
    for stop, layout in stops.items():
        overrides = [f"ssd_megatron.training.stop_after_step={stop}"] if stop < STEPS else []
        seen += train_recorded(tmp_path, layout, config, *overrides)
        assert_written_once(find_checkpoint(tmp_path / "parts"), layout.ranks)
    assert sorted(seen) == expected
    compare(tmp_path / "parts", tmp_path / "whole", stop=8)
    assert [r["step"] for r in records(tmp_path / "parts", "resume")] == [2, 3, 5, 8]


def test_what_the_coordinator_remembers_does_not_depend_on_the_layout(tmp_path: Path) -> None:
    """Checks compare what neurons and tokens did at the last check, which may have been made on another layout."""
    config = small_config(write_corpus(tmp_path), tmp_path / "run")
    config["ssd_megatron"]["model"] |= {"dropout": 0.0, "vocab_size": 128}
    config["ssd_megatron"]["ssd"] = {
        "backend": "torch",
        "num_experts": 8,
        "top_k": 2,
        "check_interval": 2,
        "stable_checks": 2,
        "similarity_threshold": 0.05,
        "sparse_phase_fraction": 0.25,
        "min_dense_steps": 2,
    }
    whole_dir = run_layout(tmp_path / "whole", ONE, config)
    for stop, layout in ((3, ONE), (5, Layout(data=4, micro=1)), (16, Layout(tensor=2, data=2, micro=4))):
        parts_dir = run_layout(tmp_path / "parts", layout, config, f"ssd_megatron.training.stop_after_step={stop}")
    checks, expected = records(parts_dir, "check"), records(whole_dir, "check")
    assert len(checks) == 8 and any(check["overlap"] is not None for check in checks)
    for mine, theirs in zip(checks, expected, strict=True):
        for name in ("similarity", "overlap", "stable"):
            assert mine[name] == (None if theirs[name] is None else pytest.approx(theirs[name], abs=0.01))
    switches = [[(r["step"], r["to"], r["top_k"]) for r in records(d, "switch")] for d in (parts_dir, whole_dir)]
    assert switches[0] == switches[1] and len(switches[0]) > 0
    ends = [files.read_index(find_checkpoint(d)).values for d in (parts_dir, whole_dir)]
    for name in ("adam_steps", "learning_rates", "lr_scheduler", "counters"):
        assert ends[0][name] == pytest.approx(ends[1][name])
    mine, theirs = (end["coordinator"] for end in ends)
    assert mine["loss_watch"]["level"] == pytest.approx(theirs["loss_watch"]["level"], rel=1e-4)
    assert mine["loss_watch"]["losses"] == pytest.approx(theirs["loss_watch"]["losses"], rel=1e-4)
    assert mine["schedule"] == theirs["schedule"] and mine["top_k"] == theirs["top_k"]
