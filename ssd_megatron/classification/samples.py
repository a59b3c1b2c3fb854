"""Labelled texts as a model reads them, and batches of them without padding.

The models take full sequences only. So samples of equal length are computed together, and a batch of the optimizer is
computed in as many parts as it has lengths; an example's logits know nothing of its neighbours, and whoever observes a
network sees tokens of texts alone.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from ssd_megatron.classification.labelled import Columns, class_numbers, read_labelled
from ssd_megatron.config.model import ModelConfig
from ssd_megatron.data.masking import CLS_TOKENS, SEP_TOKENS
from ssd_megatron.data.spans import first_decoder_token
from ssd_megatron.data.tokenizers import Tokenizer, require_token
from ssd_megatron.model.families import batch_fields
from ssd_megatron.seeding import generator_for
from ssd_megatron.training.data_loader import collate, to_device

# The fields that a family's first stage takes, each [length] int64, and the number of the class, `label`; of batches
# [samples, length] and [samples].
Sample = dict[str, Tensor]
Batch = dict[str, Tensor]

PART_TOKENS = 8192  # computed together at most
POOL = 50  # batches that share their samples out by length


@dataclass(frozen=True)
class Samples:
    """A file's samples, in its order; `cut` of their texts were longer than the model reads."""

    samples: list[Sample]
    cut: int

    @property
    def majority(self) -> float:
        """Accuracy of the answer that is right most often."""
        labels = torch.stack([sample["label"] for sample in self.samples])
        return float(labels.bincount().max()) / len(labels)


class Encoder:
    """Makes samples of texts.

    Each text ends with an end token: [SEP] for BERT, which begins with [CLS], and the end of document for GPT and T5,
    whose decoder reads its first token alone. A class is read at BERT's first position, GPT's last, and T5's only one
    of the decoder. What is too long for the model is cut at the ends of the texts, of the longer one first.

    Args:
        path: of the tokenizer.
    Raises:
        DataError: the tokenizer has no class or separator token, which BERT needs.
    """

    def __init__(self, model: ModelConfig, tokenizer: Tokenizer, path: Path) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._fields = batch_fields(model).inputs
        self._start: list[int] = []
        self._end = tokenizer.eod
        if model.family == "bert":
            self._start = [require_token(tokenizer, path, "class", "bert", CLS_TOKENS)]
            self._end = require_token(tokenizer, path, "separator", "bert", SEP_TOKENS)

    def read(self, path: Path, columns: Columns, labels: Sequence[str]) -> Samples:
        """Samples of a file.

        Raises:
            DataError: see read_labelled and class_numbers.
        """
        _, texts = read_labelled(path, columns)
        numbers = class_numbers(texts, labels)
        encoded = [self.encode(text.texts) for text in texts]
        samples = [fields | {"label": torch.tensor(n)} for (fields, _), n in zip(encoded, numbers, strict=True)]
        return Samples(samples, sum(cut for _, cut in encoded))

    def encode(self, texts: Sequence[str]) -> tuple[Sample, bool]:
        """A sample without label of one text or two, and whether it was cut."""
        ids = [self._tokenizer.encode(text) for text in texts]
        lengths = fit([len(part) for part in ids], self._model.seq_length - len(self._start) - len(ids))
        tokens, kinds = list(self._start), [0] * len(self._start)
        for number, (part, length) in enumerate(zip(ids, lengths, strict=True)):
            tokens += [*part[:length], self._end]
            kinds += [min(number, max(0, self._model.num_token_types - 1))] * (length + 1)
        values = {
            "tokens": tokens,
            "position_ids": list(range(len(tokens))),
            "token_types": kinds,
            "decoder_tokens": [first_decoder_token(self._model, self._tokenizer.eod)],
        }
        return {name: torch.tensor(values[name]) for name in self._fields}, sum(lengths) < sum(map(len, ids))


def fit(lengths: Sequence[int], room: int) -> list[int]:
    """What is left of one or two lengths that must fit together: the longer one gives first."""
    if len(lengths) == 1:
        return [min(lengths[0], room)]
    first, second = lengths
    half = room // 2
    return [min(first, max(room - second, room - half)), min(second, max(room - first, half))]


def unpadded_batches(samples: Sequence[Sample], device: torch.device) -> Iterator[Batch]:
    """All samples, short ones first, in batches of equal length and of PART_TOKENS tokens at most."""
    for length, group in groupby(sorted(samples, key=_length), key=_length):
        alike, most = list(group), max(1, PART_TOKENS // length)
        for start in range(0, len(alike), most):
            yield to_device(collate(alike[start : start + most]), device)


def training_batches(samples: Sequence[Sample], size: int, seed: int, epoch: int) -> list[list[Sample]]:
    """All samples in batches of the optimizer, in an order that follows from seed and epoch.

    Of each POOL batches' worth of samples, drawn at random, neighbours in length come into one batch, so that it has
    few lengths; the order of the batches is random again.
    """
    generator = generator_for(f"{seed}/epoch {epoch}")
    drawn = [samples[number] for number in torch.randperm(len(samples), generator=generator).tolist()]
    pools = [sorted(drawn[start : start + POOL * size], key=_length) for start in range(0, len(drawn), POOL * size)]
    batches = [pool[start : start + size] for pool in pools for start in range(0, len(pool), size)]
    return [batches[number] for number in torch.randperm(len(batches), generator=generator).tolist()]


def _length(sample: Sample) -> int:
    return len(sample["tokens"])
