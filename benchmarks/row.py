"""One line of a benchmark's table."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Row:
    """One measurement; `ideal` is what nothing could beat, or for ratios what the exact method gives.

    Attributes:
        at_least: better when higher; lower is better without it.
        details: what the value was made of, by name with unit.
    """

    name: str
    value: float
    goal: float
    ideal: float
    at_least: bool = False
    details: Mapping[str, float | str] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return self.value >= self.goal if self.at_least else self.value <= self.goal


@dataclass(frozen=True)
class Missing:
    """A measurement that cannot be made here, and why."""

    name: str
    reason: str
