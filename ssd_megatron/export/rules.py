"""How tensors of one naming become those of another: a list of rules, read in either direction.

Our names and shapes are those of the logical state (parallel/logical_state.py), whole and without the routers, which
other models do not have: they are left out, and get their values at the first switch.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ssd_megatron.config.schema import ModelConfig
from ssd_megatron.errors import ExportError

Change = Callable[[Sequence[Tensor]], Sequence[Tensor]]
ROUTER = ".router.weight"


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
            raise ExportError(f"{theirs} has {rows.shape[0]:,} rows, but model.vocab_size is {model.vocab_size:,}")
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


def constant(theirs: str, value: Tensor, needed: str) -> Rule:
    """A tensor that our model does not have and that must have this value; `needed` says which setting has it."""

    def check(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        if tensors[0].count_nonzero() or value.count_nonzero():
            raise ExportError(f"{theirs} is not 0 throughout: set {needed}")
        return []

    return Rule((), (theirs,), lambda _none: [value], check)


def to_theirs(tensors: Mapping[str, Tensor], rules: Iterable[Rule], copies: Mapping[str, str]) -> dict[str, Tensor]:
    """All tensors under their names.

    Args:
        tensors: ours, with or without routers.
        copies: names that there stand for the tensor of another name.
    Raises:
        ExportError: a tensor is missing, or has no place there.
    """
    left = {name: tensor for name, tensor in tensors.items() if not name.endswith(ROUTER)}
    found: dict[str, Tensor] = {}
    for rule in rules:
        found |= zip(rule.theirs, rule.to_theirs(_take(left, rule.ours)), strict=True)
    _refuse_unused(left)
    return found | {copy: found[original] for copy, original in copies.items()}


def to_ours(tensors: Mapping[str, Tensor], rules: Iterable[Rule], copies: Mapping[str, str]) -> dict[str, Tensor]:
    """All tensors but the routers under our names.

    Args:
        tensors: theirs; `copies` may be missing, but must not differ.
    Raises:
        ExportError: a tensor is missing, has no place here, or a copy differs.
    """
    left = dict(tensors)
    for copy, original in copies.items():
        theirs = left.pop(copy, None)
        if theirs is not None and original in left and not torch.equal(theirs, left[original]):
            raise ExportError(f"{copy} differs from {original}: set model.tie_embeddings to false")
    found: dict[str, Tensor] = {}
    for rule in rules:
        found |= zip(rule.ours, rule.to_ours(_take(left, rule.theirs)), strict=True)
    _refuse_unused(left)
    return found


def require(model: ModelConfig, architecture: str, **wanted: object) -> None:
    """Refuse settings of a model that an architecture does not have.

    Raises:
        ExportError: names the setting, its value and what the architecture has.
    """
    for name, value in wanted.items():
        choices = value if isinstance(value, tuple) else (value,)
        if getattr(model, name) not in choices:
            shown = " or ".join(map(str, choices))
            raise ExportError(
                f"model.{name} ({getattr(model, name)}) has no place in {architecture}, which has {shown}"
            )


def _take(left: dict[str, Tensor], names: tuple[str, ...]) -> list[Tensor]:
    missing = [name for name in names if name not in left]
    if missing:
        raise ExportError(f"tensors are missing: {', '.join(missing)}")
    return [left.pop(name) for name in names]


def _refuse_unused(left: Mapping[str, Tensor]) -> None:
    if left:
        raise ExportError(f"tensors have no place in the other model: {', '.join(sorted(left))}")
