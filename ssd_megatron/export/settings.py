"""Settings of another architecture against ours: what it lacks, and what of its own has no equivalent here."""

from collections.abc import Mapping
from typing import Any

from ssd_megatron.config.fields import Section
from ssd_megatron.errors import ConfigError


def unmet(section: Section, **needed: object) -> list[str]:
    """Settings that an architecture does not have, each with what it needs: a value, or one of a tuple."""
    choices = {name: value if isinstance(value, tuple) else (value,) for name, value in needed.items()}
    return [
        f"{name} {' or '.join(map(str, values))}"
        for name, values in choices.items()
        if getattr(section, name) not in values
    ]


def refuse_others(config: Mapping[str, Any], architecture: str, **needed: object) -> None:
    """Fields of a config.json that only one value of has an equivalent here, which is also what they have by default.

    Raises:
        ConfigError: one has another value.
    """
    for name, value in needed.items():
        if config.get(name, value) != value:
            raise ConfigError(f"{name} ({config[name]}) of this {architecture} has no equivalent here: {value} has")


def our_activation(found: str, field: str, activations: Mapping[str, str]) -> str:
    """Our name of an activation.

    Args:
        activations: their names by ours.
    Raises:
        ConfigError: it is none of ours.
    """
    ours = {theirs: name for name, theirs in activations.items()}
    if found not in ours:
        raise ConfigError(f"{field} ({found}) is none of ours: {', '.join(ours)} are")
    return ours[found]
