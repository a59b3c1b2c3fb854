"""Fixtures that several folders share."""

import sysconfig
from pathlib import Path

import pytest

from tests.small_run import Corpus, make_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """A tokenizer of 512 tokens and a corpus of real text, made by the project's own tools."""
    sources = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:60]
    return make_corpus(tmp_path_factory.mktemp("corpus"), sources)
