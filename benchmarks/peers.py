"""The sparse feed-forward network beside what others have: forward and backward, same inputs, weights and routing.

    python -m benchmarks.peers [--quick] [--json FILE] [--threads N]

Each peer runs in its own layout of weights and is first checked to give the same output and gradients as brute force;
one that does not, or cannot run here, is listed with the reason. Peers take turns in one process; a row is the median
of the turns' ratios ours / peer. The ideal is a quarter of dense time. Ours also computes the gradient of the
straight-through gates, as in training; peers that scale outputs by router scores get scores of 1.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks.peer_kinds import PEERS
from benchmarks.peer_problem import Contender, NotHere, Problem, Work
from benchmarks.row import Missing, Row
from benchmarks.table import parser_for, report
from benchmarks.timing import paired, take_turns
from ssd_megatron.parallel.device import IS_CUDA, keep_freed_memory

TURNS, QUICK_TURNS, ROUTINGS = 15, 5, 4
RATIO = 0.25
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
# Largest error of an output or gradient, relative to its norm.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
# At least as fast as any; of dense time what the FLOPs allow, or nearly.
PEER_GOAL, GROUPED_GOAL_CUDA = 1.0, 0.65


@dataclass(frozen=True)
class Case:
    """One network; `goal` of sparse / dense time."""

    dtype: torch.dtype
    hidden: int
    neurons: int
    experts: int
    tokens: int
    activation: str
    goal: float

    def __str__(self) -> str:
        size = self.neurons // self.experts
        return f"{NAMES[self.dtype]} h {self.hidden}, {self.experts} experts of {size}, {self.activation}"


QUICK_CASES = (
    Case(torch.float32, 256, 1024, 16, 1024, "relu", goal=0.45),
    Case(torch.float32, 256, 1024, 16, 1024, "reglu", goal=0.45),
)
CPU_CASES = (
    Case(torch.float32, 512, 2048, 16, 2048, "relu", goal=0.36),
    Case(torch.float32, 512, 2048, 32, 2048, "relu", goal=0.42),
    Case(torch.float32, 512, 2048, 16, 2048, "reglu", goal=0.36),
    Case(torch.bfloat16, 512, 2048, 16, 2048, "relu", goal=0.36),
    Case(torch.bfloat16, 512, 2048, 16, 2048, "reglu", goal=0.36),
    Case(torch.float32, 1024, 4096, 16, 2048, "relu", goal=0.31),
)
CUDA_CASES = (
    Case(torch.bfloat16, 2048, 8192, 16, 16384, "relu", goal=0.36),
    Case(torch.bfloat16, 2048, 8192, 32, 16384, "relu", goal=0.40),
    Case(torch.bfloat16, 2048, 8192, 64, 16384, "relu", goal=0.60),
    Case(torch.bfloat16, 2048, 8192, 32, 16384, "reglu", goal=0.40),
    Case(torch.bfloat16, 4096, 16384, 32, 16384, "relu", goal=0.34),
)


def compare(case: Case, turns: int, device: torch.device) -> Iterator[Row | Missing]:
    """Ours beside every peer on one network."""
    problem = Problem.random(
        case.hidden, case.neurons, case.experts, int(case.experts * RATIO), case.activation, case.dtype, device
    )
    works = [problem.work(case.tokens, seed) for seed in range(ROUTINGS)]
    checked = {name: check(make, problem, works[0], TOLERANCE[case.dtype]) for name, make in PEERS.items()}
    running = {name: found for name, found in checked.items() if not isinstance(found, str)}
    assert {"ours", "dense"} <= running.keys(), checked
    variants: dict[str, Callable[[int], object]] = {
        name: partial(_run, contender, works) for name, (contender, _) in running.items()
    }
    times = take_turns(variants, turns, warm_up=ROUTINGS)
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, found in checked.items():
        title = f"{case}: ours / {name}"
        if isinstance(found, str):
            yield Missing(title, found)
            continue
        if name == "ours":
            continue
        yield Row(
            title,
            paired(times["ours"], times[name]),
            _goal(case, name),
            RATIO * medians["dense"] / medians[name],
            details={
                "ours ms": medians["ours"] * 1e3,
                "theirs ms": medians[name] * 1e3,
                "error ours": f"{running['ours'][1]:.1e}",
                "theirs": f"{found[1]:.1e}",
            },
        )


def _goal(case: Case, name: str) -> float:
    if name == "dense":
        return case.goal
    return GROUPED_GOAL_CUDA if IS_CUDA and name == "torch grouped_mm" else PEER_GOAL


def check(
    make: Callable[[Problem], Contender], problem: Problem, work: Work, tolerance: float
) -> tuple[Contender, float] | str:
    """A peer and its error, or why it is not compared."""
    try:
        contender = make(problem)
        results = contender.results(work)
    except (ImportError, NotHere) as reason:
        return str(reason)
    except RuntimeError as error:  # what torch raises where an operator takes no such device, dtype or shape
        return f"fails here: {str(error).strip().splitlines()[0]}"
    expected = problem.brute_force(work, dense=contender.dense)
    worst = max(_relative(results[name], expected[name]) for name in expected)
    return (contender, worst) if worst <= tolerance else f"gives another result: relative error {worst:.1e}"


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def _run(contender: Contender, works: list[Work], turn: int) -> None:
    contender.forward_and_backward(works[turn % len(works)])


def rows(cases: tuple[Case, ...], turns: int) -> Iterator[Row | Missing]:
    for case in cases:
        yield from compare(case, turns, torch.device("cuda" if IS_CUDA else "cpu"))


def main(argv: list[str] | None = None) -> int:
    arguments = _arguments(argv)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    cases = QUICK_CASES if arguments.quick else CUDA_CASES if IS_CUDA else CPU_CASES
    turns = QUICK_TURNS if arguments.quick else TURNS
    return 0 if report("Sparse networks, forward and backward", rows(cases, turns), arguments.json) else 1


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = parser_for(__doc__)
    parser.add_argument("--threads", type=int)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
