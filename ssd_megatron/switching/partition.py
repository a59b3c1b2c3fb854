"""Partitions: which expert each neuron of a feed-forward network belongs to.

Balanced k-means maximises how well the neurons of an expert agree. On rows of `w_in` (SSD) that is agreement in what
they look for; on signatures (MoEfication's co-activation graph) it is firing on the same tokens. A fresh start is
annealed: neurons begin spread over several experts and settle while a temperature falls, which ends in clearly better
partitions than k-means from random rows.
"""

# Shapes: N neurons, H features of a neuron, E experts, S = N / E neurons per expert, T tokens, B bytes.

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from ssd_megatron.errors import ConfigError
from ssd_megatron.files import write_atomically
from ssd_megatron.switching.assignment import balanced_assignment, expert_size, spread

# Temperatures of the annealed start, in typical stakes of a neuron (what its best expert gives it above the mean).
# From a higher one, separate groups can melt into one. docs/log.md has what other values gave.
ANNEAL_ROUNDS = 30
_HOTTEST = 0.15
_COLDEST = 0.05


@dataclass(frozen=True)
class Partition:
    """Neurons grouped into experts of equal size.

    Attributes:
        labels: expert of each neuron, [N] int64.
        objective: k-means inertia: sum over the neurons of the squared distance between their row and the mean row of
            their expert; lower is better. Rows of `w_in` are L2-normalised first, signatures are rows of 0 and 1.
            NaN where nothing was minimised (random).
    """

    labels: Tensor
    objective: float


def kmeans_partition(
    rows_NH: Tensor, num_experts: int, previous_labels: Tensor | None, seed: int, max_rounds: int = 20
) -> Partition:
    """The better one of a fresh balanced k-means and, with earlier labels at hand, one that starts from those.

    Args:
        rows_NH: one row per neuron (of `w_in`; of `w_gate` in gated networks), any floating dtype.
        previous_labels: balanced labels [N] to start from, or None.
        max_rounds: most rounds of balanced k-means after each start.
    Raises:
        ConfigError: num_experts does not divide N.
        ValueError: the labels are not balanced, or a row holds NaN or infinity.
    Source: SSD (arXiv 2410.03440).
    """
    fresh = balanced_kmeans(rows_NH, num_experts, seed=seed, max_rounds=max_rounds)
    if previous_labels is None:
        return fresh
    warm = balanced_kmeans(rows_NH, num_experts, init_labels=previous_labels, seed=seed, max_rounds=max_rounds)
    return min(warm, fresh, key=lambda partition: partition.objective)


def balanced_kmeans(
    rows_NH: Tensor, num_experts: int, *, init_labels: Tensor | None = None, seed: int, max_rounds: int = 20
) -> Partition:
    """Balanced k-means on L2-normalised rows; rows of zeros stay zero and go where there is room.

    Args:
        rows_NH: one row per neuron, any floating dtype.
        init_labels: balanced labels [N] to start from; None starts fresh, by `seed`.
        max_rounds: most rounds of expert means and balanced assignment after the start; fewer when labels repeat.
    Raises:
        ConfigError: num_experts does not divide N.
        ValueError: init_labels are not balanced, or a row holds NaN or infinity.
    """
    rows_NH = F.normalize(rows_NH.float(), dim=1)
    if init_labels is None:
        init_labels = _annealed_start(rows_NH, num_experts, seed)
    return _settle(rows_NH, init_labels.to(rows_NH.device), num_experts, max_rounds)


def warm_assignment_pass(rows_NH: Tensor, labels: Tensor, num_experts: int) -> Tensor:
    """Where neurons would go now: one balanced assignment to the current mean rows of the given experts.

    The cheap evidence between switches. Expert e of the result is the one that grew out of expert e.

    Args:
        rows_NH: one row per neuron, any floating dtype.
        labels: balanced labels [N].
    Returns:
        balanced labels [N], int64.
    Raises:
        ValueError: labels are not balanced, or a row holds NaN or infinity.
    """
    rows_NH = F.normalize(rows_NH.float(), dim=1)
    return balanced_assignment(rows_NH @ _expert_means(rows_NH, labels.to(rows_NH.device), num_experts).T)


