from typing import get_args

import pytest
import torch

from ssd_megatron.config.model import Activation
from ssd_megatron.ffn.activations import ACTIVATIONS
from ssd_megatron.moefication.conversion import TO_RELU
from tests.ffn.helpers import GATED, PHI


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_value_and_slope_are_those_of_autograd(name: str) -> None:
    torch.manual_seed(0)
    pre = torch.randn(64, dtype=torch.float64).requires_grad_()
    d = torch.randn(64, dtype=torch.float64)
    wanted = PHI[name](pre)
    (slope,) = torch.autograd.grad(wanted, pre, d)

    activation, kept = ACTIVATIONS[name], pre.detach().clone()
    assert torch.equal(activation.act(kept), wanted)
    version = kept._version
    assert torch.equal(activation.act_again(kept), wanted)
    assert kept._version == version, "act_again must not write: backward may run twice"
    assert torch.allclose(activation.slope_(d, kept), slope, atol=1e-15, rtol=1e-13)


def test_names_gates_and_sparsity() -> None:
    assert list(ACTIVATIONS) == list(get_args(Activation))
    assert {name for name, activation in ACTIVATIONS.items() if activation.gated} == GATED
    assert {name for name, activation in ACTIVATIONS.items() if activation.sparse} == {"relu", "squared_relu", "reglu"}
    assert {name for name, activation in ACTIVATIONS.items() if not activation.sparse} == TO_RELU.keys()
    assert all(ACTIVATIONS[name].gated == ACTIVATIONS[relu].gated for name, relu in TO_RELU.items())
    assert all(activation.name == name for name, activation in ACTIVATIONS.items())
