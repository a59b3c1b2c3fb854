"""How long bytes take on links, worked out by hand."""

import pytest

from tests.planning.helpers import cluster


def test_a_ring_inside_a_node_runs_at_the_inner_link() -> None:
    assert cluster().ring_seconds(4e9, size=8, stride=1) == pytest.approx(0.01)


def test_a_ring_over_nodes_uses_every_network_card_of_its_ranks() -> None:
    # 2 ranks a node, each carries half of what leaves: 2e9 bytes at 50 GB/s; inside 4e9 at 400 GB/s.
    assert cluster().ring_seconds(4e9, size=4, stride=4) == pytest.approx(2e9 / 50e9)
    # One rank a node: all of it.
    assert cluster().ring_seconds(4e9, size=2, stride=8) == pytest.approx(4e9 / 50e9)


def test_an_all_to_all_waits_for_its_slower_part() -> None:
    # Of 15 others, 7 are near and 8 are far.
    assert cluster().exchange_seconds(15e9, size=16, stride=1) == pytest.approx(8e9 / 50e9)
    assert cluster().exchange_seconds(7e9, size=8, stride=1) == pytest.approx(7e9 / 400e9)
    assert cluster().exchange_seconds(0.0, size=1, stride=1) == 0.0


def test_neighbouring_stages_on_one_node_send_over_the_inner_link() -> None:
    assert cluster().send_seconds(4e9, stride=4) == pytest.approx(0.01)
    assert cluster().send_seconds(4e9, stride=8) == pytest.approx(0.08)


@pytest.mark.parametrize(("size", "stride", "ring", "expected"), [(8, 1, True, 0), (16, 1, True, 2), (16, 1, False, 8)])
def test_bytes_that_leave_the_node(size: int, stride: int, ring: bool, expected: float) -> None:
    sent = 16.0 if ring else 15.0
    assert cluster().off_node(sent, size, stride, ring=ring) == pytest.approx(expected)


def test_a_tenth_of_the_memory_is_not_planned_with() -> None:
    assert cluster().usable_bytes == pytest.approx(90 * 2**30)
