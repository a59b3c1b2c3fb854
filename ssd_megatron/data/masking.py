"""Masked language modelling (BERT, arXiv 1810.04805): which tokens are to be predicted, and what stands in their place.

Samples are full: a stretch of text without padding, which may cross documents (RoBERTa, arXiv 1907.11692).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ssd_megatron.config.schema import DataConfig
from ssd_megatron.data.tokenizers import Tokenizer, Words, require_token

MASK_TOKENS = ("[MASK]", "<mask>")
CLS_TOKENS = ("[CLS]", "<cls>", "<s>")
SEP_TOKENS = ("[SEP]", "<sep>", "</s>")

Ids = npt.NDArray[np.int64]
Marks = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Masking:
    """Which tokens are predicted and what replaces them.

    Attributes:
        fraction: of the tokens, to predict.
        mask, random: shares of those that the mask token and a random token replace; the rest stay.
        words: where words begin and end by token id; None: every token is a word.
        mask_id, cls_id, sep_id, eod_id: the tokenizer's.
        vocab_size: random tokens are below it.
    """

    fraction: float
    mask: float
    random: float
    words: Words | None
    mask_id: int
    cls_id: int
    sep_id: int
    eod_id: int
    vocab_size: int

    @classmethod
    def of(cls, data: DataConfig, tokenizer: Tokenizer) -> "Masking":
        """As configured.

        Raises:
            DataError: the tokenizer has no mask, class or separator token, or does not show where words begin.
        """
        return cls(
            fraction=data.mask_fraction,
            mask=data.mask_token_fraction,
            random=data.random_token_fraction,
            words=tokenizer.words() if data.whole_words else None,
            eod_id=tokenizer.eod,
            vocab_size=tokenizer.vocab_size,
            **marker_ids(tokenizer, data.tokenizer),
        )


def marker_ids(tokenizer: Tokenizer, path: Path) -> dict[str, int]:
    """`mask_id`, `cls_id` and `sep_id`.

    Raises:
        DataError: the tokenizer has no mask, class or separator token.
    """
    return {
        name: require_token(tokenizer, path, kind, "bert", tokens)
        for name, kind, tokens in (
            ("mask_id", "mask", MASK_TOKENS),
            ("cls_id", "class", CLS_TOKENS),
            ("sep_id", "separator", SEP_TOKENS),
        )
    }


class MaskedObjective:
    """BERT: [CLS] text [SEP], or [CLS] first segment [SEP] second segment [SEP], of which some tokens are predicted.

    Samples have `tokens`, `labels`, `position_ids` (int64) and `loss_mask` (float32, 1 at tokens to predict), each
    [seq_length], with kinds of tokens also `token_types`; with sentences also `sentence_labels` (int64, 1 if the second
    segment is not what follows the first) and `sentence_mask` (float32, 1), both without dimensions.
    """

    def __init__(
        self,
        masking: Masking,
        *,
        seq_length: int,
        token_types: bool,
        sentences: Literal["none", "next", "order"],
        seed: int,
    ) -> None:
        self._masking = masking
        self._token_types = token_types
        self._sentences = sentences
        self._seed = seed
        self.text_length = seq_length - (2 if sentences == "none" else 3)

    def sample(self, texts: Dataset[Mapping[str, Tensor]], count: int, index: int) -> dict[str, Tensor]:
        generator = np.random.default_rng([self._seed, index])
        segments, changed = [texts[index]["tokens"].numpy()], False
        if self._sentences != "none":
            segments, changed = self._pair(segments[0], texts, count, generator)
        labels, types = self._joined(segments)
        chosen = choose_words(
            self._word_starts(labels), self._may_be_masked(labels), self._masking.fraction * self.text_length, generator
        )
        fields: dict[str, npt.NDArray[Any]] = {
            "tokens": replace_tokens(labels, chosen, self._masking, generator),
            "labels": labels,
            "loss_mask": chosen.astype(np.float32),
            "position_ids": np.arange(len(labels)),
        }
        if self._token_types:
            fields["token_types"] = types
        if self._sentences != "none":
            fields |= {"sentence_labels": np.array(int(changed)), "sentence_mask": np.array(1, np.float32)}
        return {name: torch.from_numpy(values) for name, values in fields.items()}

    def _pair(
        self, text: Ids, texts: Dataset[Mapping[str, Tensor]], count: int, generator: np.random.Generator
    ) -> tuple[list[Ids], bool]:
        """Two segments, cut in the middle half, and whether the second does not follow the first: every other time."""
        cut = int(generator.integers(len(text) // 4, len(text) - len(text) // 4))
        changed = bool(generator.random() < 0.5)
        first, second = text[:cut], text[cut:]
        if changed and self._sentences == "order":
            first, second = second, first
        elif changed:
            second = texts[int(generator.integers(count))]["tokens"].numpy()[cut:]
        return [first, second], changed

    def _joined(self, segments: list[Ids]) -> tuple[Ids, Ids]:
        """Token ids with markers, and the number of each token's segment."""
        parts = [np.array([self._masking.cls_id])]
        for segment in segments:
            parts += [segment, np.array([self._masking.sep_id])]
        second = len(segments[-1]) + 1 if len(segments) > 1 else 0
        ids = np.concatenate(parts).astype(np.int64)
        return ids, (np.arange(len(ids)) >= len(ids) - second).astype(np.int64)

    def _word_starts(self, ids: Ids) -> Marks:
        if self._masking.words is None:
            return np.ones(len(ids), dtype=bool)
        begins, ends = self._masking.words
        starts = begins[ids] | ~self._may_be_masked(ids)
        starts[1:] |= ends[ids[:-1]] | ~self._may_be_masked(ids[:-1])
        return starts

    def _may_be_masked(self, ids: Ids) -> Marks:
        masking = self._masking
        return ~np.isin(ids, (masking.cls_id, masking.sep_id, masking.eod_id))


def choose_words(starts: Marks, allowed: Marks, tokens: float, generator: np.random.Generator) -> Marks:
    """Choose whole words at random until they have `tokens` tokens, rounded, or the next would have more.

    Args:
        starts: where a word begins.
        allowed: of a word's tokens all or none.
        tokens: to choose; a word of more is cut.
    Returns:
        the tokens chosen, bool.
    """
    left = max(1, round(tokens))
    firsts = np.flatnonzero(starts)
    stops = np.append(firsts[1:], len(starts))
    pieces = [
        (start, min(start + left, stop))
        for first, stop in zip(firsts.tolist(), stops.tolist(), strict=True)
        if allowed[first]
        for start in range(first, stop, left)
    ]
    chosen = np.zeros(len(starts), dtype=bool)
    for number in generator.permutation(len(pieces)).tolist():
        start, stop = pieces[number]
        if stop - start <= left:
            chosen[start:stop] = True
            left -= stop - start
        if left == 0:
            break
    return chosen


def replace_tokens(ids: Ids, chosen: Marks, masking: Masking, generator: np.random.Generator) -> Ids:
    """The input in which the chosen tokens are, each by chance, the mask token, a random token or themselves."""
    chance = generator.random(len(ids))
    random_ids = generator.integers(masking.vocab_size, size=len(ids))
    masked = np.where(chosen & (chance < masking.mask), masking.mask_id, ids)
    is_random = chosen & (chance >= masking.mask) & (chance < masking.mask + masking.random)
    return np.where(is_random, random_ids, masked)
