"""Tables that say which tensors of one model are which of another, read in both directions.

Logical tensors are those of `model/gpt.py`; [in, out] stands for a row for each input. Shapes: h hidden, g key/value
heads, r query heads of each, d head size.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ssd_megatron.config.schema import ModelConfig
from ssd_megatron.errors import ConfigError
from ssd_megatron.training.checkpoint_checks import listed

Change = Callable[[Sequence[Tensor]], Sequence[Tensor]]


def _same(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    return tensors


def _transposed(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    return [tensor.t() for tensor in tensors]


@dataclass(frozen=True)
class Entry:
    """Some tensors of ours, those of theirs that hold the same values, and the way there and back."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    there: Change = _same
    back: Change = _same


def same(ours: str, theirs: str) -> Entry:
    return Entry((ours,), (theirs,))


def transposed(ours: str, theirs: str) -> Entry:
    """A row for each input here, for each output there."""
    return Entry((ours,), (theirs,), _transposed, _transposed)


def queries_keys_values(ours: str, theirs: tuple[str, str, str], model: ModelConfig) -> Entry:
    """megatron-core has one tensor with the rows of each group's query heads, key and value in turn."""
    groups, d = model.num_query_groups, model.head_dim
    per_group = model.num_attention_heads // groups

    def there(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        (qkv,) = tensors
        parts = torch.split(qkv.view(groups, per_group + 2, d, *qkv.shape[1:]), [per_group, 1, 1], dim=1)
        return [part.flatten(0, 2) for part in parts]

    def back(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        parts = [part.reshape(groups, -1, d, *part.shape[1:]) for part in tensors]
        return [torch.cat(parts, dim=1).flatten(0, 2)]

    return Entry((ours,), theirs, there, back)


def to_theirs(table: Sequence[Entry], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors under their names.

    Raises:
        ConfigError: tensors are missing or unused.
    """
    _check(tensors, [name for entry in table for name in entry.ours])
    return _apply([(entry.ours, entry.theirs, entry.there) for entry in table], tensors)


def to_ours(table: Sequence[Entry], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `to_theirs`."""
    _check(tensors, [name for entry in table for name in entry.theirs])
    return _apply([(entry.theirs, entry.ours, entry.back) for entry in table], tensors)


def _apply(
    steps: Sequence[tuple[tuple[str, ...], tuple[str, ...], Change]], tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for sources, targets, change in steps:
        results = change([tensors[name] for name in sources])
        found |= {name: tensor.contiguous() for name, tensor in zip(targets, results, strict=True)}
    return found


def _check(tensors: Mapping[str, Tensor], wanted: Sequence[str]) -> None:
    differing = {
        "missing": [name for name in wanted if name not in tensors],
        "unused": sorted(tensors.keys() - set(wanted)),
    }
    found = [f"{what}: {listed(names)}" for what, names in differing.items() if names]
    if found:
        raise ConfigError(f"these are not the tensors of a model with such settings; {'; '.join(found)}")
