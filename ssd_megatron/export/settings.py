"""Settings of another architecture against ours: what it lacks, and what of its own has no equivalent here."""

from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from ssd_megatron.config.fields import Section
from ssd_megatron.config.model import ModelConfig
from ssd_megatron.errors import ConfigError

# Activations without a gate, as transformers calls them by our names; and other names of one function, to rounding.
UNGATED = {
    "relu": "relu",
    "squared_relu": "relu2",
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "silu": "silu",
}
ALIASES = {"gelu_new": "gelu_pytorch_tanh"}


def unmet(section: Section, **needed: object) -> list[str]:
    """Settings that an architecture does not have, each with what it needs: a value, or one of a tuple."""
    choices = {name: value if isinstance(value, tuple) else (value,) for name, value in needed.items()}
    return [
        f"{name} {' or '.join(map(str, values))}"
        for name, values in choices.items()
        if getattr(section, name) not in values
    ]


def kv_channels_of(head_dim: int, hidden_size: int, heads: int) -> int | None:
    """`model.kv_channels` of heads of that size; None where they are as large without it."""
    return None if head_dim * heads == hidden_size else head_dim


def usual_kv_channels(model: ModelConfig) -> tuple[None, Fraction]:
    """`model.kv_channels` that an architecture has whose heads are together as wide as the model."""
    return None, Fraction(model.hidden_size, model.num_attention_heads)


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
    ours |= {alias: ours[theirs] for alias, theirs in ALIASES.items() if theirs in ours}
    if found not in ours:
        raise ConfigError(f"{field} ({found}) is none of ours: {', '.join(ours)} are")
    return ours[found]
