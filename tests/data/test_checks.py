import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from ssd_megatron.config.schema import DataConfig
from ssd_megatron.data.checks import check_data
from ssd_megatron.data.documents import Document
from ssd_megatron.data.preprocess import preprocess
from ssd_megatron.data.tokenizers import load_tokenizer
from ssd_megatron.errors import DataError
from tests.data.conftest import TEXTS

MakeCorpus = Callable[..., Path]

SIZES = {"train_steps": 3, "eval_steps": 2, "global_batch_size": 4, "text_length": 8, "model_vocab_size": 340}


def check(tmp_path: Path, tokenizer: Path, *paths: str | float | Path, data: Any = None, **sizes: int) -> list[str]:
    """Check data with small sizes; returns what was reported."""
    entries = tuple(str(entry) if isinstance(entry, Path) else entry for entry in paths)
    reports: list[str] = []
    check_data(
        data or DataConfig(paths=entries, split="80,10,10", tokenizer=tokenizer),
        tokenizer=load_tokenizer(tokenizer),
        cache_dir=tmp_path / "cache",
        report=reports.append,
        at_work=lambda: None,
        **{**SIZES, **sizes},
    )
    return reports


def corpus_of(make_corpus: MakeCorpus, name: str, documents: int) -> Path:
    """Documents of 9 tokens each, so that n of them hold (9 n - 1) // 8 samples of 8 tokens."""
    return make_corpus(name, [[5] * 8 + [2]] * documents)


def test_enough_data_needs_no_word(make_corpus: MakeCorpus, tmp_path: Path, sentencepiece_model: Path) -> None:
    assert check(tmp_path, sentencepiece_model, corpus_of(make_corpus, "c", 80), test_steps=1) == []


def test_a_tokenizer_larger_than_the_model(make_corpus: MakeCorpus, tmp_path: Path, sentencepiece_model: Path) -> None:
    prefix = corpus_of(make_corpus, "c", 80)
    with pytest.raises(DataError) as error:
        check(tmp_path, sentencepiece_model, prefix, model_vocab_size=339)
    assert str(error.value) == (
        f"tokenizer {sentencepiece_model} has 340 tokens, more than model.vocab_size (339): give the one that made the "
        "model's training data, or, for a new model, set model.vocab_size to 340 or more"
    )


def test_a_corpus_of_another_tokenizer(tmp_path: Path, sentencepiece_model: Path, hugging_face_json: Path) -> None:
    preprocess(
        [Document(text, 1) for text in TEXTS],
        tokenizer_path=hugging_face_json,
        prefix=tmp_path / "c",
        total_bytes=1,
        workers=1,
        console=Console(file=io.StringIO()),
    )
    assert check(tmp_path, hugging_face_json, tmp_path / "c") == []
    with pytest.raises(
        DataError, match=r"c was made with the tokenizer .*\.json \(320 tokens\), not with tokenizer .*\.model"
    ):
        check(tmp_path, sentencepiece_model, tmp_path / "c")


@pytest.mark.parametrize(("token", "ids"), [(340, "2 to 340"), (-1, "-1 to 5")])
def test_token_ids_out_of_range(
    make_corpus: MakeCorpus, tmp_path: Path, sentencepiece_model: Path, token: int, ids: str
) -> None:
    prefix = make_corpus("c", [[5, 5, 2], [5, token, 2]], dtype=np.int32)
    with pytest.raises(DataError, match=rf"c\.bin has token ids from {ids}, but the tokenizer has only .* 0 to 339"):
        check(tmp_path, sentencepiece_model, prefix)


def test_missing_data_is_found_in_any_path(make_corpus: MakeCorpus, tmp_path: Path, sentencepiece_model: Path) -> None:
    prefix = corpus_of(make_corpus, "c", 80)
    with pytest.raises(DataError, match=r"nothing\.bin and .*nothing\.idx not found"):
        check(tmp_path, sentencepiece_model, 0.5, prefix, 0.5, tmp_path / "nothing")


def test_too_few_validation_samples(make_corpus: MakeCorpus, tmp_path: Path, sentencepiece_model: Path) -> None:
    prefix = corpus_of(make_corpus, "c", 60)
    with pytest.raises(DataError) as error:
        check(tmp_path, sentencepiece_model, prefix)
    assert str(error.value) == (
        f"data.paths: {prefix} has 6 validation samples of 8 tokens (54 tokens in 6 documents); validation needs "
        "training.eval_steps 2 x train_batch_size 4 = 8: lower training.eval_steps or train_batch_size, "
        "give it a larger share in data.split, or add data"
    )
    assert check(tmp_path, sentencepiece_model, prefix, global_batch_size=3) == []


def test_too_few_validation_samples_in_a_blend(
    make_corpus: MakeCorpus, tmp_path: Path, sentencepiece_model: Path
) -> None:
    large, small = corpus_of(make_corpus, "large", 400), corpus_of(make_corpus, "small", 20)
    assert check(tmp_path, sentencepiece_model, 3.0, large, 1.0, small) == []
    with pytest.raises(DataError, match=r"small has 2 validation .* = 8, 4 of them from here \(weight 0\.5\): lower"):
        check(tmp_path, sentencepiece_model, 1.0, large, 1.0, small)
    assert check(tmp_path, sentencepiece_model, large, small) == []  # in proportion to their tokens


