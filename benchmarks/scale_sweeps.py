"""The sweeps of benchmarks.scale: what is measured at each size, and the law beside it."""

import os
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.jobs import job_config, sparse_settings
from benchmarks.switch import Job
from benchmarks.timing import seconds, take_turns
from ssd_megatron.config.load import RunConfig
from ssd_megatron.config.model import ModelConfig
from ssd_megatron.config.schema import ParallelConfig
from ssd_megatron.ffn.kernels import choose_backend
from ssd_megatron.ffn.routers import router_weights_from_bank
from ssd_megatron.ffn.switchable import FFNSettings, Mode, SwitchableFFN
from ssd_megatron.model.cost import Layer, bank_parameters, flops_per_token, forward_flops
from ssd_megatron.model.memory import layout_of
from ssd_megatron.parallel.collectives import Group
from ssd_megatron.parallel.topology import Topology
from ssd_megatron.planning.traffic import all_reduce, step_traffic
from ssd_megatron.training.synthetic import SyntheticJob
from tests.ranks import run_ranks

MODES: tuple[Mode, ...] = ("dense", "sparse")
SEQUENCE, VOCABULARY, SAMPLES = 128, 1024, 8


@dataclass(frozen=True)
class Sizes:
    """What is swept, smallest first; a size that another sweep keeps is one from the middle."""

    hidden: tuple[int, ...]
    expert_size: tuple[int, ...]
    experts: tuple[int, ...]
    tokens: tuple[int, ...]
    layers: tuple[int, ...]
    ranks: tuple[int, ...]
    switch_layers: tuple[int, ...]
    neurons: int
    turns: int


@dataclass(frozen=True)
class Point:
    """`cost` is what the law says of this size in a unit of the sweep's own, `extra` seconds come on top."""

    size: int
    seconds: float
    cost: float
    extra: float = 0.0
    details: Mapping[str, float | str] = field(default_factory=dict)


@dataclass(frozen=True)
class Sweep:
    what: str
    size: str
    law_in_words: str
    points: list[Point]

    def law(self, point: Point) -> float:
        """Seconds, from those of the smallest size."""
        base = self.points[0]
        return (base.seconds - base.extra) * point.cost / base.cost + point.extra


@dataclass(frozen=True)
class Network:
    """A feed-forward network alone."""

    hidden: int
    neurons: int
    experts: int
    tokens: int


def ffn_sweeps(sizes: Sizes, topology: Topology) -> Iterator[Sweep]:
    base = Network(_middle(sizes.hidden), sizes.neurons, _middle(sizes.experts), _middle(sizes.tokens))
    changed: dict[str, tuple[tuple[int, ...], Callable[[int], Network]]] = {
        "experts": (sizes.experts, lambda n: replace(base, experts=n)),
        "expert size": (sizes.expert_size, lambda n: replace(base, neurons=n * base.experts)),
        "tokens": (sizes.tokens, lambda n: replace(base, tokens=n)),
        "hidden size": (sizes.hidden, lambda n: replace(base, hidden=n)),
    }
    for size, (values, network_of) in changed.items():
        networks = {value: network_of(value) for value in values}
        # Dense, the number of experts says nothing.
        modes: tuple[Mode, ...] = ("sparse",) if size == "experts" else MODES
        for mode in modes:
            times = _network_seconds(networks, mode, topology.device, sizes.turns)
            points = [Point(v, times[v], _network_flops(networks[v], mode)) for v in values]
            yield Sweep(f"{mode} network", size, "FLOPs", points)


def _network_seconds(networks: dict[int, Network], mode: Mode, device: torch.device, turns: int) -> dict[int, float]:
    variants = {
        value: partial(_forward_and_backward, *_built(network, mode, device)) for value, network in networks.items()
    }
    times = take_turns(variants, turns)
    return {value: statistics.median(times[value]) for value in networks}


