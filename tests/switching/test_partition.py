"""Partitions: quality against an exact reference and against planted groups, order, similarity, recorded files."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from sklearn.metrics import adjusted_rand_score
from torch import Tensor

from ssd_megatron.errors import ConfigError
from ssd_megatron.switching import partition as partitions
from tests.switching.exact import exact_kmeans


def generator_of(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def planted_rows(seed: int, num_neurons: int = 256, num_groups: int = 8, noise: float = 1.0) -> tuple[Tensor, Tensor]:
    """Rows [N, 32] around group centres, and the groups, of equal size."""
    generator = generator_of(1000 + seed)
    groups = torch.randperm(num_neurons, generator=generator) % num_groups
    centres = torch.randn(num_groups, 32, generator=generator)
    return centres[groups] + noise * torch.randn(num_neurons, 32, generator=generator), groups


def inertia(rows: Tensor, labels: Tensor) -> float:
    """Brute force: squared distances of normalised rows to the mean of their expert."""
    rows = F.normalize(rows.double(), dim=1)
    means = {int(expert): rows[labels == expert].mean(0) for expert in labels.unique()}
    return sum(float((row - means[int(label)]).square().sum()) for row, label in zip(rows, labels, strict=True))


@pytest.mark.parametrize("noise", [0.3, 1.0, 3.0])
def test_kmeans_is_as_good_as_exact_kmeans_from_the_same_start(noise: float) -> None:
    ratios = []
    for seed in range(4):
        rows, _ = planted_rows(seed, noise=noise)
        start = partitions.random_partition(256, 16, seed).labels
        found = partitions.balanced_kmeans(rows, 16, init_labels=start, seed=0, max_rounds=100)
        ratios.append(found.objective / exact_kmeans(rows, start, 16))
    assert max(ratios) <= 1.01
    assert sum(ratios) / len(ratios) <= 1.001


@pytest.mark.parametrize("noise", [0.5, 1.0, 3.0])
def test_fresh_kmeans_is_better_than_exact_kmeans_from_random_labels(noise: float) -> None:
    ratios = []
    for seed in range(4):
        rows, _ = planted_rows(seed, num_groups=24, num_neurons=384, noise=noise)
        start = partitions.random_partition(384, 16, seed).labels
        ratios.append(partitions.balanced_kmeans(rows, 16, seed=seed).objective / exact_kmeans(rows, start, 16))
    assert max(ratios) <= 1.01
    assert sum(ratios) / len(ratios) <= 0.995


def test_kmeans_finds_planted_groups() -> None:
    for seed in range(4):
        rows, groups = planted_rows(seed, noise=0.7)
        found = partitions.balanced_kmeans(rows, 8, seed=seed)
        assert partitions.structure_similarity(found.labels, groups) == 1.0
        assert found.objective == pytest.approx(inertia(rows, groups), rel=1e-5)


def test_objective_is_the_inertia_of_normalised_rows() -> None:
    rows, _ = planted_rows(0, noise=3.0)
    found = partitions.balanced_kmeans(rows, 16, seed=0)
    assert found.objective == pytest.approx(inertia(rows, found.labels), rel=1e-5)
    assert torch.bincount(found.labels).tolist() == [16] * 16


def test_kmeans_depends_on_seed_and_directions_only() -> None:
    rows, _ = planted_rows(0, noise=3.0)
    labels = partitions.balanced_kmeans(rows, 8, seed=1).labels
    assert torch.equal(partitions.balanced_kmeans(rows, 8, seed=1).labels, labels)
    scales = 2.0 ** torch.randint(-3, 4, (256, 1), generator=generator_of(0))
    assert torch.equal(partitions.balanced_kmeans(rows * scales, 8, seed=1).labels, labels)
    assert partitions.structure_similarity(partitions.balanced_kmeans(rows, 8, seed=2).labels, labels) < 1.0


def test_kmeans_without_rounds_returns_its_start() -> None:
    rows, _ = planted_rows(0)
    start = partitions.random_partition(256, 8, 0).labels
    found = partitions.balanced_kmeans(rows, 8, init_labels=start, seed=0, max_rounds=0)
    assert torch.equal(found.labels, start)
    assert found.objective == pytest.approx(inertia(rows, start), rel=1e-5)


def test_one_round_is_one_warm_pass() -> None:
    rows, _ = planted_rows(0, noise=3.0)
    start = partitions.random_partition(256, 8, 0).labels
    found = partitions.balanced_kmeans(rows, 8, init_labels=start, seed=0, max_rounds=1)
    assert torch.equal(found.labels, partitions.warm_assignment_pass(rows, start, 8))
    assert found.objective < inertia(rows, start)


@pytest.mark.parametrize("num_zero", [1, 100, 256])
def test_rows_of_zeros(num_zero: int) -> None:
    rows, _ = planted_rows(0)
    rows[:num_zero] = 0
    found = partitions.balanced_kmeans(rows, 8, seed=0)
    assert torch.bincount(found.labels).tolist() == [32] * 8
    assert found.objective == pytest.approx(inertia(rows, found.labels), rel=1e-5, abs=1e-9)
    passed = partitions.warm_assignment_pass(rows, found.labels, 8)
    assert torch.bincount(passed).tolist() == [32] * 8


@pytest.mark.parametrize("num_experts", [1, 256])
def test_one_expert_and_one_neuron_each(num_experts: int) -> None:
    rows, _ = planted_rows(0)
    found = partitions.balanced_kmeans(rows, num_experts, seed=0)
    assert torch.bincount(found.labels).tolist() == [256 // num_experts] * num_experts
    assert found.objective == pytest.approx(inertia(rows, found.labels), rel=1e-5, abs=1e-3)


def test_bfloat16_rows() -> None:
    rows, groups = planted_rows(0, noise=0.5)
    found = partitions.balanced_kmeans(rows.bfloat16(), 8, seed=0)
    assert partitions.structure_similarity(found.labels, groups) == 1.0


def test_kmeans_partition_keeps_the_better_start() -> None:
    warm_won = fresh_won = 0
    for seed in range(8):
        rows, _ = planted_rows(seed, noise=1.8)
        previous = partitions.balanced_kmeans(rows, 8, seed=100 + seed).labels
        warm = partitions.balanced_kmeans(rows, 8, init_labels=previous, seed=seed)
        fresh = partitions.balanced_kmeans(rows, 8, seed=seed)
        best = partitions.kmeans_partition(rows, 8, previous, seed)
        assert best.objective == min(warm.objective, fresh.objective)
        assert torch.equal(best.labels, (warm if warm.objective <= fresh.objective else fresh).labels)
        assert torch.equal(partitions.kmeans_partition(rows, 8, None, seed).labels, fresh.labels)
        warm_won += warm.objective < fresh.objective
        fresh_won += fresh.objective < warm.objective
    assert min(warm_won, fresh_won) >= 1


def test_warm_pass_keeps_the_names_of_experts() -> None:
    rows, groups = planted_rows(0, noise=0.5)
    strayed = groups.clone()
    first, second = (groups == 2).nonzero()[:5, 0], (groups == 6).nonzero()[:5, 0]
    strayed[first], strayed[second] = 6, 2
    assert torch.equal(partitions.warm_assignment_pass(rows, strayed, 8), groups)


def test_unbalanced_labels_are_refused() -> None:
    rows, groups = planted_rows(0)
    groups[0] = (groups[0] + 1) % 8
    message = "labels give 8 experts between 31 and 33 neurons"
    with pytest.raises(ValueError, match=message):
        partitions.balanced_kmeans(rows, 8, init_labels=groups, seed=0)
    with pytest.raises(ValueError, match=message):
        partitions.warm_assignment_pass(rows, groups, 8)
    with pytest.raises(ValueError, match=message):
        partitions.partition_order(groups, 8)


def test_rows_that_are_not_finite_are_refused() -> None:
    rows, _ = planted_rows(0)
    rows[7, 3] = float("nan")
    with pytest.raises(ValueError, match="hold NaN or infinity"):
        partitions.balanced_kmeans(rows, 8, seed=0)


def planted_signatures(seed: int, num_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Bits [N, T] of 512 neurons in 16 groups that fire at very different rates, packed bits, groups."""
    generator = generator_of(seed)
    groups = torch.randperm(512, generator=generator) % 16
    group_on = torch.rand(num_tokens, 16, generator=generator) < 0.15
    rate = 0.05 * 18 ** torch.rand(512, generator=generator)
    fired = (torch.rand(num_tokens, 512, generator=generator) < rate) & group_on[:, groups]
    noise = torch.rand(num_tokens, 512, generator=generator) < 0.05 * rate
    bits = (fired | noise).T.contiguous()
    return bits, torch.from_numpy(np.packbits(bits.numpy(), axis=1)), groups


