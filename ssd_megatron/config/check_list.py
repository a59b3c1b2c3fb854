"""Checks of fields against each other, and what their messages suggest."""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

Check = Callable[..., Iterable[str]]


class CheckList:
    """Checks, each registered with the fields that it is called with: `@CHECKS("ssd.num_experts", "ssd.top_k")`."""

    def __init__(self) -> None:
        self._checks: list[tuple[tuple[str, ...], Check]] = []

    def __call__(self, *paths: str) -> Callable[[Check], Check]:
        def register(check: Check) -> Check:
            self._checks.append((paths, check))
            return check

        return register

    def run(self, values: Mapping[str, Any]) -> Iterator[str]:
        """The problems that the checks see. One whose fields are not all usable is left out: their own problems are
        reported already."""
        for paths, check in self._checks:
            if all(path in values for path in paths):
                yield from check(*(values[path] for path in paths))


def divisors_near(number: int, wanted: int) -> str:
    """The divisors of `number` next below and above `wanted`, as a suggestion."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    divisors = sorted({*small, *(number // d for d in small)})
    below, above = [d for d in divisors if d <= wanted], [d for d in divisors if d > wanted]
    return " or ".join(str(d) for d in below[-1:] + above[:1])


def choices(values: tuple[Any, ...]) -> str:
    """Values as a message offers them."""
    return " or ".join(f'"{value}"' if isinstance(value, str) else json.dumps(value) for value in values)
