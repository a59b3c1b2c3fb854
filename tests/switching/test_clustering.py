"""The same weights form the same experts on every layout, wherever neurons lie and however experts were numbered."""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from torch import Tensor

from ssd_megatron.model.language_model import LanguageModel, ffn_names
from ssd_megatron.parallel.topology import Topology
from ssd_megatron.switching.clustering import Clustering, Grouping
from ssd_megatron.switching.networks import Networks
from ssd_megatron.switching.partition import random_partition, save_partition
from tests.layouts import EP2, EP2_DP2, ONE, PP2, PP2_EP2, TP2, TP2_EP2, TP2_PP2_EP2, Layout
from tests.ranks import run_ranks
from tests.small_engine import run_config

LAYERS, NEURONS, EXPERTS = 4, 96, 8
LAYOUTS = {str(layout): layout for layout in (TP2, EP2, PP2, Layout(data=3), TP2_EP2, PP2_EP2, EP2_DP2, TP2_PP2_EP2)}
PARTITIONS = ("kmeans", "random", "coactivation", "recorded")
WAYS = ("afresh", "from earlier labels", "in one pass")
Found = dict[tuple[str, str], dict[str, Grouping]]  # of each network of a stage, by partition and way


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def shuffle_neurons(networks: Networks, seed: int) -> None:
    """Put neurons elsewhere, as a switch does."""
    for ffn in networks.local.values():
        order = torch.randperm(NEURONS, generator=seeded(seed))
        ffn.bank.neuron_ids.copy_(order)
        for parameter in ffn.bank.neuron_parameters().values():
            mine = order.view(ffn.homes.count, -1)[ffn.homes.index]
            parameter.data = ffn.homes.all_rows(parameter)[mine]


def form_experts(topology: Topology, layout: Layout, shuffle: int | None) -> Found:
    """Experts of the initial weights; with neurons at other positions and experts with other numbers by `shuffle`."""
    config = run_config(
        topology.world.size,
        parallel=layout.parallel.model_dump(),
        num_layers=LAYERS,
        ffn_hidden_size=NEURONS,
        activation="reglu",
    )
    model = LanguageModel(config.ssd_megatron, "torch", topology)
    networks = Networks(ffn_names(LAYERS), model.ffns, topology)
    numbers = torch.arange(EXPERTS)
    if shuffle is not None:
        shuffle_neurons(networks, shuffle)
        numbers = torch.randperm(EXPERTS, generator=seeded(shuffle))
    earlier = {name: random_partition(NEURONS, EXPERTS, layer).labels for layer, name in enumerate(networks.names)}
    previous = {name: numbers[earlier[name]] for name in networks.local}
    bits = torch.randint(0, 256, (NEURONS, 8), generator=seeded(3)).to(torch.uint8)
    signatures = dict.fromkeys(networks.local, bits)

    def numbered(groupings: dict[str, Grouping], undo: Tensor) -> dict[str, Grouping]:
        return {
            name: Grouping(undo.argsort()[grouping.labels], grouping.centroids[undo])
            for name, grouping in groupings.items()
        }

    found: Found = {}
    with TemporaryDirectory() as folder:
        record = Path(folder) / "partition.safetensors"
        save_partition(record, [random_partition(NEURONS, EXPERTS, 20 + layer).labels for layer in range(LAYERS)])
        for partition in PARTITIONS:
            ssd = config.ssd_megatron.ssd.model_copy(
                update={"partition": record if partition == "recorded" else partition, "num_experts": EXPERTS}
            )
            clustering, as_they_are = Clustering(ssd, networks, seed=7), torch.arange(EXPERTS)
            for way, groupings, undo in (
                ("afresh", clustering.form_experts({}, signatures, step=5), as_they_are),
                ("from earlier labels", clustering.form_experts(previous, signatures, step=5), as_they_are),
                # Experts keep the numbers of those that they grow out of.
                ("in one pass", clustering.follow(list(previous), previous, step=5), numbers),
            ):
                found[partition, way] = numbered(groupings, undo)
    return found


@cache
def on_ranks(layout: Layout, shuffle: int | None) -> list[Found]:
    return run_ranks(layout.ranks, form_experts, layout, shuffle, parallel=layout.parallel)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("partition", PARTITIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_weights_form_the_same_experts(layout: str, partition: str, way: str) -> None:
    sizes = LAYOUTS[layout]
    expected = on_ranks(ONE, None)[0][partition, way]
    ranks = [found[partition, way] for found in on_ranks(sizes, sizes.ranks)]
    assert sorted({name for found in ranks for name in found}) == sorted(expected) == ffn_names(LAYERS)
    assert [len(found) for found in ranks] == [LAYERS // sizes.pipeline] * sizes.ranks
    for found in ranks:
        for name, grouping in found.items():
            assert torch.equal(grouping.labels, expected[name].labels), name
            # Their common norm is a sum over the neurons in the order of their experts.
            assert torch.allclose(grouping.centroids, expected[name].centroids, rtol=1e-5, atol=0), name


def test_partitions_differ() -> None:
    """So that the test above compares different things."""
    found = on_ranks(ONE, None)[0]
    labels = {tuple(by_name["blocks.0.layer.mlp"].labels.tolist()) for by_name in found.values()}
    assert len(labels) == 5  # four partitions, and one pass; earlier labels are no better a start than none here
