"""Checkpoints as models: what is said of those whose settings are not known here."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ssd_megatron.errors import ConfigError, DataError
from ssd_megatron.training import checkpoint_files as files
from ssd_megatron.training.checkpoint_files import CheckpointError
from ssd_megatron.training.saved_model import open_model, open_tokenizer
from tests.saved_models import trained
from tests.small_run import Corpus

DATA = {"data.paths": ["corpus"], "data.split": "8,2,0", "data.tokenizer": "t.model"}
SEVERAL = {"data.train_paths": ["corpus"], "data.valid_paths": ["other"], "data.tokenizer": "t.model"}


def written_with(root: Path, settings: dict[str, Any]) -> Path:
    """A checkpoint with these settings beside its own."""
    saved = open_model(trained().write(root / "own"))
    shutil.copytree(saved.folder, files.temporary_folder(root / "other", 0))
    values = saved.index.values | {"identity": saved.index.values["identity"] | settings}
    return files.commit(root / "other", replace(saved.index, values=values))


def test_the_data_of_a_run_is_known(tmp_path: Path) -> None:
    data = open_model(written_with(tmp_path, DATA)).data
    assert data is not None and (data.split, data.tokenizer) == ("8,2,0", Path("t.model"))
    data = open_model(written_with(tmp_path / "several", SEVERAL)).data
    assert data is not None and data.valid_paths == ("other",)
    assert open_model(trained().write(tmp_path / "weights")).data is None


def test_settings_of_another_version_are_told_whoever_asks(tmp_path: Path) -> None:
    unknown = r"was made with settings that this version does not know: (?s:.*)novel"
    with pytest.raises(CheckpointError, match=unknown):
        open_model(written_with(tmp_path / "model", {"model.novel": 1}))
    saved = open_model(written_with(tmp_path / "data", DATA | {"data.novel": 1}))
    with pytest.raises(CheckpointError, match=unknown):
        _ = saved.data


def test_a_tokenizer_must_be_there_and_fit_the_model(tmp_path: Path, corpus: Corpus) -> None:
    saved = open_model(trained(vocab_size=512).write(tmp_path / "large"))
    tokenizer, path = open_tokenizer(saved, corpus.tokenizer)
    assert (tokenizer.vocab_size, path) == (512, corpus.tokenizer)
    with pytest.raises(ConfigError, match=r"names no tokenizer: give one with --tokenizer"):
        open_tokenizer(saved, None)
    moved = replace(saved, settings=replace(saved.settings, tokenizer=Path("data/own.model")))
    with pytest.raises(ConfigError, match=r"tokenizer data/own.model, which is not found .*: give its path with --tok"):
        open_tokenizer(moved, None)
    with pytest.raises(DataError, match=r"tokenizer other.model does not exist: tools/train_tokenizer.py makes one"):
        open_tokenizer(moved, Path("other.model"))
    small = open_model(trained(vocab_size=200).write(tmp_path / "small"))
    with pytest.raises(DataError, match=r"has 512 tokens, more than model.vocab_size \(200\): give the one that made"):
        open_tokenizer(small, corpus.tokenizer)
