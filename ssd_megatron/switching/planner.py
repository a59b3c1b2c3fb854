"""Plans a switch: forms experts and places them, without changing anything."""

import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ssd_megatron.config.schema import SSDConfig
from ssd_megatron.switching.clustering import Clustering, Grouping
from ssd_megatron.switching.networks import Networks
from ssd_megatron.switching.placement import balanced_numbering, imbalance
from ssd_megatron.switching.statistics import ProbeBatch, collect_statistics


@dataclass(frozen=True)
class Plan:
    """Where every neuron of this stage goes.

    Attributes:
        labels: by network, expert of the neuron at each position, [F] int64, experts numbered by placement.
        imbalance_before, imbalance_after: see SwitchReport.
    """

    labels: dict[str, Tensor]
    imbalance_before: float | None = None
    imbalance_after: float | None = None
    seconds_statistics: float = 0.0
    seconds_cluster: float = 0.0

    def digest(self) -> dict[str, str]:
        """A hash of the labels by network, for ranks to compare."""
        return {name: hashlib.sha256(labels.numpy().tobytes()).hexdigest() for name, labels in self.labels.items()}


class Planner:
    """Makes plans; the same on every rank."""

    def __init__(self, ssd: SSDConfig, networks: Networks, clustering: Clustering, probe: ProbeBatch) -> None:
        self._ssd = ssd
        self._networks = networks
        self._clustering = clustering
        self._probe = probe

    def form_experts(self, previous: Mapping[str, Tensor], step: int) -> Plan:
        """Cluster the neurons of all layers and place the experts (collective over the job).

        Args:
            previous: labels to start from, where there are any.
        """
        started = time.perf_counter()
        signatures = self._signatures()
        observed = time.perf_counter()
        groupings = self._clustering.form_experts(previous, signatures, step)
        clustered = time.perf_counter()
        plan = self._place_by_probe(groupings)
        statistics = observed - started + time.perf_counter() - clustered
        return replace(plan, seconds_statistics=statistics, seconds_cluster=clustered - observed)

    def place_by_load(self, loads: Mapping[str, Tensor]) -> Plan:
        """Renumber experts that neurons already form, in place, by their measured loads (collective over the pipeline).

        Args:
            loads: by network, tokens of each expert, [E].
        """
        labels = {
            name: contiguous_labels(ffn.bank.neuron_ids.numel(), self._ssd.num_experts)
            for name, ffn in self._networks.local.items()
        }
        return self._place(labels, loads)

    def _place_by_probe(self, groupings: Mapping[str, Grouping]) -> Plan:
        """Place new experts by the tokens of the probe batch that choose them."""
        labels = {name: grouping.labels for name, grouping in groupings.items()}
        if self._networks.homes == 1:
            return Plan(labels)
        centroids = {name: grouping.centroids for name, grouping in groupings.items()}
        statistics = collect_statistics(self._networks.local, self._probe, centroids, self._ssd.top_k, signatures=False)
        loads = {
            name: torch.bincount(layer.expert_ids.flatten(), minlength=self._ssd.num_experts)
            for name, layer in statistics.items()
        }
        return self._place(labels, loads)

    def _place(self, labels: Mapping[str, Tensor], loads: Mapping[str, Tensor]) -> Plan:
        homes = self._networks.homes
        placed, before, after = {}, {}, {}
        for name, load in loads.items():
            numbers = balanced_numbering(load, homes)
            placed[name] = numbers[labels[name]]
            before[name] = imbalance(load, homes)
            after[name] = imbalance(load[numbers.argsort()], homes)
        worst_before, worst_after = (
            max(self._networks.all_stages("imbalance of the homes", values)) for values in (before, after)
        )
        return Plan(placed, worst_before, worst_after)

    def _signatures(self) -> dict[str, Tensor]:
        """Bits of every neuron on the probe batch, if the partition is made from them."""
        if self._ssd.partition != "coactivation":
            return {}
        statistics = collect_statistics(self._networks.local, self._probe, {}, self._ssd.top_k)
        return {name: layer.signatures for name, layer in statistics.items()}


def contiguous_labels(neurons: int, experts: int) -> Tensor:
    """Labels [F] of neurons that are grouped already: expert e at positions [e * F/E, (e + 1) * F/E)."""
    return torch.arange(experts).repeat_interleave(neurons // experts)
