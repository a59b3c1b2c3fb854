"""How well a model predicts texts: loss, perplexity and bits per byte, in several modes on the same windows.

A window's tokens are predicted from those before them in it; windows overlap, and of each only tokens that no earlier
window has predicted count, so that every token counts once and has at least length - stride tokens before it.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ssd_megatron.inference.model import CausalModel

CONFIDENCE = 1.96  # standard errors on both sides of a mean for 95 %, of a normal distribution


@dataclass(frozen=True)
class Window:
    """Tokens of a text, of which those from `first` on are to be predicted."""

    tokens: Sequence[int]
    first: int

    @property
    def counted(self) -> int:
        return len(self.tokens) - self.first


@dataclass(frozen=True)
class Variant:
    """A way to run the model; experts per token of each layer in sparse mode, by `label` for people."""

    mode: Literal["dense", "sparse"]
    top_k: Sequence[int]
    label: str


@dataclass(frozen=True)
class Score:
    """A variant's loss by window, in nats: sums over the tokens that count."""

    variant: Variant
    sums: Tensor  # fp64 [windows]
    counts: Tensor  # fp64 [windows]

    @property
    def loss(self) -> float:
        """Mean per token."""
        return float(self.sums.sum() / self.counts.sum())

    @property
    def error(self) -> float:
        """Half of the loss's 95 % confidence interval, windows taken as independent; NaN of a single one."""
        return half_interval(self.sums, self.counts)

    def difference(self, other: "Score") -> tuple[float, float]:
        """Loss above another variant's, and half of its confidence interval: the same windows, so much narrower."""
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


def evaluate(model: CausalModel, parts: Iterable[Window], variants: Sequence[Variant]) -> list[Score]:
    """Scores of all variants, window by window."""
    sums: list[list[float]] = [[] for _ in variants]
    counts: list[int] = []
    for window in parts:
        counts.append(window.counted)
        tokens = torch.tensor(window.tokens, device=model.device)
        for variant, found in zip(variants, sums, strict=True):
            _use(model, variant)
            logits_sv = model(tokens[None, :-1])[0, window.first - 1 :]
            losses = F.cross_entropy(logits_sv, tokens[window.first :], reduction="none")
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


def _use(model: CausalModel, variant: Variant) -> None:
    model.set_mode(variant.mode)
    if variant.mode == "sparse":
        for ffn, number in zip(model.ffns, variant.top_k, strict=True):
            ffn.top_k = number