def test_too_few_test_samples(make_corpus: MakeCorpus, tmp_path: Path, sentencepiece_model: Path) -> None:
    prefix = corpus_of(make_corpus, "c", 80)
    with pytest.raises(
        DataError, match=r"has 8 test samples of 8 tokens .* needs test steps 3 x train_batch_size 4 = 12"
    ):
        check(tmp_path, sentencepiece_model, prefix, test_steps=3)


def test_a_split_without_documents(make_corpus: MakeCorpus, tmp_path: Path, sentencepiece_model: Path) -> None:
    with pytest.raises(DataError, match=r"data\.paths has no documents for test: lower .* data\.split, or add data"):
        check(tmp_path, sentencepiece_model, corpus_of(make_corpus, "c", 4), eval_steps=0, test_steps=1)


def test_a_split_of_nothing(make_corpus: MakeCorpus, tmp_path: Path, sentencepiece_model: Path) -> None:
    prefix = str(corpus_of(make_corpus, "c", 80))
    data = DataConfig(paths=(prefix,), split="9,1,0", tokenizer=sentencepiece_model)
    with pytest.raises(
        DataError, match=r'^test needs test steps 1 x .* = 4 samples, but data\.split \("9,1,0"\) leaves'
    ):
        check(tmp_path, sentencepiece_model, data=data, test_steps=1)
    data = DataConfig(train_paths=(prefix,), tokenizer=sentencepiece_model)
    with pytest.raises(DataError, match=r"= 8 samples, but no paths are given for it"):
        check(tmp_path, sentencepiece_model, data=data)
    assert check(tmp_path, sentencepiece_model, data=data, eval_steps=0) == []


def test_separate_paths(make_corpus: MakeCorpus, tmp_path: Path, sentencepiece_model: Path) -> None:
    train, valid = corpus_of(make_corpus, "t", 11), corpus_of(make_corpus, "v", 7)
    data = DataConfig(train_paths=(str(train),), valid_paths=(str(valid),), tokenizer=sentencepiece_model)
    with pytest.raises(
        DataError, match=r"data\.valid_paths: .*/v has 7 validation .*: lower .* train_batch_size, or add"
    ):
        check(tmp_path, sentencepiece_model, data=data)
    assert check(tmp_path, sentencepiece_model, data=data, eval_steps=1) == []


def test_repeated_training_documents_are_reported(
    make_corpus: MakeCorpus, tmp_path: Path, sentencepiece_model: Path
) -> None:
    prefix = corpus_of(make_corpus, "c", 80)
    assert check(tmp_path, sentencepiece_model, prefix, train_steps=45) == [
        f"data.paths: {prefix} has 71 training samples of 8 tokens (576 tokens in 64 documents); training needs "
        "training.train_steps 45 x train_batch_size 4 = 180: its documents are repeated, 2.5 epochs"
    ]


def test_training_needs_one_sample(make_corpus: MakeCorpus, tmp_path: Path, sentencepiece_model: Path) -> None:
    prefix = make_corpus("c", [[5]] * 8 + [[5] * 100] * 2)
    with pytest.raises(
        DataError, match=r"c has 0 training samples of 8 tokens \(8 tokens in 8 documents\); training needs"
    ):
        check(tmp_path, sentencepiece_model, prefix)


BAD_ENTRIES: list[tuple[Any, ...]] = [
    (0.5, "a", 0.5),
    (0.5, "a", "b"),
    (-1.0, "a"),
    (0.0, "a", 1.0, "b"),
    ("a", 1.0),
    (),
]


@pytest.mark.parametrize("entries", BAD_ENTRIES)
def test_malformed_blends(tmp_path: Path, sentencepiece_model: Path, entries: tuple[Any, ...]) -> None:
    data = DataConfig.model_construct(paths=entries, tokenizer=sentencepiece_model)
    with pytest.raises(DataError, match=r"data\.paths \(\[.*\]\) must be paths, or positive weights and paths in turn"):
        check(tmp_path, sentencepiece_model, data=data)


def test_paths_are_given_once(tmp_path: Path, sentencepiece_model: Path) -> None:
    choices: list[dict[str, Any]] = [{}, {"paths": ("a",), "train_paths": ("b",)}]
    for fields in choices:
        data = DataConfig.model_construct(tokenizer=sentencepiece_model, **fields)
        with pytest.raises(DataError, match=r"give either data\.paths or data\.train_paths"):
            check(tmp_path, sentencepiece_model, data=data)


def test_a_cache_folder_that_cannot_be_made(make_corpus: MakeCorpus, tmp_path: Path, sentencepiece_model: Path) -> None:
    (tmp_path / "cache").write_text("a file")
    with pytest.raises(DataError, match=r"data\.cache_dir: the folder .*/cache cannot be made"):
        check(tmp_path, sentencepiece_model, corpus_of(make_corpus, "c", 80))
