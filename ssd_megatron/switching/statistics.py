"""What the neurons do on the probe batch: fixed held-out tokens, so that checks at different steps are comparable.

Shapes: T probe tokens, N neurons of one feed-forward network, H hidden, E experts, K experts per token.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ssd_megatron.ffn.router_kinds import expert_scores
from ssd_megatron.ffn.switchable import SwitchableFFN
from ssd_megatron.parallel.topology import Topology

Batch = Mapping[str, Tensor]
Observer = Callable[[Tensor, Tensor], None]
PACK_WEIGHTS = (128, 64, 32, 16, 8, 4, 2, 1)


@dataclass(frozen=True)
class LayerStatistics:
    """One feed-forward network on the whole probe batch.

    Attributes:
        active_fraction: share of (token, neuron) pairs that fire.
        signatures: [N, bytes] uint8, a bit per probe token (most significant first): the neuron fired; no bytes if they
            were not asked for.
        expert_ids: [T, K] int64, experts that the given centroids choose, sample by sample, so that the order of the
            tokens does not depend on how the samples are cut into ranks and batches; empty if none were given.
        tokens: T.
    """

    active_fraction: float
    signatures: Tensor
    expert_ids: Tensor
    tokens: int


@dataclass(frozen=True)
class ProbeBatch:
    """This rank's part of the probe samples (possibly empty batches) and the forward pass over them.

    Attributes:
        mean_loss: mean loss of all ranks' batches in the mode that the networks have (collective over the job).
    """

    batches: list[Batch]
    mean_loss: Callable[[Sequence[Batch]], float]
    topology: Topology

    def loss(self) -> float:
        """Mean loss over all probe tokens of all ranks (collective over the job)."""
        return self.mean_loss(self.batches)


@dataclass
class _Recorder:
    """Collects one network's bits batch by batch; `centroids_EH` may be None."""

    neurons: int
    centroids_EH: Tensor | None
    top_k: int
    signatures: bool
    fired: list[Tensor] = field(default_factory=list)
    chosen: list[Tensor] = field(default_factory=list)
    fired_counts: list[Tensor] = field(default_factory=list)
    pairs: int = 0

    def __call__(self, x_TH: Tensor, pre_TN: Tensor) -> None:
        fired_TN = pre_TN > 0
        self.fired_counts.append(fired_TN.sum())
        self.pairs += fired_TN.numel()
        if self.signatures:
            self.fired.append(pack_bits(fired_TN.t()))
        if self.centroids_EH is not None:
            scores_TE = expert_scores(x_TH, self.centroids_EH.to(x_TH.device))
            self.chosen.append(scores_TE.topk(self.top_k, dim=1).indices)


def collect_statistics(
    ffns: Mapping[str, SwitchableFFN],
    probe: ProbeBatch,
    centroids: Mapping[str, Tensor],
    top_k: Mapping[str, int],
    *,
    signatures: bool = True,
) -> dict[str, LayerStatistics]:
    """Run the probe batch densely and gather the statistics of this stage's networks over its ranks (collective over
    the job: the forward pass needs all stages).

    Args:
        centroids: [E, H] expert scores by network name, for those whose expert choice is wanted.
        top_k: experts per token of each network.
        signatures: whether the bits are wanted, a byte per neuron and eight probe tokens of every rank.
    """
    tensor = probe.topology.tensor
    recorders = {
        name: _Recorder(ffn.bank.neuron_ids.numel() // tensor.size, centroids.get(name), top_k[name], signatures)
        for name, ffn in ffns.items()
    }
    with observed(ffns, recorders):
        probe.loss()
    return {name: _gather(recorder, probe) for name, recorder in recorders.items()}


def expert_overlap(ids_a_TK: Tensor, ids_b_TK: Tensor, num_experts: int) -> float:
    """Mean share of a token's experts that both choices have."""
    one_hot = [
        torch.zeros(len(ids), num_experts, dtype=torch.bool).scatter_(1, ids.cpu().long(), True)
        for ids in (ids_a_TK, ids_b_TK)
    ]
    return float((one_hot[0] & one_hot[1]).sum(1).double().mean()) / ids_a_TK.shape[1]


def pack_bits(bits: Tensor) -> Tensor:
    """Bits [N, T] bool to bytes [N, ceil(T / 8)] uint8, the first bit most significant; short rows end in zeros."""
    padded = torch.nn.functional.pad(bits.to(torch.uint8), (0, -bits.shape[1] % 8))
    weights = torch.tensor(PACK_WEIGHTS, dtype=torch.uint8, device=bits.device)
    return (padded.view(bits.shape[0], -1, 8) * weights).sum(-1, dtype=torch.uint8)


@contextmanager
def observed(ffns: Mapping[str, SwitchableFFN], observers: Mapping[str, Observer]) -> Iterator[None]:
    """Within: every network computes densely and calls its observer (see SwitchableFFN)."""
    modes = {name: ffn.mode for name, ffn in ffns.items()}
    for name, ffn in ffns.items():
        ffn.mode, ffn.observer = "dense", observers[name]
    try:
        yield
    finally:
        for name, ffn in ffns.items():
            ffn.mode, ffn.observer = modes[name], None


def _gather(recorder: _Recorder, probe: ProbeBatch) -> LayerStatistics:
    """Data-parallel ranks saw other tokens, tensor-parallel ones other neurons."""
    topology = probe.topology
    signatures = torch.cat([torch.zeros(recorder.neurons, 0, dtype=torch.uint8), *(f.cpu() for f in recorder.fired)], 1)
    samples = [len(batch["tokens"]) for batch in probe.batches] if recorder.chosen else []
    by_sample = [_by_sample(ids, count) for ids, count in zip(recorder.chosen, samples, strict=True)]
    chosen = torch.cat([torch.zeros(0, recorder.top_k, dtype=torch.int64), *by_sample])
    mine = (signatures, chosen, sum(map(int, recorder.fired_counts)), recorder.pairs)
    parts = topology.stage.gather_objects("activation statistics", mine)
    tensor = topology.tensor.size
    return LayerStatistics(
        active_fraction=sum(part[2] for part in parts) / sum(part[3] for part in parts),
        signatures=torch.cat([torch.cat([part[0] for part in parts[rank::tensor]], 1) for rank in range(tensor)]),
        expert_ids=torch.cat([part[1] for part in parts[::tensor]]),
        tokens=sum(part[3] for part in parts[::tensor]) // recorder.neurons,
    )


def _by_sample(ids_TK: Tensor, samples: int) -> Tensor:
    """Rows of one batch, which come position by position, ordered sample by sample."""
    length = len(ids_TK) // max(1, samples)
    return ids_TK.cpu().view(length, samples, ids_TK.shape[1]).transpose(0, 1).flatten(0, 1)
