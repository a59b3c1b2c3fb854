"""A corpus that is the same on every machine: short documents of a language in which each token has four successors.

A feed-forward network has something to learn here (which successors), and few steps show it.
"""

import json
import random
from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from tests.small_run import Corpus

WORDS, END = 120, 120  # token ids of words are 0..119
MARKERS = {"[MASK]": 121, "[CLS]": 122, "[SEP]": 123}
CHANCES = (0.7, 0.9, 0.97, 1.0)  # cumulative, of the four successors


def write_corpus(folder: Path, documents: int = 1000) -> Corpus:
    """Write corpus.bin, corpus.idx and a Hugging Face tokenizer.json; documents have 4 to 40 tokens and an end."""
    # random() alone gives the same numbers in every version of Python.
    uniform = random.Random(1).random
    successors = [[int(uniform() * WORDS) for _ in CHANCES] for _ in range(WORDS)]
    builder = IndexedDatasetBuilder(str(folder / "corpus.bin"), dtype=np.uint16)
    for _ in range(documents):
        tokens = [int(uniform() * WORDS)]
        for _ in range(4 + int(uniform() * 37)):
            chance = uniform()
            tokens.append(successors[tokens[-1]][sum(chance > bound for bound in CHANCES)])
        builder.add_document(np.array([*tokens, END], dtype=np.uint16), [len(tokens) + 1])
    builder.finalize(str(folder / "corpus.idx"))
    vocabulary = {**{f"w{word}": word for word in range(WORDS)}, "</s>": END, **MARKERS}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "w0"}
    parts = dict.fromkeys(("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder"))
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [], **parts, "model": model}))
    return Corpus(folder / "corpus", folder / "tokenizer.json")