def test_coactivation_finds_planted_groups() -> None:
    for seed in range(3):
        _, signatures, groups = planted_signatures(seed, 1001)
        found = partitions.coactivation_partition(signatures, 1001, 16, seed)
        assert torch.bincount(found.labels).tolist() == [32] * 16
        assert partitions.structure_similarity(found.labels, groups) >= 0.95
        share = partitions.cofiring_share(signatures, 1001, found.labels)
        assert share >= 0.995 * partitions.cofiring_share(signatures, 1001, groups)


def test_coactivation_objective_falls_as_the_cofiring_share_rises() -> None:
    bits, signatures, groups = planted_signatures(0, 256)
    found = partitions.coactivation_partition(signatures, 256, 16, 0, init_labels=groups, max_rounds=1)
    weight = bits.sum(0).double().square().sum() - bits.sum()
    share = partitions.cofiring_share(signatures, 256, found.labels)
    inside = share * float(weight) + float(bits.sum())
    assert found.objective == pytest.approx(float(bits.sum()) - inside / 32, rel=1e-5)
    assert share >= partitions.cofiring_share(signatures, 256, groups)


def test_cofiring_share_counts_pairs() -> None:
    bits, signatures, groups = planted_signatures(0, 50)
    together = bits.double() @ bits.double().T
    together.fill_diagonal_(0)
    same = groups[:, None] == groups
    expected = float(together[same].sum() / together.sum())
    assert partitions.cofiring_share(signatures, 50, groups) == pytest.approx(expected, rel=1e-12)


