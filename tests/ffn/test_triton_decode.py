"""The GPU's kernels for one or two tokens: on a GPU if there is one, else in Triton's interpreter."""

import pytest
import torch

from ssd_megatron.ffn.activations import ACTIVATIONS
from ssd_megatron.ffn.kernels import reference
from ssd_megatron.ffn.kernels.triton_decode import best_experts, few_tokens_ffn
from ssd_megatron.ffn.routers import Router, Seen
from tests.ffn.helpers import choose, make_bank

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@torch.no_grad()
def test_few_tokens_give_what_the_reference_gives(activation: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for tokens, hidden, size, add_bias in ((1, 40, 24, True), (2, 272, 20, False)):  # no multiples of the tiles
        bank = make_bank(hidden, 8 * size, activation, add_bias, dtype).to(DEVICE)
        exact = bank.tensors().each(lambda t: t.float())
        x, ids = torch.randn(tokens, hidden).to(DEVICE, dtype), choose(tokens, 8, 3).to(DEVICE)
        ids[-1, 1] = -1  # computed elsewhere
        y = few_tokens_ffn(x, ids, bank.tensors(), bank.activation, 8)
        expected = reference.sparse_ffn(x.float(), ids, None, exact, bank.activation, 8, False)
        assert y.dtype == dtype
        assert float((y - expected).norm() / expected.norm()) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", ["centroid", "avg_k"])
@torch.no_grad()
def test_few_tokens_go_where_the_router_sends_them(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for tokens, experts, top_k in ((1, 5, 5), (2, 33, 7)):  # no multiples of the tiles
        biased = kind == "centroid"
        router = Router(1100, experts, top_k, "straight_through", kind=kind, balance_bias=biased, dtype=dtype)
        for parameter in router.parameters():
            parameter.normal_(std=20.0)
        seen, x = Seen(torch.randn(experts, 1100)), torch.randn(tokens, 1100).to(dtype)
        expected = router.route(x, seen).expert_ids_TK
        rows = router.scoring_rows(seen)
        assert rows is not None
        found = best_experts(*(t if t is None else t.to(DEVICE) for t in (x, rows, router.bias)), top_k)
        assert torch.equal(found.cpu(), expected)


def test_a_score_that_is_no_number_still_gives_experts() -> None:
    x, rows = torch.full((1, 16), torch.nan, device=DEVICE), torch.ones(5, 16, device=DEVICE)
    assert int(best_experts(x, rows, None, 3).max()) < 5