def coactivation_partition(
    signatures: Tensor,
    num_tokens: int,
    num_experts: int,
    seed: int,
    init_labels: Tensor | None = None,
    max_rounds: int = 20,
) -> Partition:
    """Group neurons that fire on the same tokens.

    Balanced k-means on normalised signatures finds the groups, those of neurons that seldom fire too. Rounds on the
    bits themselves follow: their inertia is a constant minus the co-firing weight inside experts divided by S, so these
    rounds improve the balanced partition of the co-activation graph itself.

    Args:
        signatures: uint8 [N, B], B = ceil(num_tokens / 8); a bit per token, most significant first
            (numpy.packbits): the neuron fired.
        num_tokens: tokens of the probe batch. Memory: about 12 * N * num_tokens bytes at the peak.
        init_labels: balanced labels [N] of an earlier partition, tried as a start beside the fresh one, or None.
    Raises:
        ConfigError: num_experts does not divide N.
        ValueError: signatures of another shape or dtype, or init_labels that are not balanced.
    Source: co-activation partition of MoEfication (arXiv 2110.01786); solving it by k-means is ours.
    """
    fired_NT = _unpack(signatures, num_tokens)
    groups = kmeans_partition(fired_NT, num_experts, init_labels, seed, max_rounds)
    return _settle(fired_NT, groups.labels, num_experts, max_rounds)


def cofiring_share(signatures: Tensor, num_tokens: int, labels: Tensor) -> float:
    """Share of the co-firing weight inside experts: of all pairs that fire on one token, those of one expert.

    About 1 / E for a random partition, 1 if no two neurons of different experts ever fire together.
    NaN if no two neurons fire together at all. Arguments as in `coactivation_partition`.
    """
    fired_NT = _unpack(signatures, num_tokens)
    fired_TE = (fired_NT.T @ F.one_hot(labels.to(fired_NT.device)).float()).double()
    with_itself = fired_TE.sum()
    inside = fired_TE.square().sum() - with_itself
    return float(inside / (fired_TE.sum(1).square().sum() - with_itself))


def random_partition(num_neurons: int, num_experts: int, seed: int) -> Partition:
    """Neurons dealt to experts at random: the control. ConfigError if num_experts does not divide num_neurons."""
    expert_size(num_neurons, num_experts)
    shuffled = torch.randperm(num_neurons, generator=torch.Generator().manual_seed(seed))
    return Partition(shuffled % num_experts, math.nan)


def partition_order(labels: Tensor, num_experts: int) -> Tensor:
    """Permutation [N] int64 that makes experts contiguous: new position i takes the neuron at old position order[i].

    Neurons of one expert keep their order. ValueError if the labels are not balanced.
    """
    _require_balance(labels, num_experts)
    return labels.argsort(stable=True)


def structure_similarity(labels_a: Tensor, labels_b: Tensor) -> float:
    """Adjusted Rand index of two partitions of the same neurons, labels [N] int64 >= 0.

    1 for the same groups whatever their names, about 0 for unrelated ones.
    Source: Hubert and Arabie (1985), by counts of pairs of neurons as in scikit-learn.
    """
    pairs = labels_a * (int(labels_b.max()) + 1) + labels_b
    in_both = _pairs(torch.unique(pairs, return_counts=True)[1])  # of the E x E few occur where experts are many
    in_a, in_b = _pairs(torch.bincount(labels_a)), _pairs(torch.bincount(labels_b))
    by_chance = in_a * in_b / max(1, labels_a.numel() * (labels_a.numel() - 1))
    most = (in_a + in_b) / 2
    return 1.0 if most == by_chance else (in_both - by_chance) / (most - by_chance)


def save_partition(path: Path, labels_by_layer: Sequence[Tensor]) -> None:
    """Record labels [N] of every layer as `layers.0`, `layers.1`, ... of a safetensors file (appears atomically)."""
    write_atomically(path, save({f"layers.{i}": labels.cpu().clone() for i, labels in enumerate(labels_by_layer)}))


def load_partition(path: Path, num_experts: int | None = None) -> list[Tensor]:
    """Labels [N] int64 of every layer, as recorded by `save_partition`.

    Args:
        num_experts: experts that every layer must have; None: as many as its labels name.
    Raises:
        ConfigError: the file cannot be read, a layer is missing, or labels are not a balanced partition.
    """
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ConfigError(
            f"ssd.partition ({path}) cannot be read ({error}): try kmeans, or a file that save_partition wrote"
        ) from error
    names = [f"layers.{i}" for i in range(len(tensors))]
    if not names or set(names) != set(tensors):
        found = ", ".join(sorted(tensors)) or "nothing"
        raise ConfigError(f"ssd.partition ({path}) must hold layers.0, layers.1, ... without gaps, and holds {found}")
    for name in names:
        if fault := _imbalance(tensors[name], num_experts):
            raise ConfigError(f"ssd.partition ({path}): labels of {name} {fault}: record a partition of this model")
    return [tensors[name] for name in names]


