"""How tensors of one naming become those of another: rules that are read in either direction (mapping.py).

Our names and shapes are those of the logical state (parallel/logical_state.py).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ssd_megatron.config.model import ModelConfig
from ssd_megatron.errors import ConfigError

Change = Callable[[Sequence[Tensor]], Sequence[Tensor]]


@dataclass(frozen=True)
class Rule:
    """Some of our tensors as some of theirs.

    Attributes:
        to_theirs: their tensors from ours.
        to_ours: ours from theirs.
    """

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    to_theirs: Change
    to_ours: Change


def same(ours: str, theirs: str) -> Rule:
    def keep(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        return tensors

    return Rule((ours,), (theirs,), keep, keep)


def same_layer(ours: str, theirs: str, *leaves: str) -> list[Rule]:
    """The parameters of one module."""
    return [same(f"{ours}.{leaf}", f"{theirs}.{leaf}") for leaf in leaves]


def transposed(ours: str, theirs: str) -> Rule:
    def change(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        return [tensor.t().contiguous() for tensor in tensors]

    return Rule((ours,), (theirs,), change, change)


def scaled(ours: str, theirs: str, scale: float) -> Rule:
    """Theirs is ours times `scale`."""
    return Rule((ours,), (theirs,), lambda tensors: [tensors[0] * scale], lambda tensors: [tensors[0] / scale])


def by_vocabulary(ours: str, theirs: str, model: ModelConfig) -> Rule:
    """Rows of the vocabulary, of which ours has some more: they are cut off, and zeros when they come back."""

    def pad(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        (rows,) = tensors
        if rows.shape[0] != model.vocab_size:
            raise ConfigError(f"{theirs} has {rows.shape[0]:,} rows, but model.vocab_size is {model.vocab_size:,}")
        padding = rows.new_zeros(model.padded_vocab_size - model.vocab_size, *rows.shape[1:])
        return [torch.cat([rows, padding])]

    return Rule((ours,), (theirs,), lambda tensors: [tensors[0][: model.vocab_size].clone()], pad)


def projections(ours: str, theirs: Sequence[str], model: ModelConfig) -> Rule:
    """Queries, keys and values (weights or biases): three tensors there; here one, in which the rows of each group of
    heads follow each other: its queries, its key, its value. Of cross attention keys and values only."""
    groups, d = model.num_query_groups, model.head_dim
    rows = [model.num_attention_heads // groups * d, d, d][-len(theirs) :]

    def split(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        (whole,) = tensors
        parts = torch.split(whole.view(groups, sum(rows), *whole.shape[1:]), rows, dim=1)
        return [part.flatten(0, 1).contiguous() for part in parts]

    def join(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        parts = [tensor.view(groups, -1, *tensor.shape[1:]) for tensor in tensors]
        return [torch.cat(parts, dim=1).flatten(0, 1)]

    return Rule((ours,), tuple(theirs), split, join)


def zeros(theirs: str, *shape: int) -> Rule:
    """A tensor that our model does not have, and that is 0 there."""

    def check(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        if tensors[0].count_nonzero():
            raise ConfigError(f"{theirs} is not 0 throughout, as in a model with such settings")
        return []

    return Rule((), (theirs,), lambda _none: [torch.zeros(shape)], check)


def tied_head(words: str, model: ModelConfig) -> dict[str, str]:
    """The copy of the embedding that some folders have of a tied head (see `mapping.to_ours`)."""
    return {"lm_head.weight": words} if model.tie_embeddings else {}
