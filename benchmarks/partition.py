"""Speed and quality of forming experts: seconds beside those of the matrix products alone, sums beside exact ones.

    python -m benchmarks.partition [--quick] [--json FILE]

Every row is better when lower. Rows of `w_in` are stand-ins: a part of low rank that neurons share, and noise.
"""

import sys
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.row import Row
from benchmarks.table import parser_for, report
from ssd_megatron.switching import partition as partitions
from ssd_megatron.switching.assignment import balanced_assignment
from tests.switching.exact import exact_assignment, exact_kmeans

SHAPES = ((2048, 512, 32), (8192, 2048, 32), (16384, 4096, 64))  # neurons, hidden size, experts
QUICK_SHAPES = ((2048, 512, 32), (4096, 1024, 64))
TOKENS = 4096
KMEANS_GOAL, ASSIGNMENT_GOAL, PASS_GOAL = 60.0, 1.0, 2.0  # seconds


def make_rows(num_neurons: int, hidden: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    factors = torch.randn(num_neurons, 32, generator=generator) @ torch.randn(32, hidden, generator=generator)
    return factors.div_(32**0.5) + torch.randn(num_neurons, hidden, generator=generator)


def make_signatures(num_neurons: int, num_experts: int, seed: int) -> tuple[Tensor, Tensor]:
    """Packed bits of neurons that fire at rates from 5 % to 90 % while their planted group is on; the groups."""
    generator = torch.Generator().manual_seed(seed)
    groups = torch.arange(num_neurons) % num_experts
    rate_N1 = 0.05 * 18 ** torch.rand(num_neurons, 1, generator=generator)
    weights = 2 ** torch.arange(7, -1, -1)
    columns = []
    for _ in range(TOKENS // 8):
        on_E8 = torch.rand(num_experts, 8, generator=generator) < 0.1
        fired_N8 = (torch.rand(num_neurons, 8, generator=generator) < rate_N1) & on_E8[groups]
        fired_N8 |= torch.rand(num_neurons, 8, generator=generator) < 0.03 * rate_N1
        columns.append((fired_N8 * weights).sum(1).to(torch.uint8))
    return torch.stack(columns, dim=1), groups


def seconds(work: Callable[[], object], repeats: int = 3) -> float:
    """Median of a few calls."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return sorted(times)[repeats // 2]


def round_seconds(rows_NH: Tensor, num_experts: int) -> float:
    """The two matrix products of a round of soft k-means: scores of neurons, means of experts."""
    means_EH, shares_NE = rows_NH[:num_experts].clone(), torch.rand(len(rows_NH), num_experts)
    return seconds(lambda: rows_NH @ means_EH.T) + seconds(lambda: shares_NE.T @ rows_NH)


def speed(num_neurons: int, hidden: int, num_experts: int) -> Iterator[Row]:
    shape = f"{num_neurons} x {hidden} into {num_experts}"
    rows_NH = make_rows(num_neurons, hidden, seed=0)
    products = round_seconds(rows_NH, num_experts)
    scores_NE = rows_NH @ F.normalize(rows_NH[:num_experts], dim=1).T
    labels = partitions.random_partition(num_neurons, num_experts, seed=0).labels

    assignment = seconds(lambda: balanced_assignment(scores_NE))
    yield Row(f"{shape}: balanced assignment, s", assignment, ASSIGNMENT_GOAL, seconds(lambda: scores_NE.argmax(1)))
    one_pass = seconds(lambda: partitions.warm_assignment_pass(rows_NH, labels, num_experts))
    yield Row(f"{shape}: warm pass, s", one_pass, PASS_GOAL, products)
    fresh = seconds(lambda: partitions.balanced_kmeans(rows_NH, num_experts, seed=0), repeats=1)
    yield Row(f"{shape}: fresh k-means, s", fresh, KMEANS_GOAL, (partitions.ANNEAL_ROUNDS + 1) * products)
    warm = seconds(lambda: partitions.balanced_kmeans(rows_NH, num_experts, init_labels=labels, seed=0), repeats=1)
    yield Row(f"{shape}: k-means from random labels, s", warm, KMEANS_GOAL, products)


def coactivation(num_neurons: int, num_experts: int) -> Iterator[Row]:
    name = f"{num_neurons} x {TOKENS} tokens into {num_experts}: coactivation"
    signatures, groups = make_signatures(num_neurons, num_experts, seed=0)
    products = round_seconds(torch.rand(num_neurons, TOKENS), num_experts)
    started = time.perf_counter()
    found = partitions.coactivation_partition(signatures, TOKENS, num_experts, seed=0)
    taken = time.perf_counter() - started
    yield Row(f"{name}, s", taken, KMEANS_GOAL, (partitions.ANNEAL_ROUNDS + 2) * products)
    share = partitions.cofiring_share(signatures, TOKENS, found.labels)
    planted = partitions.cofiring_share(signatures, TOKENS, groups)
    yield Row(f"{name}, planted / found weight", planted / share, 1.01, 1.0)


def quality() -> Iterator[Row]:
    """Against exact solutions, on sizes where those can be computed: the worst of a few seeds."""
    generator = torch.Generator().manual_seed(0)
    cases = {
        "uniform scores": torch.rand(1024, 32, generator=generator),
        "cosines": F.normalize(make_rows(1024, 128, 0), dim=1) @ F.normalize(make_rows(32, 128, 1), dim=1).T,
        "scores with many ties": torch.randint(4, (1024, 32), generator=generator).float(),
    }
    for name, scores_NE in cases.items():
        best, found = (
            float(scores_NE.double().gather(1, labels[:, None]).sum())
            for labels in (exact_assignment(scores_NE), balanced_assignment(scores_NE))
        )
        unseen = float(scores_NE.double().mean(1).sum())
        yield Row(f"1024 into 32, {name}: gain missed", (best - found) / (best - unseen), 0.01, 0.0)
    for num_neurons, hidden, num_experts in ((512, 128, 16), (1024, 256, 64)):
        same, fresh = [], []
        for seed in range(3):
            rows_NH = make_rows(num_neurons, hidden, seed)
            start = partitions.random_partition(num_neurons, num_experts, seed).labels
            exact = exact_kmeans(rows_NH, start, num_experts)
            settled = partitions.balanced_kmeans(rows_NH, num_experts, init_labels=start, seed=0, max_rounds=100)
            same.append(settled.objective / exact)
            fresh.append(partitions.balanced_kmeans(rows_NH, num_experts, seed=seed).objective / exact)
        shape = f"{num_neurons} x {hidden} into {num_experts}"
        yield Row(f"{shape}: inertia / exact k-means, same start", max(same), 1.01, 1.0)
        yield Row(f"{shape}: inertia / exact k-means, fresh", max(fresh), 1.01, 1.0)


def measure(quick: bool) -> Iterator[Row]:
    yield from quality()
    yield from coactivation(*((2048, 32) if quick else (16384, 64)))
    for shape in QUICK_SHAPES if quick else SHAPES:
        yield from speed(*shape)


def main(argv: list[str] | None = None) -> int:
    arguments = parser_for(__doc__).parse_args(argv)
    return 0 if report("Forming experts", measure(arguments.quick), arguments.json) else 1


if __name__ == "__main__":
    sys.exit(main())
