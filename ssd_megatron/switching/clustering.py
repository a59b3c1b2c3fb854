"""Forms experts: each layer's rows are gathered from their homes to one rank of the stage (layers go round its ranks)
and clustered there, and every rank gets every layer's labels.

Labels go by neuron identity, and experts are numbered in the order of their first neurons: where a placement has put
neurons and experts has no influence, so that all layouts form the same experts at every switch.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from ssd_megatron.config.schema import SSDConfig
from ssd_megatron.errors import ConfigError
from ssd_megatron.ffn.routers import router_weights_from_bank
from ssd_megatron.switching.networks import Networks
from ssd_megatron.switching.partition import (
    coactivation_partition,
    kmeans_partition,
    load_partition,
    partition_order,
    random_partition,
    warm_assignment_pass,
)

Labels = dict[str, Tensor]


class Grouping(NamedTuple):
    """Experts of one layer.

    Attributes:
        labels: [F] int64, expert of each neuron by identity.
        centroids: [E, H] fp32, expert scores of a router made from these labels.
    """

    labels: Tensor
    centroids: Tensor


class Clustering:
    """Groupings of this stage's layers by the name of their network (every method is collective over the stage).

    Raises:
        ConfigError: `ssd.partition` names a recorded partition that does not fit the model.
    """

    def __init__(
        self,
        ssd: SSDConfig,
        networks: Networks,
        seed: int,
    ) -> None:
        self._ssd = ssd
        self._networks = networks
        self._seed = seed
        self._recorded = self._load_recorded()

    def form_experts(
        self, previous: Mapping[str, Tensor], signatures: Mapping[str, Tensor], step: int
    ) -> dict[str, Grouping]:
        """Cluster every layer by ssd.partition.

        Args:
            previous: labels to start from, where there are any.
            signatures: bits of each neuron by identity on the probe batch (`coactivation` only).
        """

        def form(name: str, rows: Tensor) -> Tensor:
            return numbered_by_first_neuron(self._form(name, rows, previous.get(name), signatures.get(name), step))

        return self._spread(self._networks.local, form)

    def follow(self, names: Iterable[str], previous: Mapping[str, Tensor], step: int) -> dict[str, Grouping]:
        """The cheap look between switches: where the current weights take the previous labels in one pass."""
        return self._spread(names, lambda name, rows: self._follow(name, rows, previous.get(name), step))

    def _form(self, name: str, rows: Tensor, previous: Tensor | None, signatures: Tensor | None, step: int) -> Tensor:
        experts, seed = self._ssd.num_experts, self._clustering_seed(name, step)
        if self._recorded is not None:
            return self._recorded[name]
        if experts == len(rows):
            return torch.arange(experts)  # single neurons
        if self._ssd.partition == "random":
            return random_partition(rows.shape[0], experts, seed).labels
        if self._ssd.partition == "coactivation":
            assert signatures is not None
            bits = signatures.to(rows.device)
            return coactivation_partition(bits, bits.shape[1] * 8, experts, seed, previous).labels
        return kmeans_partition(rows, experts, previous, seed, max_rounds=self._ssd.kmeans_rounds).labels

    def _follow(self, name: str, rows: Tensor, previous: Tensor | None, step: int) -> Tensor:
        experts = self._ssd.num_experts
        if experts == len(rows):
            return torch.arange(experts)
        if previous is not None:
            return warm_assignment_pass(rows, previous.to(rows.device), experts)
        seed = self._clustering_seed(name, step)
        return numbered_by_first_neuron(
            kmeans_partition(rows, experts, None, seed, max_rounds=self._ssd.kmeans_rounds).labels
        )

    def _spread(self, names: Iterable[str], label: Callable[[str, Tensor], Tensor]) -> dict[str, Grouping]:
        """Each layer labelled on one rank of the stage, known to all of them."""
        names = list(names)
        mine = {name: self._group(rows, label(name, rows)) for name, rows in self._rows_by_turns(names)}
        parts = self._networks.topology.stage.gather_objects("labels of the neurons", mine)
        groupings = {name: grouping for part in parts for name, grouping in part.items()}
        return {name: groupings[name] for name in names}

    def _group(self, rows: Tensor, labels: Tensor) -> Grouping:
        order = partition_order(labels.cpu(), self._ssd.num_experts)
        centroids = router_weights_from_bank(rows[order.to(rows.device)], self._ssd.num_experts)
        return Grouping(labels.cpu(), centroids.cpu())

    def _rows_by_turns(self, names: list[str]) -> Iterator[tuple[str, Tensor]]:
        """The layers that this rank labels, with all rows [F, H] by identity, fp32; at most one such matrix at a time.

        Layers go round the copies of the banks, and in each of them round its homes.
        """
        topology, homes = self._networks.topology, self._networks.topology.homes
        copies = topology.expert_data.size
        for first in range(0, len(names), copies * homes):
            mine: tuple[str, Tensor] | None = None
            for turn, name in enumerate(names[first : first + copies * homes]):
                if turn % copies != topology.expert_data.rank:
                    continue
                rows = self._networks.local[name].bank.rows().detach().float()
                parts = topology.bank.gather_to(f"rows of {name}", rows, turn // copies)
                if parts:
                    whole = rows.new_empty(homes * rows.shape[0], rows.shape[1])
                    ids_by_home = self._networks.local[name].bank.neuron_ids.view(homes, -1)
                    for rank, part in enumerate(parts):
                        whole[ids_by_home[topology.bank_home(rank)]] = part
                    mine = name, whole
            if mine is not None:
                yield mine

    def _clustering_seed(self, name: str, step: int) -> int:
        return self._seed + 1_000_003 * step + self._networks.names.index(name)

    def _load_recorded(self) -> Labels | None:
        if isinstance(self._ssd.partition, str):
            return None
        layers = load_partition(self._ssd.partition, self._ssd.num_experts)
        neurons = next(iter(self._networks.local.values())).bank.neuron_ids.numel()
        sizes = sorted({labels.numel() for labels in layers})
        if len(layers) != len(self._networks.names) or sizes != [neurons]:
            raise ConfigError(
                f"ssd.partition ({self._ssd.partition}) has {len(layers)} layers of {sizes} neurons; "
                f"the model has {len(self._networks.names)} of {neurons}"
            )
        return dict(zip(self._networks.names, layers, strict=True))


def numbered_by_first_neuron(labels: Tensor) -> Tensor:
    """The same groups, numbered in the order of their first neurons."""
    labels = labels.cpu()
    experts = int(labels.max()) + 1
    first = torch.full((experts,), labels.numel()).scatter_reduce(0, labels, torch.arange(labels.numel()), "amin")
    return first.argsort().argsort()[labels]
