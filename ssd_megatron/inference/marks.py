"""Tokenizers that know marks in texts, such as [MASK] or <extra_id_0>, which stand for text that a model is to give."""

import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path

from ssd_megatron.config.model import ModelConfig
from ssd_megatron.data.masking import MASK_TOKENS, marker_ids
from ssd_megatron.data.spans import SENTINEL, free_sentinels, named_sentinels
from ssd_megatron.data.tokenizers import Tokenizer
from ssd_megatron.errors import DataError


class MarkedTokenizer:
    """Another tokenizer, but for marks: they are single tokens when encoded, and show when decoded.

    A word begins with its space, so that the spaces before a mark belong to what it stands for.

    Attributes:
        names, ids: of the marks.
        vocab_size: all ids are below it.
        eod: id of the token that ends a document.
    """

    def __init__(
        self, tokenizer: Tokenizer, marks: Mapping[str, int], before: Sequence[int] = (), after: Sequence[int] = ()
    ) -> None:
        self._tokenizer, self._before, self._after = tokenizer, list(before), list(after)
        self.names, self.ids = list(marks), list(marks.values())
        self.eod, self.vocab_size = tokenizer.eod, max(tokenizer.vocab_size, *(token + 1 for token in self.ids))
        self._marks = re.compile(" *(" + "|".join(map(re.escape, marks)) + ")")
        self._by_name, self._by_id = dict(marks), {token: name for name, token in marks.items()}

    def encode(self, text: str) -> list[int]:
        """Ids of a text with the tokens around it that samples of training have."""
        ids = list(self._before)
        for place, part in enumerate(self._marks.split(text)):  # text and marks take turns
            ids += [self._by_name[part]] if place % 2 else self._tokenizer.encode(part)
        return ids + self._after

    def decode(self, ids: list[int]) -> str:
        parts = []
        for name, run in groupby(ids, key=self._by_id.get):
            tokens = list(run)
            parts.append(self._tokenizer.decode(tokens) if name is None else name * len(tokens))
        return "".join(parts)


def bert_tokenizer(tokenizer: Tokenizer, path: Path) -> MarkedTokenizer:
    """With the mask, between the markers of a sample.

    Raises:
        DataError: the tokenizer has no such tokens.
    """
    ids = marker_ids(tokenizer, path)
    name = next(name for name in MASK_TOKENS if tokenizer.find(name) == ids["mask_id"])
    return MarkedTokenizer(tokenizer, {name: ids["mask_id"]}, [ids["cls_id"]], [ids["sep_id"]])


def t5_tokenizer(tokenizer: Tokenizer, path: Path, model: ModelConfig) -> MarkedTokenizer:
    """With the sentinels that stand for spans, and the end of document.

    Raises:
        DataError: there are none.
    """
    ids = named_sentinels(tokenizer) or free_sentinels(tokenizer, model.vocab_size)
    if not ids:
        raise DataError(f"tokenizer {path} has no {SENTINEL.format(0)}, and model.vocab_size leaves no id for it")
    marks = {SENTINEL.format(number): token for number, token in enumerate(ids)}
    return MarkedTokenizer(tokenizer, marks, after=[tokenizer.eod])
