"""How well a model predicts texts: loss, perplexity and bits per byte, in several modes on the same parts of them.

Of a GPT these are windows. A window's tokens are predicted from those before them in it; windows overlap, and of each
only tokens that no earlier window has predicted count, so that every token counts once and has at least length - stride
tokens before it. Of BERT and T5 they are samples as in training, whose masked tokens or spans are predicted.

Shapes: s tokens that count, v vocabulary.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from ssd_megatron.confidence import CONFIDENCE
from ssd_megatron.config.schema import DataConfig
from ssd_megatron.data.objectives import Objective, Sample, make_objective
from ssd_megatron.data.tokenizers import Tokenizer
from ssd_megatron.inference.model import Model
from ssd_megatron.training.saved_model import SavedModel


class Part(Protocol):
    """Something to predict: so many tokens that count; their logits, fp32 [s, v], and their ids, int64 [s]."""

    @property
    def counted(self) -> int: ...
    def predicted(self, model: Model) -> tuple[Tensor, Tensor]: ...


@dataclass(frozen=True)
class Window:
    """Tokens of a text, of which those from `first` on are to be predicted."""

    tokens: Sequence[int]
    first: int

    @property
    def counted(self) -> int:
        return len(self.tokens) - self.first

    def predicted(self, model: Model) -> tuple[Tensor, Tensor]:
        tokens = torch.tensor(self.tokens, device=model.device)
        return model(tokens[None, :-1])[0, self.first - 1 :], tokens[self.first :]


@dataclass(frozen=True)
class MaskedSample:
    """A sample of BERT or T5 (see `data/objectives.py`); of pairs of sentences the tokens alone count."""

    fields: Mapping[str, Tensor]

    @property
    def counted(self) -> int:
        return int(self.fields["loss_mask"].sum())

    def predicted(self, model: Model) -> tuple[Tensor, Tensor]:
        read = [self.fields[name] for name in ("tokens", "decoder_tokens", "token_types") if name in self.fields]
        logits_sv = model(*(field[None].to(model.device) for field in read))[0]
        counts = self.fields["loss_mask"].bool()
        return logits_sv[counts], self.fields["labels"][counts].to(model.device)


@dataclass(frozen=True)
class Variant:
    """A way to run the model; experts per token of each layer in sparse mode, by `label` for people."""

    mode: Literal["dense", "sparse"]
    top_k: Sequence[int]
    label: str


@dataclass(frozen=True)
class Score:
    """A variant's loss by part, in nats: sums over the tokens that count."""

    variant: Variant
    sums: Tensor  # fp64 [parts]
    counts: Tensor  # fp64 [parts]

    @property
    def loss(self) -> float:
        """Mean per token."""
        return float(self.sums.sum() / self.counts.sum())

    @property
    def error(self) -> float:
        """Half of the loss's 95 % confidence interval, parts taken as independent; NaN of a single one."""
        return half_interval(self.sums, self.counts)

    def difference(self, other: "Score") -> tuple[float, float]:
        """Loss above another variant's, and half of its confidence interval: the same parts, so much narrower."""
        difference = self.sums - other.sums
        return float(difference.sum() / self.counts.sum()), half_interval(difference, self.counts)


def windows(tokens: Sequence[int], length: int, stride: int) -> Iterator[Window]:
    """Of one text; its first token is predicted by nothing, and does not count."""
    assert 1 <= stride < length, (stride, length)
    done = 1  # tokens that need no prediction any more
    for start in range(0, max(1, len(tokens) - length + stride), stride):
        part = tokens[start : start + length]
        if start + len(part) > done:
            yield Window(part, done - start)
            done = start + len(part)


def objective_of(saved: SavedModel, tokenizer: Tokenizer, path: Path) -> Objective:
    """How training makes samples of this model: as its run did, or, of one that was imported, as by default.

    Raises:
        DataError: as `make_objective`.
    """
    data = saved.data or DataConfig(tokenizer=path)
    return make_objective(saved.settings.model, data.model_copy(update={"tokenizer": path}), tokenizer, seed=0)


def masked_samples(tokens: Sequence[int], objective: Objective) -> Iterator[MaskedSample]:
    """Of a text, or many with their ends, as many as it has whole ones; the same ones each time."""
    size = objective.text_length
    texts = _Stretches(tokens, size)
    for index in range(len(tokens) // size):
        yield MaskedSample(objective.sample(texts, len(tokens) // size, index))


def evaluate(model: Model, parts: Iterable[Part], variants: Sequence[Variant]) -> list[Score]:
    """Scores of all variants, part by part."""
    sums: list[list[float]] = [[] for _ in variants]
    counts: list[int] = []
    for part in parts:
        counts.append(part.counted)
        for variant, found in zip(variants, sums, strict=True):
            _use(model, variant)
            losses = F.cross_entropy(*part.predicted(model), reduction="none")
            found.append(float(losses.double().sum()))
    total = torch.tensor(counts, dtype=torch.float64)
    return [Score(v, torch.tensor(found, dtype=torch.float64), total) for v, found in zip(variants, sums, strict=True)]


def half_interval(sums: Tensor, counts: Tensor) -> float:
    """Half of the 95 % confidence interval of sums.sum() / counts.sum(), a ratio estimate (Cochran, Sampling
    Techniques, section 6.3)."""
    number = len(sums)
    if number < 2:
        return math.nan
    residuals = sums - counts * (sums.sum() / counts.sum())
    variance = residuals.square().sum() * number / (number - 1)
    return CONFIDENCE * float(variance.sqrt() / counts.sum())


class _Stretches(Dataset[Sample]):
    """Of a text, one after the other."""

    def __init__(self, tokens: Sequence[int], size: int) -> None:
        self._tokens, self._size = torch.tensor(tokens), size

    def __getitem__(self, index: int) -> Sample:
        return {"tokens": self._tokens[index * self._size :][: self._size]}


def _use(model: Model, variant: Variant) -> None:
    model.set_mode(variant.mode)
    if variant.mode == "sparse":
        for ffn, number in zip(model.ffns, variant.top_k, strict=True):
            ffn.top_k = number
