"""Files that several tests read."""

from pathlib import Path

import pytest

from tests.classification.helpers import write_task, write_tokenizer


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


@pytest.fixture(scope="session")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 examples of two classes, of several lengths."""
    return write_task(tmp_path_factory.mktemp("task") / "train.tsv", 24)
