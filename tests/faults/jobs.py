"""Jobs that faults strike: a small model, four switches and six checkpoints in twelve steps, on any kind of layout."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssd_megatron.training import checkpoint_files as files
from tests.curves.corpus import write_corpus
from tests.layouts import Layout
from tests.small_run import Ranks, small_config, train, write_config

LAYOUTS = {
    "DP2": Layout(data=2),
    "TP2": Layout(tensor=2),
    "PP2": Layout(pipeline=2),
    "EP2": Layout(expert=2, data=2),
    "TP2xPP2": Layout(tensor=2, pipeline=2),
    "TP2xEP2": Layout(tensor=2, expert=2, data=2),
}
STEPS, INTERVAL = 12, 2
PHASES = [
    {"start_step": step, "mode": mode}
    for step, mode in ((1, "dense"), (4, "sparse"), (7, "dense"), (9, "sparse"), (11, "dense"))
]
# Records of metrics.jsonl that are the same in every run, without what depends on the clock.
KINDS = ("train", "eval", "check", "switch", "load")
TIMED = ("seconds", "tokens_per_second", "peak_memory")


@dataclass(frozen=True)
class Job:
    """A run in a folder of its own, whether it was started before or not."""

    folder: Path
    layout: Layout

    @property
    def config(self) -> Path:
        return self.folder / "run.json"

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"

    @property
    def checkpoints(self) -> Path:
        return self.run_dir / "checkpoints"

    def start(self, *overrides: str, **how: Any) -> Ranks:
        return Ranks(self.config, *overrides, world_size=self.layout.ranks, **how)

    def finish(self, *overrides: str) -> str:
        """Train to the end, which must be good. Returns what rank 0 printed."""
        return train(self.config, *overrides, world_size=self.layout.ranks)

    def newest(self) -> int:
        """Step of the newest complete checkpoint, 0 if there is none."""
        found = files.checkpoints(self.checkpoints)
        return int(found[0].name.removeprefix(files.FOLDER)) if found else 0

    def trained_step(self) -> int:
        """The last step in metrics.jsonl, where its last line may be torn."""
        path = self.run_dir / "metrics.jsonl"
        if not path.exists():
            return 0
        lines = path.read_bytes().rpartition(b"\n")[0].splitlines()
        return max((record["step"] for record in map(json.loads, lines) if record["kind"] == "train"), default=0)


def make_job(folder: Path, layout: Layout, *, timeout: int = 60, async_save: bool = False) -> Job:
    """Write corpus and configuration into a new folder."""
    folder.mkdir(parents=True)
    config = small_config(write_corpus(folder), folder / "run")
    section = config["ssd_megatron"]
    section["ssd"] |= {"phases": PHASES}
    section["training"] = {"train_steps": STEPS, "eval_interval": 4, "eval_steps": 1}
    section["checkpoint"] = {"interval": INTERVAL, "keep_last": 2, "async_save": async_save}
    section["logging"]["log_interval"] = 1
    config = layout.apply(config)
    config["ssd_megatron"]["parallel"]["timeout_seconds"] = timeout
    write_config(config, folder / "run.json")
    return Job(folder, layout)


def story(job: Job) -> list[dict[str, Any]]:
    """Everything that metrics.jsonl says of the training, in order, to the last bit."""
    records = map(json.loads, (job.run_dir / "metrics.jsonl").read_text().splitlines())
    return [
        {name: value for name, value in record.items() if not name.startswith(TIMED)}
        for record in records
        if record["kind"] in KINDS
    ]


def index_of_last(job: Job) -> dict[str, Any]:
    """index.json of the last step's checkpoint, with checksums of all files: equal for equal states."""
    index: dict[str, Any] = json.loads((job.checkpoints / files.folder_name(STEPS) / files.INDEX).read_text())
    del index["values"]["identity"], index["sha256"]  # paths, and a checksum that covers them
    return index


def differences(mine: Any, expected: Any, path: str = "") -> Iterator[str]:
    """Where two JSON values differ."""
    if isinstance(mine, dict) and isinstance(expected, dict):
        for name in sorted(mine.keys() | expected.keys()):
            yield from differences(mine.get(name), expected.get(name), f"{path}.{name}")
    elif isinstance(mine, list) and isinstance(expected, list) and len(mine) == len(expected):
        for i, (a, b) in enumerate(zip(mine, expected, strict=True)):
            yield from differences(a, b, f"{path}[{i}]")
    elif mine != expected:
        yield f"{path} is {mine}, not {expected}"


def assert_whole(job: Job, step: int) -> None:
    """The checkpoint of `step` is the newest one, and every file of it is what was written."""
    assert job.newest() == step
    folder = job.checkpoints / files.folder_name(step)
    assert files.damages(folder, files.read_index(folder), 0, 1) == []


def assert_same_training(job: Job, undisturbed: Job) -> None:
    """No step is missing or there twice, and everything is what it was without a fault, the last state too."""
    mine, expected = story(job), story(undisturbed)
    steps = [record["step"] for record in mine if record["kind"] == "train"]
    assert steps == list(range(1, STEPS + 1)), f"metrics.jsonl has the steps {steps}"
    changed = [*differences(mine, expected, "metrics"), *differences(index_of_last(job), index_of_last(undisturbed))]
    assert not changed, f"{len(changed)} differences: {'; '.join(changed[:3])}"


def assert_one_error(ranks: Ranks, *said: str, rank: int = 0) -> None:
    """A rank said why it ended, once, in one line, and without a traceback."""
    output = ranks.output(rank)
    errors = [line for line in output.splitlines() if "error: " in line]
    assert len(errors) == 1 and "Traceback" not in output, output
    for text in said:
        assert text in errors[0], errors[0]