def test_signatures_of_another_length_are_refused() -> None:
    _, signatures, _ = planted_signatures(0, 64)
    with pytest.raises(
        ValueError, match=r"signatures of 65 tokens must be uint8 \[neurons, 9\], not torch.uint8 \[512, 8\]"
    ):
        partitions.coactivation_partition(signatures, 65, 16, 0)


def test_random_partition() -> None:
    found = partitions.random_partition(512, 16, 3)
    assert torch.bincount(found.labels).tolist() == [32] * 16
    assert math.isnan(found.objective)
    assert torch.equal(found.labels, partitions.random_partition(512, 16, 3).labels)
    assert abs(partitions.structure_similarity(found.labels, partitions.random_partition(512, 16, 4).labels)) < 0.02
    with pytest.raises(ConfigError, match=r"num_experts \(15\) must divide the 512 neurons: try 8 or 16"):
        partitions.random_partition(512, 15, 0)


def test_partition_order_is_contiguous_and_stable() -> None:
    order = partitions.partition_order(torch.tensor([2, 0, 1, 0, 2, 1]), 3)
    assert order.tolist() == [1, 3, 2, 5, 0, 4]
    assert order.dtype == torch.int64


def test_similarity_is_the_adjusted_rand_index() -> None:
    generator = generator_of(0)
    cases = [torch.randint(high, (2, 300), generator=generator) for high in (1, 2, 16, 300) for _ in range(5)]
    cases += [torch.stack([torch.arange(300), torch.zeros(300, dtype=torch.int64)]), torch.zeros(2, 1).long()]
    for a, b in cases:
        for left, right in ((a, b), (b, a), (a, (a + 7) % 300), (a, a.roll(3))):
            expected = adjusted_rand_score(left.numpy(), right.numpy())
            assert partitions.structure_similarity(left, right) == pytest.approx(expected, abs=1e-12)
    large = torch.arange(16384) % 64
    assert partitions.structure_similarity(large, 63 - large) == 1.0


def recorded(path: Path, layers: dict[str, Tensor]) -> Path:
    save_file(layers, path)
    return path


def test_partitions_are_recorded_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "partition.safetensors"
    layers = [partitions.random_partition(64, 8, seed).labels for seed in range(12)]
    partitions.save_partition(path, layers)
    assert [file.name for file in tmp_path.iterdir()] == ["partition.safetensors"]
    for num_experts in (8, None):
        read = partitions.load_partition(path, num_experts)
        assert len(read) == 12
        assert all(torch.equal(a, b) for a, b in zip(layers, read, strict=True))


BALANCED = torch.arange(8) % 4


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (
            {"layers.0": BALANCED, "layers.2": BALANCED},
            r"must hold layers.0, .* without gaps, and holds layers.0, layers.2",
        ),
        ({"labels": BALANCED}, "and holds labels"),
        ({"layers.0": BALANCED.float()}, r"labels of layers.0 must be one int64 per neuron, not torch.float32 \[8\]"),
        (
            {"layers.0": BALANCED.view(2, 4)},
            r"labels of layers.0 must be one int64 per neuron, not torch.int64 \[2, 4\]",
        ),
        ({"layers.0": BALANCED[:0]}, r"labels of layers.0 must be one int64 per neuron, not torch.int64 \[0\]"),
        ({"layers.0": BALANCED, "layers.1": BALANCED - 1}, "labels of layers.1 reach from -1 to 2"),
        ({"layers.0": BALANCED * 2}, "labels of layers.0 reach from 0 to 6, and 4 experts are 0 to 3"),
        ({"layers.0": BALANCED.clamp(max=2)}, "layers.0 give 4 experts between 0 and 4 neurons, not the same number"),
        ({"layers.0": torch.arange(8) % 2}, "layers.0 give 4 experts between 0 and 4 neurons"),
    ],
)
def test_faulty_records_are_refused(tmp_path: Path, layers: dict[str, Tensor], message: str) -> None:
    path = recorded(tmp_path / "partition.safetensors", {name: labels.clone() for name, labels in layers.items()})
    with pytest.raises(ConfigError, match=rf"^ssd.partition \({path}\)") as refusal:
        partitions.load_partition(path, 4)
    assert refusal.match(message)


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"ssd.partition .*missing.safetensors\) cannot be read"):
        partitions.load_partition(tmp_path / "missing.safetensors")
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"not a tensor file")
    with pytest.raises(ConfigError, match=r"ssd.partition .*broken.safetensors\) cannot be read .*: try kmeans"):
        partitions.load_partition(broken)
