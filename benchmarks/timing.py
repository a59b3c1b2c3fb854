"""Times of several variants in one process: they take turns, and medians of ratios within a turn are compared."""

import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import TypeVar

import torch

from ssd_megatron.parallel.device import IS_CUDA


def wait() -> None:
    """For what the device still has to do."""
    if IS_CUDA:
        torch.cuda.synchronize()


def seconds(work: Callable[[], object]) -> float:
    """Of one call, the device's work included."""
    wait()
    started = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - started


Name = TypeVar("Name", bound=Hashable)


def take_turns(
    variants: Mapping[Name, Callable[[int], object]], turns: int, warm_up: int = 2
) -> dict[Name, list[float]]:
    """Seconds of each variant in each turn; a variant is called with the turn's number, from -warm_up on."""
    times: dict[Name, list[float]] = {name: [] for name in variants}
    for turn in range(-warm_up, turns):
        for name, run in variants.items():
            taken = seconds(partial(run, turn))
            if turn >= 0:
                times[name].append(taken)
    return times


def paired(above: Sequence[float], below: Sequence[float]) -> float:
    """Median over turns of above / below."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def matmul_rate(rows: int, inner: int, columns: int, dtype: torch.dtype, device: torch.device) -> float:
    """FLOPs per second of a matrix product alone, the best of a few: no step can be faster than its products."""
    a, b = (torch.randn(shape, device=device).to(dtype) for shape in ((rows, inner), (inner, columns)))
    out = torch.empty(rows, columns, dtype=dtype, device=device)
    best = min(seconds(lambda: torch.mm(a, b, out=out)) for _ in range(10))
    return 2 * rows * inner * columns / best
