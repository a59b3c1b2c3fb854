"""One line of a benchmark's table."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One measurement; `ideal` is what nothing could beat, or for ratios what the exact method gives."""

    name: str
    value: float
    goal: float
    ideal: float

    @property
    def ok(self) -> bool:
        return self.value <= self.goal
