"""A list of rules applied to a model's tensors in either direction: exactly those of the rules."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from ssd_megatron.errors import ConfigError
from ssd_megatron.export.rules import Change, Rule
from ssd_megatron.training.checkpoint_checks import listed

NO_COPIES: Mapping[str, str] = {}


def to_theirs(table: Sequence[Rule], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors under their names.

    Raises:
        ConfigError: tensors are missing or unused.
    """
    _check(tensors, [name for entry in table for name in entry.ours])
    return _apply([(entry.ours, entry.theirs, entry.to_theirs) for entry in table], tensors)


def to_ours(
    table: Sequence[Rule], tensors: Mapping[str, Tensor], copies: Mapping[str, str] = NO_COPIES
) -> dict[str, Tensor]:
    """The inverse of `to_theirs`.

    Args:
        copies: names that there stand for the tensor of another name: they may be left out, but must not differ.
    """
    _check({name: t for name, t in tensors.items() if name not in copies}, [n for entry in table for n in entry.theirs])
    for copy, original in copies.items():
        if copy in tensors and not tensors[copy].equal(tensors[original]):
            raise ConfigError(f"{copy} differs from {original}, whose copy it is in a model with such settings")
    return _apply([(entry.theirs, entry.ours, entry.to_ours) for entry in table], tensors)


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
