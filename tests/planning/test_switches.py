"""What a switch moves and how long it takes, against numbers worked out by hand and real plans of moves."""

import pytest

from ssd_megatron.model.memory import Layout
from ssd_megatron.planning.switches import KMEANS_SECONDS, bytes_moved, probe_seconds, switch_time
from tests.planning.helpers import cluster, model, ssd

BANKS = 4 * 2 * 64 * 256 * 12  # layers, matrices of 64 x 256, bytes of master and moments


def test_one_rank_moves_nothing_to_others() -> None:
    assert bytes_moved(model(), Layout()) == 0.0


@pytest.mark.parametrize("tensor", [2, 4])
def test_tensor_ranks_exchange_all_but_their_own_share(tensor: int) -> None:
    assert bytes_moved(model(), Layout(tensor=tensor)) == pytest.approx(BANKS * (tensor - 1) / tensor)


def test_ranks_that_own_whole_matrices_move_nothing() -> None:
    # 8 matrices in a line of their own (EP 2), in 2, 4 and 16 parts for copies of each home.
    moved = [bytes_moved(model(), Layout(expert=2, data=data)) / BANKS for data in (2, 4, 8, 16, 32)]
    assert moved == pytest.approx([0.5, 0.5, 0.5, 0.5, 0.75])


def test_a_switch_takes_clustering_transfer_and_probe() -> None:
    layout = Layout(tensor=2, pipeline=2, data=4, expert=2, microbatches=2)
    time = switch_time(model(add_bias=False), ssd(), layout, cluster(16), "bfloat16")
    assert time.bytes_moved == pytest.approx(BANKS / 2 * 3 / 4 / 8)  # a stage's, of 4 homes, on 8 ranks
    assert time.clustering == pytest.approx(KMEANS_SECONDS * 256 * 64 * 16, rel=0.05)
    assert time.total == pytest.approx(time.clustering + time.transfer + time.probe)


def test_more_layers_than_ranks_are_clustered_one_after_the_other() -> None:
    one, four = (
        switch_time(model(), ssd(), Layout(data=data), cluster(data), "bfloat16").clustering for data in (4, 1)
    )
    assert four == pytest.approx(4 * one)


def test_measuring_the_allocation_takes_a_pass_for_every_layer_and_size() -> None:
    equal, measured = (
        probe_seconds(model(), ssd(top_k_allocation=how), Layout(data=8), cluster()) for how in ("equal", "measured")
    )
    assert measured / equal == pytest.approx((3 + 1 + 4 * 3) / 3)  # 2, 4 and 8 of 16 experts in 4 layers
