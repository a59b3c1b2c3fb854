"""Building blocks of the schema: documented fields, values refused by name, and the forms a field may take.

Messages are predicates, because a report puts the field and its value before them: `ssd.top_k (0) must be at least 1`.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field


class Section(BaseModel):
    """Base of every section: frozen, unknown keys refused, no silent conversion ("4" is not 4)."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=())


def required(text: str, **constraints: Any) -> Any:
    """A required field and its one-line documentation."""
    return Field(description=text, **constraints)


def optional(default: Any, text: str, **constraints: Any) -> Any:
    """A field with a default and its one-line documentation."""
    return Field(default=default, description=text, **constraints)


def derived(source: str, times: float, text: str) -> Any:
    """A field that is a multiple of an earlier one, `source`, rounded up, unless it is given."""
    shown = source if times == 1 else f"{times} * {source}"
    return Field(
        default_factory=lambda fields: math.ceil(times * fields[source]),
        description=text,
        json_schema_extra={"shown_default": shown, "source": source},
    )


def by_family(default: Any, text: str, **others: Any) -> Any:
    """A field whose default depends on `family`, an earlier one: `default`, or what `others` has for the family."""
    shown = ", ".join([json.dumps(default), *(f"{name}: {json.dumps(value)}" for name, value in others.items())])
    return Field(
        default_factory=lambda fields: others.get(fields["family"], default),
        description=text,
        json_schema_extra={"shown_default": shown, "source": "family"},
    )


def refuse(reasons: Mapping[Any, str]) -> BeforeValidator:
    """Refuse known values by name, each with its reason and what to use instead."""

    def check(value: Any) -> Any:
        if isinstance(value, str | int) and value in reasons:
            raise ValueError(reasons[value])
        return value

    return BeforeValidator(check)


def only(allowed: Any, otherwise: str) -> BeforeValidator:
    """Accept one value; any other, of whatever type, is answered with `otherwise`."""

    def check(value: Any) -> Any:
        if value != allowed:
            raise ValueError(otherwise)
        return value

    return BeforeValidator(check)


def split_blend(entries: tuple[str | float, ...]) -> tuple[list[str], list[float] | None]:
    """Paths and weights of a blend in mcore's form: `("a",)` -> (["a"], None); `(0.7, "a", 0.3, "b")` has weights.

    Raises:
        ValueError: the entries are neither paths only nor positive weights and paths in turn.
    """
    if entries and all(isinstance(entry, str) for entry in entries):
        return [str(entry) for entry in entries], None
    weights = [entry for entry in entries[0::2] if not isinstance(entry, str) and entry > 0]
    paths = [entry for entry in entries[1::2] if isinstance(entry, str)]
    if not entries or len(weights) != len(paths) or len(weights) + len(paths) != len(entries):
        raise ValueError('must be paths, or positive weights and paths in turn: try ["a"] or [0.7, "a", 0.3, "b"]')
    return paths, [float(weight) for weight in weights]


def _single_path_as_list(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


def _check_blend(entries: tuple[str | float, ...]) -> tuple[str | float, ...]:
    split_blend(entries)
    return entries


def _check_split(split: str) -> str:
    parts = [part.strip() for part in split.split(",")]
    if len(parts) != 3 or not all(part.replace(".", "", 1).isdigit() for part in parts) or "0" in parts[:2]:
        raise ValueError('must be three weights for train, validation and test, the first two above 0: try "969,30,1"')
    return split


def _check_recorded(path: Path) -> Path:
    if path.suffix != ".safetensors":
        raise ValueError("must be kmeans, coactivation, random, kept, or the path of a recorded one (.safetensors)")
    return path


FilePath = Annotated[Path, Field(strict=False)]
RecordedPartition = Annotated[FilePath, AfterValidator(_check_recorded)]
Blend = Annotated[
    tuple[str | float, ...], Field(strict=False), BeforeValidator(_single_path_as_list), AfterValidator(_check_blend)
]
Split = Annotated[str, AfterValidator(_check_split)]
Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(ge=0, le=1)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
