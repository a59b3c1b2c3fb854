"""Fixtures that several folders share."""

import sysconfig
from pathlib import Path

import pytest

from ssd_megatron.data.tokenizers import train_sentencepiece
from tests.small_run import Corpus, make_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """A tokenizer of 512 tokens and a corpus of real text, made by the project's own tools."""
    return make_corpus(tmp_path_factory.mktemp("corpus"), _sources(60))


@pytest.fixture(scope="session")
def marked_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of 480 tokens, among them what BERT's and T5's objectives need."""
    path = tmp_path_factory.mktemp("marked") / "tokenizer.model"
    train_sentencepiece((source.read_text() for source in _sources(5)), path, 480, reserve=("bert", "t5"))
    return path


@pytest.fixture(scope="session")
def marked_corpus(tmp_path_factory: pytest.TempPathFactory, marked_tokenizer: Path) -> Corpus:
    return make_corpus(tmp_path_factory.mktemp("marked"), _sources(60), marked_tokenizer)


def _sources(number: int) -> list[Path]:
    return sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:number]
