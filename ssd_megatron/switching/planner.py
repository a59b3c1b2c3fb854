"""Plans a switch: forms experts and places them, without changing anything."""

import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ssd_megatron.config.schema import SSDConfig
from ssd_megatron.ffn.bank import NeuronBank
from ssd_megatron.switching.clustering import Clustering, Grouping
from ssd_megatron.switching.networks import Networks
from ssd_megatron.switching.placement import balanced_numbering, imbalance
from ssd_megatron.switching.statistics import ProbeBatch, collect_statistics


@dataclass(frozen=True)
class Plan:
    """Where every neuron of this stage goes.

    Attributes:
        labels: by network, expert of each neuron by identity, [F] int64; the same on every layout.
        numbers: by network, the number by which placement knows each expert, [E] int64.
        imbalance_before, imbalance_after: see SwitchReport.
    """

    labels: dict[str, Tensor]
    numbers: dict[str, Tensor]
    imbalance_before: float | None = None
    imbalance_after: float | None = None
    seconds_statistics: float = 0.0
    seconds_cluster: float = 0.0

    def placed(self) -> dict[str, Tensor]:
        """Labels with the experts' placed numbers."""
        return {name: self.numbers[name][labels] for name, labels in self.labels.items()}

    def digest(self) -> dict[str, str]:
        """A hash of the placed labels by network, for ranks to compare."""
        return {name: hashlib.sha256(labels.numpy().tobytes()).hexdigest() for name, labels in self.placed().items()}


class Planner:
    """Makes plans; the same on every rank."""

    def __init__(self, ssd: SSDConfig, networks: Networks, clustering: Clustering, probe: ProbeBatch) -> None:
        self._ssd = ssd
        self._networks = networks
        self._clustering = clustering
        self._probe = probe

    def form_experts(self, previous: Mapping[str, Tensor], step: int) -> Plan:
        """Cluster the neurons of all layers and place the experts, unless they are kept (collective over the job).

        Args:
            previous: labels to start from, where there are any.
        """
        if self._ssd.partition == "kept":
            return self._as_it_is()
        started = time.perf_counter()
        signatures = self._signatures()
        observed = time.perf_counter()
        groupings = self._clustering.form_experts(previous, signatures, step)
        clustered = time.perf_counter()
        plan = self._place_by_probe(groupings)
        statistics = observed - started + time.perf_counter() - clustered
        return replace(plan, seconds_statistics=statistics, seconds_cluster=clustered - observed)

    def _as_it_is(self) -> Plan:
        """Every neuron stays where it is."""
        labels = {name: labels_of(ffn.bank, self._ssd.num_experts) for name, ffn in self._networks.local.items()}
        return Plan(labels, {name: torch.arange(self._ssd.num_experts) for name in labels})

    def place_by_load(self, loads: Mapping[str, Tensor]) -> Plan:
        """Renumber experts that neurons already form, in place, by their measured loads (collective over the pipeline).

        Args:
            loads: by network, tokens of each expert, [E].
        """
        labels = {name: labels_of(ffn.bank, self._ssd.num_experts) for name, ffn in self._networks.local.items()}
        return self._place(labels, loads)

    def _place_by_probe(self, groupings: Mapping[str, Grouping]) -> Plan:
        """Place new experts by the tokens of the probe batch that choose them."""
        labels = {name: grouping.labels for name, grouping in groupings.items()}
        if self._networks.homes == 1:
            return Plan(labels, {name: torch.arange(self._ssd.num_experts) for name in labels})
        centroids = {name: grouping.centroids for name, grouping in groupings.items()}
        local = self._networks.local
        # As many experts as in the last sparse phase: how many there will be is decided on placed experts.
        top_k = {name: ffn.router.top_k for name, ffn in local.items()}
        statistics = collect_statistics(local, self._probe, centroids, top_k, signatures=False)
        loads = {
            name: torch.bincount(layer.expert_ids.flatten(), minlength=self._ssd.num_experts)
            for name, layer in statistics.items()
        }
        return self._place(labels, loads)

    def _place(self, labels: Mapping[str, Tensor], loads: Mapping[str, Tensor]) -> Plan:
        homes = self._networks.homes
        numbers = {name: balanced_numbering(load, homes) for name, load in loads.items()}
        before = {name: imbalance(load, homes) for name, load in loads.items()}
        after = {name: imbalance(load[numbers[name].argsort()], homes) for name, load in loads.items()}
        worst_before, worst_after = (
            max(self._networks.all_stages("imbalance of the homes", values)) for values in (before, after)
        )
        return Plan(dict(labels), numbers, worst_before, worst_after)

    def _signatures(self) -> dict[str, Tensor]:
        """Bits of every neuron by identity on the probe batch, if the partition is made from them."""
        if self._ssd.partition != "coactivation":
            return {}
        local = self._networks.local
        statistics = collect_statistics(local, self._probe, {}, dict.fromkeys(local, self._ssd.top_k))
        return {name: layer.signatures[_positions(local[name].bank)] for name, layer in statistics.items()}


def labels_of(bank: NeuronBank, num_experts: int) -> Tensor:
    """Expert of each neuron by identity, [F] int64, where experts are slices of the bank."""
    return _positions(bank) // (bank.neuron_ids.numel() // num_experts)


def _positions(bank: NeuronBank) -> Tensor:
    """Position of each neuron, [F] int64, by identity."""
    return bank.neuron_ids.cpu().argsort()
