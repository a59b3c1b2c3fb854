"""Moving rows between owners: the plan without any process group, and the move with real ranks."""

import pytest
import torch

from ssd_megatron.parallel.logical_state import Interval
from ssd_megatron.parallel.topology import Topology
from ssd_megatron.switching.redistribute import apply_move, plan_move
from tests.ranks import run_ranks

ROWS, ROW_SIZE = 12, 5


def cut(*stops: int) -> list[Interval]:
    starts = [0, *stops[:-1]]
    return [Interval(rank, start, stop) for rank, (start, stop) in enumerate(zip(starts, stops, strict=True))]


def random_order(seed: int, rows: int = ROWS) -> torch.Tensor:
    return torch.randperm(rows, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("owners", [cut(60), cut(30, 60), cut(7, 60), cut(23, 24, 60), cut(13, 31, 47, 60)])
def test_plan_sends_every_element_once(owners: list[Interval]) -> None:
    plan = plan_move(random_order(0), ROW_SIZE, owners, len(owners))
    sizes = [interval.stop - interval.start for interval in owners]
    traffic = plan.traffic()
    assert traffic.sum(0).tolist() == traffic.sum(1).tolist() == sizes
    assert plan.elements_moved() == sum(traffic[s, d] for s in range(len(sizes)) for d in range(len(sizes)) if s != d)
    for rank in range(len(owners)):
        widths = [segment.stop - segment.start for segment in plan.segments]
        moves = plan.moves(rank)
        for counts, expected in (("sent_counts", traffic[rank]), ("received_counts", traffic[:, rank])):
            found = sum(torch.tensor(getattr(m, counts)) * width for m, width in zip(moves, widths, strict=True))
            assert found.tolist() == expected.tolist()


def test_a_plan_can_be_read() -> None:
    plan = plan_move(torch.tensor([2, 1, 0, 3]), 5, cut(10, 20), 2)
    assert str(plan).splitlines() == [
        "4 neurons x 5 elements on 2 ranks",
        "rank 0 -> rank 1: 5 elements",
        "rank 1 -> rank 0: 5 elements",
    ]


def test_one_owner_moves_nothing_between_ranks() -> None:
    assert plan_move(random_order(1), ROW_SIZE, cut(60), 1).elements_moved() == 0


def test_identity_moves_nothing() -> None:
    assert plan_move(torch.arange(ROWS), ROW_SIZE, cut(13, 60), 2).elements_moved() == 0


def test_refuses_what_is_not_a_permutation() -> None:
    with pytest.raises(ValueError, match="not a permutation"):
        plan_move(torch.tensor([0, 0, 2]), 4, cut(12), 1)


def test_refuses_owners_that_do_not_cover_the_tensor() -> None:
    with pytest.raises(ValueError, match=r"cover 10 elements, the tensor has 3 x 4"):
        plan_move(torch.tensor([2, 1, 0]), 4, cut(10), 1)


def move_on_ranks(topology: Topology, stops: tuple[int, ...], seed: int, row_size: int) -> list[float]:
    owners = cut(*stops)
    rows = stops[-1] // row_size
    whole = torch.arange(stops[-1], dtype=torch.float32)
    mine = owners[topology.rank]
    storage = torch.cat([torch.full((3,), -1.0), whole[mine.start : mine.stop], torch.full((2,), -1.0)])
    values = storage[3 : 3 + mine.stop - mine.start]
    plan = plan_move(random_order(seed, rows), row_size, owners, topology.world.size)
    apply_move(plan, plan.moves(topology.rank), mine.start, values, topology.world)
    assert storage[:3].eq(-1).all() and storage[-2:].eq(-1).all(), "wrote outside of its own elements"
    result: list[float] = values.tolist()
    return result


@pytest.mark.parametrize(
    ("stops", "row_size"), [((60,), 5), ((30, 60), 5), ((23, 24, 60), 5), ((5, 12), 1), ((3, 56, 60), 5)]
)
def test_move_permutes_rows_whoever_owns_them(stops: tuple[int, ...], row_size: int) -> None:
    parts = run_ranks(len(stops), move_on_ranks, stops, 3, row_size)
    rows = stops[-1] // row_size
    expected = torch.arange(stops[-1], dtype=torch.float32).view(rows, row_size)[random_order(3, rows)]
    assert [value for part in parts for value in part] == expected.flatten().tolist()
