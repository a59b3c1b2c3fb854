"""Small real files for the data tests: texts, tokenizers of both kinds, corpora."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from ssd_megatron.data.tokenizers import train_sentencepiece

TEXTS = [f"def function_{i}(x):\n\tif x > {i}:\n        return x + {i * 7}\n" for i in range(300)]


@pytest.fixture(scope="session")
def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizers") / "tokenizer.model"
    train_sentencepiece(TEXTS, path, 340)
    return path


@pytest.fixture(scope="session")
def hugging_face_json(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizers") / "tokenizer.json"
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["</s>", "<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.save(str(path))
    return path


@pytest.fixture
def make_corpus(tmp_path: Path) -> Callable[..., Path]:
    """Write a corpus of documents given as token ids; returns its prefix."""

    def make(name: str, documents: list[list[int]], dtype: type[np.integer] = np.uint16) -> Path:
        prefix = tmp_path / name
        builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
        for ids in documents:
            builder.add_document(np.array(ids, dtype=dtype), [len(ids)])
        builder.finalize(f"{prefix}.idx")
        return prefix

    return make
