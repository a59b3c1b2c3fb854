"""Balanced assignment against scipy's exact solution."""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from ssd_megatron.errors import ConfigError
from ssd_megatron.switching.assignment import balanced_assignment, expert_size, spread
from tests.switching.exact import exact_assignment


def chosen_sum(scores_NE: Tensor, labels_N: Tensor) -> float:
    return float(scores_NE.double().gather(1, labels_N[:, None]).sum())


def make_scores(kind: str, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    def clustered(noise: float) -> Tensor:
        """Cosines of neurons in 11 groups with 16 of the neurons: groups do not fit experts."""
        rows = normal(11, 24)[torch.randint(11, (512,), generator=generator)] + noise * normal(512, 24)
        rows = torch.nn.functional.normalize(rows, dim=1)
        return rows @ rows[:16].T

    makers = {
        "uniform": lambda: uniform(512, 16),
        "normal": lambda: normal(384, 32),
        "few neurons": lambda: normal(12, 4),
        "tight clusters": lambda: clustered(0.05),
        "loose clusters": lambda: clustered(1.0),
        "two dimensions": lambda: normal(512, 2) @ normal(2, 16),
        "same order for all": lambda: uniform(512, 1) * torch.arange(16),
        "one expert wanted by all": lambda: uniform(512, 16) + 5.0 * (torch.arange(16) == 3),
        "offsets of experts": lambda: uniform(512, 16) + 100.0 * torch.arange(16),
        "heavy tails": lambda: normal(512, 16) ** 5,
        "duplicates": lambda: uniform(6, 16).repeat(64, 1),
        "near duplicates": lambda: uniform(4, 16).repeat(128, 1) + 1e-5 * uniform(512, 16),
        "ties": lambda: torch.randint(3, (512, 16), generator=generator).float(),
        "rows all equal": lambda: uniform(1, 16).expand(512, 16),
        "experts all equal": lambda: uniform(512, 1).expand(512, 16),
        "all zero": lambda: torch.zeros(512, 16),
        "tiny": lambda: 1e-30 * normal(512, 16),
        "one outlier": lambda: torch.cat([uniform(511, 16), 1e9 * uniform(1, 16)]),
        "one expert": lambda: normal(64, 1),
        "one neuron each": lambda: normal(96, 96),
        "one neuron": lambda: normal(1, 1),
    }
    return makers[kind]()


KINDS = (
    "uniform",
    "normal",
    "few neurons",
    "tight clusters",
    "loose clusters",
    "two dimensions",
    "same order for all",
    "one expert wanted by all",
    "offsets of experts",
    "heavy tails",
    "duplicates",
    "near duplicates",
    "ties",
    "rows all equal",
    "experts all equal",
    "all zero",
    "tiny",
    "one outlier",
    "one expert",
    "one neuron each",
    "one neuron",
)


@pytest.mark.parametrize("kind", KINDS)
def test_is_balanced_and_optimal(kind: str) -> None:
    for seed in range(5):
        scores = make_scores(kind, seed)
        num_neurons, num_experts = scores.shape
        labels = balanced_assignment(scores)
        assert torch.bincount(labels, minlength=num_experts).tolist() == [num_neurons // num_experts] * num_experts
        best = chosen_sum(scores, exact_assignment(scores))
        # What there is to gain over placing neurons without looking: also right for sums near zero.
        stake = best - float(scores.double().mean(1).sum())
        assert best - chosen_sum(scores, labels) <= 1e-9 * (stake + abs(best)) + 1e-40


def test_many_equal_neurons_move_together() -> None:
    labels = balanced_assignment(torch.arange(64.0).expand(8192, 64))
    assert torch.bincount(labels).tolist() == [128] * 64


def test_same_scores_give_same_labels_and_stay_untouched() -> None:
    scores = make_scores("ties", 0)
    before = scores.clone()
    assert torch.equal(balanced_assignment(scores), balanced_assignment(scores))
    assert torch.equal(scores, before)


def test_constants_per_neuron_and_per_expert_change_nothing() -> None:
    scores = make_scores("uniform", 0).double()
    shifted = scores + torch.arange(512)[:, None] - 3.0 * torch.arange(16)
    assert torch.equal(balanced_assignment(scores), balanced_assignment(shifted))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_scores(dtype: torch.dtype) -> None:
    scores = make_scores("normal", 0).to(dtype)
    assert chosen_sum(scores, balanced_assignment(scores)) == pytest.approx(
        chosen_sum(scores, exact_assignment(scores)), rel=1e-9
    )


def test_spread_comes_to_balance() -> None:
    scores = make_scores("one expert wanted by all", 0)
    scores = scores - scores.mean(1, keepdim=True)
    prices = torch.zeros(16)
    for _ in range(30):
        shares, prices = spread(scores, prices, temperature=0.3)
    assert shares.sum(1).sub(1).abs().max() < 1e-6
    assert shares.sum(0).sub(32).abs().max() < 0.01


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_refuses_scores_that_are_not_finite(bad: float) -> None:
    scores = torch.zeros(8, 2)
    scores[3, 1] = bad
    with pytest.raises(ValueError, match="hold NaN or infinity"):
        balanced_assignment(scores)


@pytest.mark.parametrize(("num_neurons", "num_experts"), [(10, 4), (4, 8), (4, 0)])
def test_refuses_experts_of_unequal_size(num_neurons: int, num_experts: int) -> None:
    with pytest.raises(ConfigError, match=rf"num_experts \({num_experts}\) must divide the {num_neurons} neurons: try"):
        expert_size(num_neurons, num_experts)


def test_newton_steps_stay_on_the_device_of_the_scores() -> None:
    """On a GPU that is not there: fake tensors have a device and no values, and refuse to meet those of another one."""
    with FakeTensorMode():
        scores_NE = torch.empty(64, 4, device="cuda", dtype=torch.float64)
        shares_NE, prices_E = spread(scores_NE, scores_NE.new_zeros(4), 0.5)
    assert shares_NE.device.type == prices_E.device.type == "cuda"
