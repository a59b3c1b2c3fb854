"""What neurons do over the course of training, measured at a run's checkpoints on its probe samples.

How many fire, how their work is spread, whether the same ones go on firing together, and how far tokens share experts:
the observations from which SSD starts (arXiv 2410.03440, section 3).

Shapes: N neurons of a network, by identity; T probe tokens; E experts of which a token has K.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ssd_megatron.ffn.routers import router_weights_from_bank
from ssd_megatron.study.subject import Subject
from ssd_megatron.switching.partition import coactivation_partition, partition_order, structure_similarity
from ssd_megatron.switching.statistics import collect_statistics, expert_overlap

ALWAYS_ON = 0.99  # of the probe tokens: a neuron that fires on as many is always on
OTHER_SAMPLE = 0  # as a distance between two tokens: they are of different samples


@dataclass(frozen=True)
class LayerLook:
    """One network at one checkpoint.

    Attributes:
        rates: [N] float64, share of the probe tokens on which each neuron fires.
        labels: [N] int64, experts of neurons that fire together: a co-activation partition.
        repeat: structure similarity of these labels to those of a second clustering of the same weights that starts
            elsewhere: what is below 1 is due to the clustering, not to a change of the weights.
        overlap: mean share of the experts of two tokens that they have in common, by how far apart they are in their
            sample (OTHER_SAMPLE: at the same place of different samples); K / E if they were chosen at random.
    """

    rates: Tensor
    labels: Tensor
    repeat: float
    overlap: dict[int, float]

    @property
    def active(self) -> float:
        return float(self.rates.mean())

    @property
    def dead(self) -> float:
        """Share of the neurons that fire on no probe token."""
        return float((self.rates == 0).double().mean())

    @property
    def always_on(self) -> float:
        return float((self.rates >= ALWAYS_ON).double().mean())


@dataclass(frozen=True)
class Look:
    """All networks at one checkpoint, in the model's order."""

    step: int
    layers: list[LayerLook]


def look(subject: Subject, step: int, previous: Look | None) -> Look:
    """Measure the weights that the subject has.

    Args:
        previous: the checkpoint before, from whose experts a second clustering starts; the better one counts, as at a
            switch.
    """
    ffns, ssd = subject.model.ffns, subject.config.ssd_megatron.ssd
    top_k = dict.fromkeys(ffns, ssd.top_k)
    fired = collect_statistics(ffns, subject.probe, {}, top_k)
    rates: dict[str, Tensor] = {}
    labels: dict[str, Tensor] = {}
    repeats: dict[str, float] = {}
    centroids: dict[str, Tensor] = {}
    for number, (name, ffn) in enumerate(ffns.items()):
        by_identity = ffn.bank.neuron_ids.cpu().argsort()
        signatures = fired[name].signatures[by_identity]
        rates[name] = fired_tokens(signatures) / fired[name].tokens
        before = None if previous is None else previous.layers[number].labels
        cluster = partial(coactivation_partition, signatures, signatures.shape[1] * 8, ssd.num_experts)
        labels[name] = cluster(number, before).labels
        repeats[name] = structure_similarity(labels[name], cluster(number + len(ffns)).labels)
        rows = ffn.bank.rows().detach().float().cpu()[by_identity]
        order = partition_order(labels[name], ssd.num_experts)
        centroids[name] = router_weights_from_bank(rows[order], ssd.num_experts)
    chosen = collect_statistics(ffns, subject.probe, centroids, top_k, signatures=False)
    shared = {name: overlaps(chosen[name].expert_ids, subject.samples, ssd.num_experts) for name in ffns}
    return Look(step, [LayerLook(rates[name], labels[name], repeats[name], shared[name]) for name in ffns])


def fired_tokens(signatures: Tensor) -> Tensor:
    """Number of set bits in each row of uint8 [N, bytes], float64 [N]."""
    return torch.stack([(signatures >> bit & 1).sum(1, dtype=torch.float64) for bit in range(8)]).sum(0)


def overlaps(ids_TK: Tensor, samples: int, num_experts: int) -> dict[int, float]:
    """Shares of experts that tokens have in common, see `LayerLook.overlap`; distances are powers of two.

    Args:
        ids_TK: experts of all tokens, sample after sample.
    """
    ids_SPK = ids_TK.view(samples, -1, ids_TK.shape[1])
    positions = ids_SPK.shape[1]
    distances = [2**i for i in range(positions.bit_length()) if 2**i < positions]
    found = {distance: _overlap(ids_SPK[:, :-distance], ids_SPK[:, distance:], num_experts) for distance in distances}
    return found | ({OTHER_SAMPLE: _overlap(ids_SPK, ids_SPK.roll(1, 0), num_experts)} if samples > 1 else {})


def similarities(looks: Sequence[Look], layer: int) -> list[list[float]]:
    """Structure similarity (adjusted Rand index) of a layer's experts at each checkpoint to those at each other one; on
    the diagonal to those of a second clustering at the same one."""
    layers = [look.layers[layer] for look in looks]
    return [[a.repeat if a is b else structure_similarity(a.labels, b.labels) for b in layers] for a in layers]


def _overlap(ids_a: Tensor, ids_b: Tensor, num_experts: int) -> float:
    return expert_overlap(ids_a.flatten(0, 1), ids_b.flatten(0, 1), num_experts)
