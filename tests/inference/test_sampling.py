"""The choice of tokens, on distributions that one can work out by hand."""

import math
from typing import Any

import pytest
import torch

from ssd_megatron.errors import ConfigError
from ssd_megatron.inference.sampling import Sampling, choose, keep_top_k, keep_top_p, penalize

LOGITS = torch.tensor([[0.5, 0.125, 0.25, 0.125], [0.1, 0.2, 0.3, 0.4]]).log()
NEVER = -torch.inf


def shares(sampling: Sampling, draws: int = 4000) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sampling.seed)
    chosen = choose(LOGITS[:1].expand(draws, -1), None, sampling, generator)
    return chosen.bincount(minlength=4) / draws


def test_greedy_takes_the_likeliest() -> None:
    assert choose(LOGITS, None, Sampling(greedy=True), torch.Generator()).tolist() == [0, 3]


def test_draws_follow_temperature() -> None:
    torch.testing.assert_close(shares(Sampling()), LOGITS[0].exp(), rtol=0, atol=0.03)
    # At half the temperature probabilities are squared.
    torch.testing.assert_close(shares(Sampling(temperature=0.5)), torch.tensor([16.0, 1, 4, 1]) / 22, rtol=0, atol=0.03)


def test_top_k_and_top_p_leave_the_likeliest() -> None:
    assert (keep_top_k(LOGITS, 2) > NEVER).tolist() == [[True, False, True, False], [False, False, True, True]]
    assert keep_top_k(LOGITS, 9).equal(LOGITS)
    assert (keep_top_p(LOGITS, 0.74) > NEVER).tolist() == [[True, False, True, False], [False, True, True, True]]
    assert (keep_top_p(LOGITS, 0.01) > NEVER).sum(dim=1).tolist() == [1, 1]
    assert shares(Sampling(top_k=1))[0] == 1
    torch.testing.assert_close(shares(Sampling(top_p=0.7)), torch.tensor([2.0, 0, 1, 0]) / 3, rtol=0, atol=0.03)


def test_repetition_penalty_makes_seen_tokens_less_likely() -> None:
    logits, seen = torch.tensor([[2.0, -2.0, 1.5]]), torch.tensor([[True, True, False]])
    assert penalize(logits, seen, 2.0).tolist() == [[1.0, -4.0, 1.5]]
    assert choose(logits, seen, Sampling(greedy=True, repetition_penalty=2.0), torch.Generator()).tolist() == [2]


def test_the_seed_decides() -> None:
    assert shares(Sampling(seed=3)).equal(shares(Sampling(seed=3)))
    assert not shares(Sampling(seed=3)).equal(shares(Sampling(seed=4)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, r"temperature \(0\) must be above 0: for the likeliest token use greedy"),
        ({"temperature": math.nan}, r"temperature \(nan\) must be above 0"),
        ({"repetition_penalty": math.nan}, r"repetition_penalty \(nan\) must be above 0"),
        ({"top_p": 0.0}, r"top_p \(0\) must be above 0"),
        ({"top_k": 0}, r"top_k of sampling \(0\) must be at least 1"),
        ({"greedy": True, "top_p": 0.9}, r"top_p \(0.9\) has no effect with greedy"),
        ({"repetition_penalty": 0.0}, r"repetition_penalty \(0\) must be above 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Sampling(**settings)
