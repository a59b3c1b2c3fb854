"""Attention of short sequences against torch's own."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ssd_megatron.model.attention_gradients import LONGEST, attend, pays

LOOKS = torch.ones(7, 7, dtype=torch.bool).tril(2)


def inputs(groups: int, dtype: torch.dtype, length: int = 7) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 4, length, 8), (2, groups, length, 8), (2, groups, length, 8))
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("mask", [None, "causal", "bool", "bias"])
def test_gradients_are_those_of_torch(groups: int, mask: str | None) -> None:
    query, key, value = inputs(groups, torch.float64)
    bias = torch.randn(1, 4, 7, 7, dtype=torch.float64).masked_fill(~LOOKS, -torch.inf).requires_grad_()
    hidden = {"bool": LOOKS, "bias": bias}.get(mask or "")
    learned = [query, key, value] + ([bias] if mask == "bias" else [])
    mine = attend(query, key, value, hidden, mask == "causal")
    theirs = F.scaled_dot_product_attention(
        query, key, value, hidden, is_causal=mask == "causal", enable_gqa=groups < 4
    )
    assert torch.equal(mine, theirs)
    dcontext, gradients = torch.randn(mine.shape, dtype=torch.float64), []
    for out in (mine, theirs):
        gradients.append(torch.autograd.grad(out, learned, dcontext))
    torch.testing.assert_close(*gradients)


def test_bf16_is_as_near_as_torch() -> None:
    exact = inputs(4, torch.float64, 64)
    low = [t.detach().bfloat16().requires_grad_() for t in exact]
    dcontext = torch.randn(2, 4, 64, 8).bfloat16()
    expected = torch.autograd.grad(F.scaled_dot_product_attention(*exact, is_causal=True), exact, dcontext.double())
    found = torch.autograd.grad(attend(*low, None, True), low, dcontext)
    for gradient, wanted in zip(found, expected, strict=True):
        assert float((gradient - wanted).norm() / wanted.norm()) < 1e-2


def test_it_is_for_short_sequences_in_bf16_that_are_learned_from() -> None:
    query, key, _ = inputs(4, torch.bfloat16)
    long = torch.empty(1, 4, LONGEST + 1, 8, dtype=torch.bfloat16)
    assert pays(query, key) and not pays(query.float(), key.float())
    assert not pays(long, key) and not pays(query, long)
    with torch.no_grad():
        assert not pays(query, key)