def _built(network: Network, mode: Mode, device: torch.device) -> tuple[SwitchableFFN, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    backend, _ = choose_backend("auto", device, torch.float32)
    ffn = SwitchableFFN(
        SimpleNamespace(params_dtype=torch.float32),
        FFNSettings(
            hidden_size=network.hidden,
            ffn_hidden_size=network.neurons,
            activation="relu",
            add_bias=False,
            num_experts=network.experts,
            top_k=network.experts // 4,
            router_update="straight_through",
            backend=backend,
        ),
    ).to(device)
    with torch.no_grad():
        for weight in ffn.bank.neuron_parameters().values():
            weight.normal_(std=network.hidden**-0.5)
        ffn.router.weight.copy_(router_weights_from_bank(ffn.bank.rows(), network.experts))
    ffn.mode = mode
    x, dy = (torch.randn(network.tokens, 1, network.hidden, device=device) for _ in range(2))
    return ffn, x.requires_grad_(), dy


def _forward_and_backward(ffn: SwitchableFFN, x: torch.Tensor, dy: torch.Tensor, _turn: int) -> None:
    ffn.zero_grad(set_to_none=True)
    x.grad = None
    ffn(x)[0].backward(dy)


def _network_flops(network: Network, mode: Mode) -> float:
    config = job_config(_model(1, network.hidden, network.neurons), samples=1, ssd=sparse_settings(network.experts))
    model, ssd = config.ssd_megatron.model, config.ssd_megatron.ssd
    flops = forward_flops(model, ssd, Layer(model.seq_length))
    return network.tokens * (flops.ffn if mode == "dense" else flops.ffn * ssd.top_k / ssd.num_experts + flops.router)


def step_sweeps(sizes: Sizes, topology: Topology) -> Iterator[Sweep]:
    hidden, layers = _middle(sizes.hidden), _middle(sizes.layers)
    changed: dict[str, dict[int, RunConfig]] = {
        "layers": {n: _step_config(n, hidden, sizes.neurons) for n in sizes.layers},
        "tokens": {n: _step_config(layers, hidden, sizes.neurons, n // SEQUENCE) for n in sizes.tokens},
        "hidden size": {n: _step_config(layers, n, sizes.neurons) for n in sizes.hidden},
    }
    for size, configs in changed.items():
        times = _step_seconds(configs, topology, sizes.turns)
        for mode in MODES:
            points = [Point(v, times[v, mode], _step_flops(configs[v], mode)) for v in configs]
            yield Sweep(f"{mode} step", size, "FLOPs", points)


def _step_seconds(configs: dict[int, RunConfig], topology: Topology, turns: int) -> dict[tuple[int, Mode], float]:
    """Median seconds of a step by size and mode; all jobs live at once and take turns."""
    jobs = {value: _started(config, topology) for value, config in configs.items()}
    variants = {(value, mode): partial(_step, job, mode) for value, job in jobs.items() for mode in MODES}
    times = take_turns(variants, turns, warm_up=1)
    for job in jobs.values():
        job.engine.close()
    return {key: statistics.median(values) for key, values in times.items()}


def _started(config: RunConfig, topology: Topology) -> SyntheticJob:
    """A job that has trained a step and formed experts."""
    job = SyntheticJob.build(config, topology)
    job.train_step(1)
    job.switch(1)
    return job


def _step(job: SyntheticJob, mode: Mode, turn: int) -> None:
    job.coordinator.set_mode(mode)
    job.train_step(turn + 2)  # the first turn is -1


def _step_flops(config: RunConfig, mode: Mode) -> float:
    tokens = config.train_batch_size * config.ssd_megatron.model.seq_length
    return tokens * flops_per_token(config.ssd_megatron.model, config.ssd_megatron.ssd).of(mode)


def switch_sweep(sizes: Sizes, topology: Topology) -> Iterator[Sweep]:
    """The second and third switch to sparse, which start from known experts, as all but one in a run."""
    hidden, points = _middle(sizes.hidden), []
    for layers in (sizes.switch_layers[0], *sizes.switch_layers):  # the first job warms the process up
        job = Job.alternating(_model(layers, hidden, sizes.neurons), topology, experts=16, samples=SAMPLES, switches=6)
        job.train_step()
        reports = [job.switch() for _ in range(6)]
        to_sparse = [report.seconds for report in reports if report.to_mode == "sparse"]
        model: ModelConfig = job.job.config.ssd_megatron.model
        last = reports[-2]
        details = {
            "first ms": to_sparse[0] * 1e3,
            "clustering ms": last.seconds_cluster * 1e3,
            "moving ms": last.seconds_transfer * 1e3,
        }
        points.append(Point(layers, statistics.median(to_sparse[1:]), layers * bank_parameters(model), details=details))
        job.job.engine.close()
    yield Sweep("switch to sparse", "layers", "elements of banks", points[1:])


def rank_sweeps(sizes: Sizes) -> Iterator[Sweep]:
    """Fixed work per rank: data parallel, and expert parallel over all ranks."""
    cores = len(os.sched_getaffinity(0))
    shape = (sizes.layers[1], _middle(sizes.hidden), sizes.neurons)
    for kind in ("data", "expert"):
        found = {}
        for ranks in sizes.ranks:
            sizes_of_groups = ParallelConfig(expert_parallel_size=ranks if kind == "expert" else 1)
            found[ranks] = run_ranks(ranks, rank_times, kind, shape, sizes.turns, parallel=sizes_of_groups)[0]
        for mode in MODES:
            points = []
            for ranks, result in found.items():
                sent = result["sent"][mode]
                total = sum(sent.values())
                details = {f"MB sent per rank over {group}": size / 1e6 for group, size in sent.items()}
                if total:
                    details["ring MB/s"] = result["rate"] / 1e6
                extra = total / result["rate"] if total else 0.0
                points.append(Point(ranks, result["seconds"][mode], max(1.0, ranks / cores), extra, details))
            law = "ranks per core + bytes / speed of links"
            yield Sweep(f"{mode} step, {kind} parallel", "ranks", law, points)


def rank_times(topology: Topology, kind: str, shape: tuple[int, int, int], turns: int) -> dict[str, Any]:
    """What one rank measures: seconds of a step by mode, bytes it sends by mode and group, speed of its links."""
    ranks = topology.world.size
    parallel = {"expert_parallel_size": ranks if kind == "expert" else 1}
    config = _step_config(*shape, SAMPLES * ranks, ranks=ranks, parallel=parallel)
    return {
        "seconds": {mode: time for (_, mode), time in _step_seconds({ranks: config}, topology, turns).items()},
        "sent": {mode: _sent(config, mode) for mode in MODES},
        "rate": _ring_rate(topology.world) if ranks > 1 else float("inf"),
    }


def _sent(config: RunConfig, mode: Mode) -> dict[str, float]:
    """Bytes that a rank sends in a step, by group, as the planner says."""
    model, ssd = config.ssd_megatron.model, config.ssd_megatron.ssd
    by_group: dict[str, float] = {}
    for transfer in step_traffic(model, ssd, layout_of(config), 0, mode, "float32"):
        by_group[transfer.group] = by_group.get(transfer.group, 0.0) + transfer.step_bytes
    return by_group


def _ring_rate(group: Group) -> float:
    """Bytes per second that a rank sends in an all-reduce, every rank being busy with it."""
    numbers = torch.zeros(4 * 2**20)
    times = [seconds(lambda: dist.all_reduce(numbers, group=group.handle)) for _ in range(5)]
    return all_reduce(numbers.nbytes, group.size) / statistics.median(times[1:])


def _step_config(
    layers: int, hidden: int, neurons: int, samples: int = SAMPLES, *, ranks: int = 1, parallel: Any = None
) -> RunConfig:
    return job_config(
        _model(layers, hidden, neurons),
        samples=samples,
        ranks=ranks,
        bf16=False,
        ssd=sparse_settings(16),
        parallel=parallel,
        bucket=5_000_000,
    )


def _middle(sizes: tuple[int, ...]) -> int:
    return sizes[len(sizes) // 2]


def _model(layers: int, hidden: int, neurons: int) -> dict[str, Any]:
    return {
        "num_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": 4,
        "ffn_hidden_size": neurons,
        "seq_length": SEQUENCE,
        "vocab_size": VOCABULARY,
    }
