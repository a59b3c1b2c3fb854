"""What the model learns from a stretch of text: how a sample is made of it."""

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor
from torch.utils.data import Dataset

from ssd_megatron.config.family_checks import FAMILY_CHECKS
from ssd_megatron.config.model import ModelConfig
from ssd_megatron.config.schema import DataConfig
from ssd_megatron.config.span_sizes import span_sizes
from ssd_megatron.data.masking import MaskedObjective, Masking
from ssd_megatron.data.spans import SpanCorruption, find_sentinels, first_decoder_token
from ssd_megatron.data.tokenizers import Tokenizer
from ssd_megatron.errors import DataError

Sample = Mapping[str, Tensor]


class Objective(Protocol):
    """Makes samples of stretches of text, the same one of the same index, whoever asks and whenever.

    Attributes:
        text_length: tokens of text in a sample.
    """

    @property
    def text_length(self) -> int: ...

    def sample(self, texts: Dataset[Sample], count: int, index: int) -> dict[str, Tensor]:
        """The sample of texts[index] and perhaps others of texts[:count]: every field of the family's batches
        (model/families.py), without the dimension of the batch."""
        ...


class NextToken:
    """GPT: predict each token from those before it. `tokens`, `labels` (one later), `position_ids`, `loss_mask`."""

    def __init__(self, seq_length: int) -> None:
        self.text_length = seq_length

    def sample(self, texts: Dataset[Sample], count: int, index: int) -> dict[str, Tensor]:
        text = texts[index]
        return {name: text[name] for name in ("tokens", "position_ids", "labels", "loss_mask")}


def make_objective(model: ModelConfig, data: DataConfig, tokenizer: Tokenizer, seed: int) -> Objective:
    """The objective of a family.

    Raises:
        DataError: samples of the model's length have no room for it, or the tokenizer lacks a token that it needs.
    """
    fields = {f"model.{name}": value for name, value in model} | {f"data.{name}": value for name, value in data}
    if problems := list(FAMILY_CHECKS.run(fields)):
        raise DataError(f"This model cannot learn from text as it is: {'; '.join(problems)}")
    if model.family == "gpt":
        return NextToken(model.seq_length)
    if model.family == "t5":
        sizes = span_sizes(model.seq_length, data.mask_fraction, data.mean_span_length)
        return SpanCorruption(
            sizes,
            decoder_length=model.decoder_seq_length,
            sentinels=find_sentinels(tokenizer, data.tokenizer, model.vocab_size, sizes.spans),
            start=first_decoder_token(model, tokenizer.eod),
            eod=tokenizer.eod,
            seed=seed,
        )
    return MaskedObjective(
        Masking.of(data, tokenizer),
        seq_length=model.seq_length,
        token_types=model.num_token_types > 0,
        sentences=model.sentence_objective,
        seed=seed,
    )
