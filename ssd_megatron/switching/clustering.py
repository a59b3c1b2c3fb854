"""Forms experts: each layer's neurons are clustered on one data-parallel rank, a layer each in turn, and every rank
gets every layer's labels."""

from collections.abc import Callable, Iterable, Mapping

import torch.distributed as dist
from torch import Tensor

from ssd_megatron.config.schema import SSDConfig
from ssd_megatron.errors import ConfigError
from ssd_megatron.ffn.routers import router_weights_from_bank
from ssd_megatron.ffn.switchable import SwitchableFFN
from ssd_megatron.parallel.topology import Topology
from ssd_megatron.switching.partition import (
    coactivation_partition,
    kmeans_partition,
    load_partition,
    partition_order,
    random_partition,
    warm_assignment_pass,
)

Labels = dict[str, Tensor]


class Clustering:
    """Labels [N] int64 of the neurons at each position, by the name of their network (every method is collective).

    Raises:
        ConfigError: `ssd.partition` names a recorded partition that does not fit the model.
    """

    def __init__(self, ssd: SSDConfig, ffns: Mapping[str, SwitchableFFN], topology: Topology, seed: int) -> None:
        self._ssd = ssd
        self._ffns = dict(ffns)
        self._topology = topology
        self._seed = seed
        self._recorded = self._load_recorded()

    def form_experts(self, previous: Labels, signatures: Mapping[str, Tensor], step: int) -> Labels:
        """Cluster every layer by ssd.partition.

        Args:
            previous: labels to start from, where there are any.
            signatures: bits of each neuron on the probe batch (`coactivation` only).
        """
        if self._recorded is not None:
            # A recorded partition labels neurons by identity; a bank may have been reordered before.
            return {name: self._recorded[name][ffn.bank.neuron_ids.cpu()] for name, ffn in self._ffns.items()}
        return self._spread(self._ffns, lambda name: self._form(name, previous.get(name), signatures.get(name), step))

    def follow(self, names: Iterable[str], previous: Labels, step: int) -> Labels:
        """The cheap look between switches: where the current weights take the previous labels in one pass."""
        return self._spread(names, lambda name: self._follow(name, previous.get(name), step))

    def centroids(self, name: str, labels: Tensor) -> Tensor:
        """Expert scores [E, H] that a router made from these labels would have."""
        rows = self._rows(name)
        order = partition_order(labels, self._ssd.num_experts)
        return router_weights_from_bank(rows[order.to(rows.device)], self._ssd.num_experts)

    def _form(self, name: str, previous: Tensor | None, signatures: Tensor | None, step: int) -> Tensor:
        experts, seed = self._ssd.num_experts, self._clustering_seed(name, step)
        if self._ssd.partition == "random":
            return random_partition(self._ffns[name].bank.w_in.shape[0], experts, seed).labels
        if self._ssd.partition == "coactivation":
            assert signatures is not None
            return coactivation_partition(signatures, signatures.shape[1] * 8, experts, seed, previous).labels
        return kmeans_partition(self._rows(name), experts, previous, seed, max_rounds=self._ssd.kmeans_rounds).labels

    def _follow(self, name: str, previous: Tensor | None, step: int) -> Tensor:
        rows, experts = self._rows(name), self._ssd.num_experts
        if previous is not None:
            return warm_assignment_pass(rows, previous.to(rows.device), experts)
        seed = self._clustering_seed(name, step)
        return kmeans_partition(rows, experts, None, seed, max_rounds=self._ssd.kmeans_rounds).labels

    def _spread(self, names: Iterable[str], compute: Callable[[str], Tensor]) -> Labels:
        """Each layer computed on one rank, known to all."""
        topology, names = self._topology, list(names)
        mine = names[topology.data_parallel_rank :: topology.data_parallel_size]
        labels = {name: compute(name).cpu() for name in mine}
        if topology.data_parallel_size > 1:
            parts: list[Labels] = [{}] * topology.data_parallel_size
            dist.all_gather_object(parts, labels, group=topology.data_parallel_group)
            labels = {name: label for part in parts for name, label in part.items()}
        return {name: labels[name] for name in names}

    def _rows(self, name: str) -> Tensor:
        return self._ffns[name].bank.rows().detach().float()

    def _clustering_seed(self, name: str, step: int) -> int:
        return self._seed + 1_000_003 * step + list(self._ffns).index(name)

    def _load_recorded(self) -> Labels | None:
        if isinstance(self._ssd.partition, str):
            return None
        layers = load_partition(self._ssd.partition, self._ssd.num_experts)
        neurons = next(iter(self._ffns.values())).bank.w_in.shape[0]
        sizes = sorted({labels.numel() for labels in layers})
        if len(layers) != len(self._ffns) or sizes != [neurons]:
            raise ConfigError(
                f"ssd.partition ({self._ssd.partition}) has {len(layers)} layers of {sizes} neurons; "
                f"the model has {len(self._ffns)} of {neurons}"
            )
        return dict(zip(self._ffns, layers, strict=True))
