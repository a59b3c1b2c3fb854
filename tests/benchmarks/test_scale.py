"""benchmarks.scale on tiny sizes: every point has its law."""

from pathlib import Path

import pytest

from benchmarks.scale import KINDS, draw, rows
from benchmarks.scale_sweeps import Point, Sizes, Sweep, rank_sweeps
from ssd_megatron.parallel.topology import Topology
from tests.benchmarks.helpers import run_benchmark
from tests.ranks import run_ranks

TINY = Sizes(
    hidden=(32, 64),
    expert_size=(8, 16),
    experts=(8, 16),
    tokens=(128, 256),
    layers=(1, 2),
    ranks=(1, 2),
    switch_layers=(1, 2),
    neurons=128,
    turns=1,
)


def test_a_law_passes_through_the_smallest_size() -> None:
    sweep = Sweep("step", "ranks", "", [Point(1, 2.0, cost=1.0), Point(4, 9.0, cost=2.0, extra=0.5)])
    assert [sweep.law(point) for point in sweep.points] == [2.0, 4.5]
    found = list(rows(iter([sweep]), []))
    assert [row.value for row in found] == [2.0]
    assert found[0].name == "step, ranks 4: measured / law"


def _swept(topology: Topology, kind: str) -> list[Sweep]:
    return list(KINDS[kind](TINY, topology))


def test_networks_follow_their_flops(tmp_path: Path) -> None:
    sweeps = run_ranks(1, _swept, "ffn")[0]
    laws = {(sweep.what, sweep.size): sweep.points[1].cost / sweep.points[0].cost for sweep in sweeps}
    assert len(laws) == 7  # experts sparse only; expert size, tokens and hidden size in both modes
    assert laws["dense network", "expert size"] == 2
    assert laws["dense network", "tokens"] == laws["sparse network", "tokens"] == 2
    assert laws["dense network", "hidden size"] == laws["sparse network", "hidden size"] == 2
    router, network = 2 * 64 * 8, 4 * 64 * 128 / 4  # FLOPs of a token at 8 experts
    assert laws["sparse network", "experts"] == pytest.approx((network + 2 * router) / (network + router))
    assert all(point.seconds > 0 for sweep in sweeps for point in sweep.points)
    draw(sweeps, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_steps_are_measured_in_both_modes() -> None:
    sweeps = run_ranks(1, _swept, "step")[0]
    modes, sizes = ("dense", "sparse"), ("layers", "tokens", "hidden size")
    assert {(sweep.what, sweep.size) for sweep in sweeps} == {(f"{m} step", size) for m in modes for size in sizes}
    layers = {sweep.what: sweep.points for sweep in sweeps if sweep.size == "layers"}
    assert layers["dense step"][1].cost < 2 * layers["dense step"][0].cost  # the head is there once
    assert layers["sparse step"][0].cost < layers["dense step"][0].cost


def test_switches_are_measured_against_the_banks() -> None:
    (sweep,) = run_ranks(1, _swept, "switch")[0]
    assert [point.size for point in sweep.points] == [1, 2]
    assert sweep.points[1].cost == 2 * sweep.points[0].cost
    assert {"first ms", "clustering ms", "moving ms"} <= sweep.points[0].details.keys()


def test_ranks_send_what_the_planner_says() -> None:
    sweeps = {sweep.what: sweep for sweep in rank_sweeps(TINY)}
    assert len(sweeps) == 4  # two modes, data and expert parallel
    for sweep in sweeps.values():
        alone, two = sweep.points
        assert alone.extra == 0 and not alone.details
        assert two.extra > 0 and float(two.details["ring MB/s"]) > 0
    in_dense, in_sparse = (sweeps[f"{mode} step, expert parallel"].points[1].details for mode in ("dense", "sparse"))
    assert in_dense["MB sent per rank over expert"] != in_sparse["MB sent per rank over expert"]
    assert in_dense["MB sent per rank over data"] == in_sparse["MB sent per rank over data"]


def test_rows_of_a_small_run(tmp_path: Path) -> None:
    rows = run_benchmark("scale", tmp_path, "--quick", "--only", "switch", "--plot", str(tmp_path / "plot.png"))
    assert [row["name"] for row in rows] == [f"switch to sparse, layers {n}: measured / law" for n in (2, 4)]
    assert (tmp_path / "plot.png").exists()
