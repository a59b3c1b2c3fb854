"""Forms experts: each layer's rows are gathered from their homes to one rank of the stage (layers go round its ranks)
and clustered there, and every rank gets every layer's labels."""

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
        labels: [F] int64, expert of the neuron at each position.
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
            signatures: bits of each neuron on the probe batch (`coactivation` only).
        """

        def form(name: str, rows: Tensor) -> Tensor:
            return self._form(name, rows, previous.get(name), signatures.get(name), step)

        return self._spread(self._networks.local, form)

    def follow(self, names: Iterable[str], previous: Mapping[str, Tensor], step: int) -> dict[str, Grouping]:
        """The cheap look between switches: where the current weights take the previous labels in one pass."""
        return self._spread(names, lambda name, rows: self._follow(name, rows, previous.get(name), step))

    def _form(self, name: str, rows: Tensor, previous: Tensor | None, signatures: Tensor | None, step: int) -> Tensor:
        experts, seed = self._ssd.num_experts, self._clustering_seed(name, step)
        if self._recorded is not None:
            # A recorded partition labels neurons by identity; a bank may have been reordered before.
            return self._recorded[name][self._networks.local[name].bank.neuron_ids.cpu()]
        if self._ssd.partition == "random":
            return random_partition(rows.shape[0], experts, seed).labels
        if self._ssd.partition == "coactivation":
            assert signatures is not None
            return coactivation_partition(signatures, signatures.shape[1] * 8, experts, seed, previous).labels
        return kmeans_partition(rows, experts, previous, seed, max_rounds=self._ssd.kmeans_rounds).labels

    def _follow(self, name: str, rows: Tensor, previous: Tensor | None, step: int) -> Tensor:
        experts = self._ssd.num_experts
        if previous is not None:
            return warm_assignment_pass(rows, previous.to(rows.device), experts)
        seed = self._clustering_seed(name, step)
        return kmeans_partition(rows, experts, None, seed, max_rounds=self._ssd.kmeans_rounds).labels

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
        """The layers that this rank labels, with all their rows [F, H] in fp32; at most one such matrix at a time.

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
                    by_home = sorted(range(homes), key=topology.bank_home)
                    mine = name, torch.cat([parts[rank] for rank in by_home])
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