def _annealed_start(rows_NH: Tensor, num_experts: int, seed: int) -> Tensor:
    """Balanced labels from k-means whose soft, softly balanced assignments harden round by round."""
    num_neurons = rows_NH.shape[0]
    expert_size(num_neurons, num_experts)
    chosen = torch.randperm(num_neurons, generator=torch.Generator().manual_seed(seed))[:num_experts]
    means_EH = rows_NH[chosen.to(rows_NH.device)]
    prices_E = rows_NH.new_zeros(num_experts)
    for i in range(ANNEAL_ROUNDS):
        scores_NE = rows_NH @ means_EH.T
        scores_NE -= scores_NE.mean(1, keepdim=True)
        stakes = _HOTTEST * (_COLDEST / _HOTTEST) ** (i / (ANNEAL_ROUNDS - 1))
        temperature = max(stakes * float(scores_NE.amax(1).mean()), torch.finfo(torch.float32).tiny)
        shares_NE, prices_E = spread(scores_NE, prices_E, temperature)
        means_EH = shares_NE.T @ rows_NH / shares_NE.sum(0).clamp_(min=1e-6)[:, None]
    return balanced_assignment(rows_NH @ means_EH.T)


def _settle(rows_NH: Tensor, labels: Tensor, num_experts: int, max_rounds: int) -> Partition:
    """Rounds of expert means and balanced assignment until the objective stops falling; the best labels seen."""
    size = expert_size(len(rows_NH), num_experts)
    total = float(rows_NH.square().sum(1).sum(dtype=torch.float64))
    best = Partition(labels, math.inf)
    for rounds_left in range(max_rounds, -1, -1):
        means_EH = _expert_means(rows_NH, labels, num_experts)
        objective = total - size * float(means_EH.double().square().sum())
        if objective >= best.objective:  # labels that repeat end here
            break
        best = Partition(labels, objective)
        if rounds_left:
            labels = balanced_assignment(rows_NH @ means_EH.T)
    return best


def _expert_means(rows_NH: Tensor, labels: Tensor, num_experts: int) -> Tensor:
    _require_balance(labels, num_experts)
    members_ES = labels.argsort(stable=True).view(num_experts, -1)
    return F.embedding_bag(members_ES, rows_NH, mode="mean")  # gathers and adds in one pass, in a fixed order


def _pairs(sizes: Tensor) -> int:
    """Ordered pairs of neurons inside groups of these sizes."""
    return int((sizes * (sizes - 1)).sum())


def _unpack(signatures: Tensor, num_tokens: int) -> Tensor:
    """Bits [N, T] as float32 0 and 1."""
    num_bytes = (num_tokens + 7) // 8
    if signatures.dtype != torch.uint8 or signatures.dim() != 2 or signatures.shape[1] != num_bytes:
        raise ValueError(
            f"signatures of {num_tokens} tokens must be uint8 [neurons, {num_bytes}], "
            f"not {signatures.dtype} {list(signatures.shape)}"
        )
    shifts = torch.arange(7, -1, -1, dtype=torch.uint8, device=signatures.device)
    return ((signatures[:, :, None] >> shifts) & 1).flatten(1)[:, :num_tokens].float()


def _require_balance(labels: Tensor, num_experts: int) -> None:
    if fault := _imbalance(labels, num_experts):
        raise ValueError(f"labels {fault}")


def _imbalance(labels: Tensor, num_experts: int | None) -> str:
    """What keeps labels from being a balanced partition (into that many experts, if given); empty if nothing does."""
    if labels.dtype != torch.int64 or labels.dim() != 1 or labels.numel() == 0:
        return f"must be one int64 per neuron, not {labels.dtype} {list(labels.shape)}"
    lowest, highest = int(labels.min()), int(labels.max())
    num_experts = num_experts or highest + 1
    if lowest < 0 or highest >= num_experts:
        return f"reach from {lowest} to {highest}, and {num_experts} experts are 0 to {num_experts - 1}"
    sizes = torch.bincount(labels, minlength=num_experts)
    smallest, largest = int(sizes.min()), int(sizes.max())
    if smallest != largest:
        return f"give {num_experts} experts between {smallest} and {largest} neurons, not the same number"
    return ""
