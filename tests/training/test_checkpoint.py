"""Checkpoints that were damaged, belong to another run, or cannot be written: really caused, on real files."""

import errno
import io
import json
import os
import resource
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ssd_megatron.data.documents import DocumentReader, find_inputs
from ssd_megatron.data.preprocess import preprocess
from ssd_megatron.training import checkpoint_files
from tests.checkpoints import edit_index
from tests.ranks import free_port, start_process
from tests.small_run import Corpus, Ranks, curve, small_config, train, write_config


@pytest.fixture(scope="module")
def trained(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with run.json and a run of 16 steps, checkpoints after 6 and 12 steps and at the end."""
    folder = tmp_path_factory.mktemp("trained")
    config = small_config(corpus, folder / "run")
    config["ssd_megatron"]["checkpoint"] = {"interval": 6, "keep_last": None}
    train(write_config(config, folder / "run.json"))
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of that run that the test may damage: the config's path; the run lies beside it as `run`."""
    shutil.copytree(trained / "run", tmp_path / "run")
    config = json.loads((trained / "run.json").read_text())
    config["ssd_megatron"]["run_dir"] = str(tmp_path / "run")
    return write_config(config, tmp_path / "run.json")


def checkpoints(run: Path) -> list[Path]:
    return checkpoint_files.checkpoints(run.parent / "run" / "checkpoints")


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def change_a_digit(path: Path) -> None:
    text = path.read_text()
    assert '"decay": 16' in text
    path.write_text(text.replace('"decay": 16', '"decay": 96'))


def remove(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize(
    ("file", "damage", "said"),
    [
        ("rank_00000.safetensors", flip_bit, "rank_00000.safetensors does not have its checksum"),
        ("rank_00000.safetensors", truncate, "rank_00000.safetensors has"),
        ("shared.safetensors", remove, "shared.safetensors is missing"),
        ("index.json", truncate, "index.json cannot be read"),
        ("index.json", remove, "index.json cannot be read"),
        ("index.json", change_a_digit, "index.json does not have its checksum"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(
    run: Path, trained: Path, file: str, damage: Any, said: str
) -> None:
    damage(checkpoints(run)[0] / file)
    output = train(run)
    assert "step_00000016 is damaged" in output and said in output
    assert "resuming after step 12 of 16" in output
    assert curve(run.parent / "run") == curve(trained / "run")


def test_a_copy_with_a_name_of_its_own_is_neither_newest_nor_old(tmp_path: Path) -> None:
    for name in ("step_00000004", "step_00000008", "step_00000012", "step_00000004_best", "step_x"):
        (tmp_path / name).mkdir()
    assert names(tmp_path) == ["step_00000012", "step_00000008", "step_00000004"]
    checkpoint_files.remove_old(tmp_path, 12, keep_last=1)
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["step_00000004_best", "step_00000012", "step_x"]


def test_an_old_checkpoint_that_cannot_be_deleted_ends_nothing(corpus: Corpus, tmp_path: Path) -> None:
    config = small_config(corpus, tmp_path / "run")
    config["ssd_megatron"]["checkpoint"] = {"interval": 4, "keep_last": 1}
    ranks = Ranks(write_config(config, tmp_path / "run.json"), prepare=Undeletable(8))
    assert ranks.wait() == [0], ranks.output()
    assert "old checkpoints in" in ranks.output() and "could not be deleted: [Errno 39]" in ranks.output()
    assert names(tmp_path / "run" / "checkpoints") == ["step_00000016"]


def names(root: Path) -> list[str]:
    return [folder.name for folder in checkpoint_files.checkpoints(root)]


@dataclass(frozen=True)
class Undeletable:
    """While the checkpoint of a step is the newest, nothing can be deleted: somebody has a file of an old one open."""

    step: int

    def __call__(self, rank: int) -> None:
        rmtree = shutil.rmtree

        def refused(path: Path, *args: Any, **kwargs: Any) -> None:
            if path.name.startswith("step_") and names(path.parent)[0] == f"step_{self.step:08d}":
                raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(path))
            rmtree(path, *args, **kwargs)

        shutil.rmtree = refused


def test_no_whole_checkpoint_ends_the_run(run: Path) -> None:
    for folder in checkpoints(run):
        flip_bit(folder / "rank_00000.safetensors")
    ranks = Ranks(run)
    assert ranks.wait() == [1]
    assert "is whole: move the folder away to start anew" in ranks.output()


def test_another_format_is_refused_by_its_number(run: Path) -> None:
    for folder in checkpoints(run):
        edit_index(folder, lambda index: index.update(format_version=99))
    ranks = Ranks(run)
    assert ranks.wait() == [1]
    assert "has format 99; this version reads format 2" in ranks.output()


def less_and_more(index: dict[str, Any]) -> None:
    del index["shapes"]["head.norm.bias"]
    index["shapes"] |= {"head.scale": [2], "head.norm.weight": [4, 8]}
    for kind in ("master", "exp_avg", "exp_avg_sq"):
        del index["pieces"][f"head.norm.bias|{kind}"]
        index["pieces"][f"head.scale|{kind}"] = [{"file": "rank_00000.safetensors", "start": 0, "numel": 2}]


def test_missing_and_unused_tensors_are_errors_with_their_names(run: Path) -> None:
    for folder in checkpoints(run):
        edit_index(folder, less_and_more)
    ranks = Ranks(run)
    assert ranks.wait() == [1]
    assert (
        "step_00000016 does not hold the tensors of this model; missing: head.norm.bias; unused: head.scale; "
        "of another shape: head.norm.weight ([4, 8] instead of [32])"
    ) in ranks.output()


def test_an_index_with_a_gap_is_damage(run: Path) -> None:
    edit_index(checkpoints(run)[0], lambda index: index["pieces"]["head.norm.bias|exp_avg"][0].update(numel=30))
    output = train(run)
    assert "is damaged (index.json: head.norm.bias|exp_avg: elements 30 to 31 are in no file)" in output
    assert "resuming after step 12 of 16" in output


def test_other_settings_are_refused_with_field_and_both_values(run: Path) -> None:
    ranks = Ranks(run, "ssd_megatron.model.ffn_hidden_size=128", "optimizer.params.lr=0.02")
    assert ranks.wait() == [2]
    assert "model.ffn_hidden_size was 64 and is 128; optimizer.params.lr was 0.01 and is 0.02" in ranks.output()


def test_another_corpus_behind_the_same_path_is_refused(corpus: Corpus, tmp_path: Path) -> None:
    def write_corpus(sources: list[Path]) -> None:
        reader = DocumentReader(find_inputs(sources, "text"))
        preprocess(
            reader,
            tokenizer_path=corpus.tokenizer,
            prefix=tmp_path / "mine",
            total_bytes=reader.total_bytes,
            workers=1,
            overwrite=True,
            console=Console(file=io.StringIO()),
        )

    sources = sorted(Path(json.__file__).parent.glob("*.py")) + sorted(Path(__file__).parent.glob("*.py"))
    write_corpus(sources)
    config = write_config(
        small_config(Corpus(tmp_path / "mine", corpus.tokenizer), tmp_path / "run"), tmp_path / "a.json"
    )
    train(config, "ssd_megatron.training.stop_after_step=2")
    write_corpus(sources[1:])
    ranks = Ranks(config)
    assert ranks.wait() == [2]
    assert f"bytes of {tmp_path / 'mine'}.bin was" in ranks.output()


def test_what_may_change_on_resume_does(run: Path) -> None:
    shutil.rmtree(checkpoints(run)[0])
    output = train(run, "ssd_megatron.logging.log_interval=1", "ssd_megatron.checkpoint.keep_last=1")
    assert "resuming after step 12 of 16" in output
    assert [folder.name for folder in checkpoints(run)] == ["step_00000016"]


def test_a_damaged_checkpoint_does_not_crowd_out_good_ones(run: Path) -> None:
    flip_bit(checkpoints(run)[0] / "rank_00000.safetensors")
    train(run, "ssd_megatron.checkpoint.keep_last=1", "ssd_megatron.training.stop_after_step=14")
    assert [folder.name for folder in checkpoints(run)] == ["step_00000014"]
    assert (run.parent / "run" / "checkpoints" / "damaged-step_00000016").exists()
    assert "resuming after step 14 of 16" in train(run)


def test_keep_last_keeps_the_newest(corpus: Corpus, tmp_path: Path) -> None:
    config = small_config(corpus, tmp_path / "run")
    config["ssd_megatron"]["checkpoint"] = {"interval": 2, "keep_last": 3}
    path = write_config(config, tmp_path / "run.json")
    train(path)
    assert [folder.name for folder in checkpoints(path)] == ["step_00000016", "step_00000014", "step_00000012"]


def test_what_an_interrupted_save_left_is_not_taken_and_goes_away(run: Path) -> None:
    shutil.copytree(checkpoints(run)[0], run.parent / "run" / "checkpoints" / ".tmp-step_00000099")
    shutil.rmtree(checkpoints(run)[0])
    assert "resuming after step 12 of 16" in train(run)
    assert not list((run.parent / "run" / "checkpoints").glob(".tmp*"))


def run_with_small_files(ds_config: Path, output: Path) -> None:
    """Run where no file can grow beyond 100 kB: writing a checkpoint fails as on a full disk."""
    from tests.small_run import _main

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    _main(0, 1, free_port(), ["--ds_config", str(ds_config)], output)


def test_a_save_that_fails_leaves_the_checkpoints_before_it(run: Path) -> None:
    shutil.rmtree(checkpoints(run)[0])
    output = run.with_suffix(".log")
    process = start_process(run_with_small_files, run, output)
    process.join(120)
    assert process.exitcode == 1
    assert "error: a checkpoint could not be written to" in output.read_text()
    assert "resuming after step 12 of 16" in train(run)
