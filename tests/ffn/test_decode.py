"""The network for one or two tokens on a CPU against brute force."""

import pytest
import torch

from ssd_megatron.ffn.kernels import reference
from ssd_megatron.ffn.kernels.decode import few_tokens_ffn
from tests.ffn.helpers import PHI, choose, make_bank


@pytest.mark.parametrize("add_bias", [True, False])
@pytest.mark.parametrize("activation", PHI)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_few_tokens_give_what_the_reference_gives(dtype: torch.dtype, activation: str, add_bias: bool) -> None:
    torch.manual_seed(0)
    bank = make_bank(32, 96, activation, add_bias, dtype)
    exact = bank.tensors().each(lambda t: t.float())
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    for tokens in (1, 2):
        x, ids = torch.randn(tokens, 32).to(dtype), choose(tokens, 8, 3)
        some = ids.clone()
        some[-1, 1] = -1  # computed elsewhere
        for chosen, experts in ((ids, 8), (some, 8), (None, 1)):
            y = few_tokens_ffn(x, chosen, bank.tensors(), bank.activation, experts)
            every = torch.zeros(tokens, 1, dtype=torch.int64) if chosen is None else chosen
            expected = reference.sparse_ffn(x.float(), every, None, exact, bank.activation, experts, False)
            assert y.dtype == dtype
            assert float((y - expected).norm() / expected.norm()) < tolerance


@torch.no_grad()
def test_neurons_that_do_not_fire_give_nothing() -> None:
    bank = make_bank(8, 16, "relu", False, torch.float32)
    bank.w_in.fill_(-1.0)
    x = torch.ones(1, 8)
    assert few_tokens_ffn(x, None, bank.tensors(), bank.activation, 1).equal(torch.zeros(1, 8))
