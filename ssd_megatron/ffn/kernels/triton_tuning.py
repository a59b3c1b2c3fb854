"""Which tiles the Triton kernels may use, and how one is chosen.

The first call with a new shape (hidden size, expert size, load, dtypes) times the candidates that fit and keeps the
choice, in memory and in Triton's cache on disk (TRITON_CACHE_DIR), so that later runs on the machine make the same one.
In the interpreter nothing is timed: one small tile serves all.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import triton
import triton.testing
from torch import Tensor
from triton import knobs

SHARED_MEMORY = 227 * 1024  # bytes that a block may have on a Hopper GPU
ACCUMULATORS = 128  # registers of a thread, of 255, that the sums of a tile may take
CURVED = ("gelu", "gelu_tanh", "silu")  # activations that need registers of their own

Tile = dict[str, int]  # BM rows (where the routing does not fix them), BN columns, BK depth of a step
Candidate = tuple[Tile, int, int]  # tile, warps, stages of the pipeline

# Largest first. The last is small enough for any shape and dtype.
UP: list[Candidate] = [
    ({"BN": 256, "BK": 64}, 8, 3),
    ({"BN": 128, "BK": 64}, 8, 4),
    ({"BN": 128, "BK": 64}, 4, 3),
    ({"BN": 64, "BK": 64}, 8, 4),
    ({"BN": 64, "BK": 64}, 4, 4),
    ({"BN": 32, "BK": 32}, 4, 3),
    ({"BN": 16, "BK": 16}, 4, 2),
]
# The sums over an expert's neurons are short, so the stores weigh most: smaller tiles, several blocks on a processor.
DOWN: list[Candidate] = [
    ({"BN": 256, "BK": 64}, 8, 3),
    ({"BN": 128, "BK": 64}, 4, 3),
    ({"BN": 128, "BK": 64}, 8, 3),
    ({"BN": 64, "BK": 64}, 4, 3),
    ({"BN": 32, "BK": 32}, 4, 3),
    ({"BN": 16, "BK": 16}, 4, 2),
]
WEIGHT_GRAD: list[Candidate] = [
    ({"BM": 128, "BN": 256, "BK": 64}, 8, 3),
    ({"BM": 128, "BN": 128, "BK": 64}, 8, 4),
    ({"BM": 128, "BN": 128, "BK": 64}, 4, 3),
    ({"BM": 64, "BN": 128, "BK": 64}, 4, 4),
    ({"BM": 32, "BN": 32, "BK": 32}, 4, 3),
    ({"BM": 16, "BN": 16, "BK": 16}, 4, 2),
]
NARROWEST = 16  # the smallest BN
INTERPRETED: Tile = {"BM": 32, "BN": 32, "BK": 32}


def tuned(candidates: list[Candidate], *, rows: str, columns: str, depth: str) -> Callable[[Any], Any]:
    """Decorates a matmul kernel with arguments H, N and load; the others name those that are the matmul's sizes."""
    if knobs.runtime.interpret:
        candidates = [({side: INTERPRETED[side] for side in candidates[0][0]}, 1, 1)]
    decorator: Callable[[Any], Any] = triton.autotune(
        [triton.Config(tile, num_warps=warps, num_stages=stages) for tile, warps, stages in candidates],
        key=["H", "N", "load", "PRECISION"],
        prune_configs_by={"early_config_prune": partial(_worth_trying, {"BM": rows, "BN": columns, "BK": depth})},
        do_bench=_milliseconds,
        cache_results=True,
    )
    return decorator


def _milliseconds(call: Callable[[], None], quantiles: tuple[float, ...]) -> Any:
    return triton.testing.do_bench(call, warmup=5, rep=20, quantiles=quantiles)


def _worth_trying(size_of: dict[str, str], configs: list[Any], tensors: dict[str, Any], **others: Any) -> list[Any]:
    """The tiles that fit matmul, shared memory and registers, none under half the largest; the last if none fits."""
    given = {**tensors, **others}
    element = next(t.element_size() for t in given.values() if isinstance(t, Tensor) and t.is_floating_point())
    side_by_side = 2 if given.get("w_up") is not None and given.get("a_up") is None else 1  # matmuls, in `up`
    # Curves, a gate's slope (down_grad) and fp32, which has no tensor cores of its own, leave half the registers.
    crowded = given.get("ACT") in CURVED or given.get("d_up") is not None or element == 4
    registers = ACCUMULATORS // 2 if crowded else ACCUMULATORS

    def fits(config: Any) -> bool:
        tile = _tile(config, given)
        columns, depth = tile["BN"] * side_by_side, tile["BK"]
        return (
            all(tile[side] <= max(16, triton.next_power_of_2(given[size])) for side, size in size_of.items())
            and (tile["BM"] + columns) * depth * element * config.num_stages <= SHARED_MEMORY
            and tile["BM"] * columns <= registers * 32 * config.num_warps
        )

    def area(config: Any) -> int:
        tile = _tile(config, given)
        return tile["BM"] * tile["BN"]

    fitting = [config for config in configs if fits(config)] or configs[-1:]
    return [config for config in fitting if 2 * area(config) >= area(fitting[0])]


def _tile(config: Any, given: dict[str, Any]) -> Tile:
    """All three sides: BM is the candidate's or, where the routing fixes it, an argument."""
    return {"BM": given.get("BM"), **config.kwargs}
