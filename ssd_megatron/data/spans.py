"""Span corruption (T5, arXiv 1910.10683): stretches of a text are cut out and predicted, one after the other."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ssd_megatron.config.model import ModelConfig
from ssd_megatron.config.span_sizes import SpanSizes
from ssd_megatron.data.tokenizers import Tokenizer
from ssd_megatron.errors import DataError

Ids = npt.NDArray[np.int64]
SENTINEL = "<extra_id_{}>"


class SpanCorruption:
    """T5: the encoder sees the text with a sentinel for each span; the decoder, which begins with `start`, predicts
    sentinels and spans. Both end with the end of document.

    Samples have `tokens` (int64 [seq_length], always full), `decoder_tokens`, `labels` (int64) and `loss_mask`
    (float32, 0 where the targets are over), each [decoder_seq_length].
    """

    def __init__(
        self, sizes: SpanSizes, *, decoder_length: int, sentinels: Ids, start: int, eod: int, seed: int
    ) -> None:
        assert len(sentinels) >= sizes.spans and decoder_length >= sizes.targets, (sizes, decoder_length)
        self._sizes = sizes
        self._decoder_length = decoder_length
        self._sentinels = sentinels[: sizes.spans]
        self._start, self._eod = start, eod
        self._seed = seed
        self.text_length = sizes.text

    def sample(self, texts: Dataset[Mapping[str, Tensor]], count: int, index: int) -> dict[str, Tensor]:
        generator = np.random.default_rng([self._seed, index])
        inputs, targets = corrupt(texts[index]["tokens"].numpy(), self._sizes, self._sentinels, generator)
        over = np.full(self._decoder_length - len(targets), self._eod)  # the first of them is the end, and predicted
        labels = np.concatenate([targets, over])
        return {
            "tokens": torch.from_numpy(np.append(inputs, self._eod)),
            "decoder_tokens": torch.from_numpy(np.concatenate([[self._start], labels[:-1]])),
            "labels": torch.from_numpy(labels),
            "loss_mask": torch.from_numpy((np.arange(len(labels)) <= len(targets)).astype(np.float32)),
        }


def corrupt(text: Ids, sizes: SpanSizes, sentinels: Ids, generator: np.random.Generator) -> tuple[Ids, Ids]:
    """What is left of a text, with a sentinel for each span, and the spans, each after its sentinel; without ends.

    Text and spans take turns, beginning with text; every way to cut the lengths into positive parts is as likely.
    """
    inputs: list[Ids] = []
    targets: list[Ids] = []
    position = 0
    kept_lengths = random_parts(sizes.text - sizes.noise, sizes.spans, generator)
    span_lengths = random_parts(sizes.noise, sizes.spans, generator)
    for kept, span, sentinel in zip(kept_lengths, span_lengths, sentinels, strict=True):
        inputs += [text[position : position + kept], sentinel[None]]
        targets += [sentinel[None], text[position + kept : position + kept + span]]
        position += kept + span
    return np.concatenate(inputs), np.concatenate(targets)


def random_parts(total: int, parts: int, generator: np.random.Generator) -> list[int]:
    """Positive lengths that add up to `total`."""
    cuts = np.sort(generator.choice(total - 1, parts - 1, replace=False)) + 1
    lengths: list[int] = np.diff(np.concatenate([[0], cuts, [total]])).tolist()
    return lengths


def first_decoder_token(model: ModelConfig, eod: int) -> int:
    """What T5's decoder begins with: what the model says, else the token that ends a document."""
    return eod if model.decoder_start_token is None else model.decoder_start_token


def named_sentinels(tokenizer: Tokenizer) -> list[int]:
    """Ids of <extra_id_0>, <extra_id_1> ..., as many as the tokenizer has."""
    found: list[int] = []
    while (token := tokenizer.find(SENTINEL.format(len(found)))) is not None:
        found.append(token)
    return found


def free_sentinels(tokenizer: Tokenizer, vocab_size: int) -> list[int]:
    """Ids of the model's vocabulary that the tokenizer does not use, from the last one down (as in T5)."""
    return list(range(vocab_size - 1, tokenizer.vocab_size - 1, -1))


def find_sentinels(tokenizer: Tokenizer, path: Path, vocab_size: int, count: int) -> Ids:
    """Ids of `count` tokens that no text contains: those that the tokenizer names, or free ones.

    Raises:
        DataError: there are too few.
    """
    known, free = named_sentinels(tokenizer), free_sentinels(tokenizer, vocab_size)
    ids = (known if len(known) >= count else free)[:count]
    if len(ids) < count:
        raise DataError(
            f"span corruption needs {count} sentinel tokens; data.tokenizer ({path}) has {len(known)}, and "
            f"model.vocab_size ({vocab_size:,}) leaves {len(free)} free: set that to {tokenizer.vocab_size + count:,}, "
            "or make a tokenizer with tools/train_tokenizer.py --reserve t5, and the data anew"
        )
    return np.array(ids, dtype=np.int64)
