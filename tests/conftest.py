"""Fixtures that several folders share."""

import sysconfig
from pathlib import Path

import pytest

from ssd_megatron.data.tokenizers import train_sentencepiece
from tests.small_run import Corpus, make_corpus

# The files that take longest, in that order: first, so that what runs at the end, a few files at a time, is short.
LONGEST = (
    "training/test_layouts.py",
    "moefication/test_tool.py",
    "ffn/test_triton.py",
    "docs/test_commands.py",
    "inference/test_place.py",
    "training/test_stop.py",
    "model/test_compiled.py",
    "training/test_resume.py",
    "examples/test_selfcheck.py",
    "training/test_resume_layouts.py",
    "moefication/test_classification.py",
    "classification/test_finetune.py",
    "switching/test_switch.py",
    "planning/test_tool.py",
    "training/test_replicas.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST)}
    assert all(path.exists() for path in places)
    items.sort(key=lambda item: places.get(item.path, len(LONGEST)))


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
