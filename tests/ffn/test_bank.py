import pytest
import torch

from ssd_megatron.ffn.bank import NEURON_TENSORS, NeuronBank
from tests.ffn.helpers import make_bank


@pytest.mark.parametrize(
    ("activation", "add_bias", "per_neuron"),
    [
        ("relu", False, ["w_in", "w_out"]),
        ("relu", True, ["w_in", "b_in", "w_out"]),
        ("swiglu", False, ["w_in", "w_gate", "w_out"]),
        ("swiglu", True, ["w_in", "w_gate", "b_in", "b_gate", "w_out"]),
    ],
)
def test_parameters_exist_as_asked_with_one_row_per_neuron(
    activation: str, add_bias: bool, per_neuron: list[str]
) -> None:
    bank = NeuronBank(8, 32, activation, add_bias, dtype=torch.bfloat16)
    named = bank.neuron_parameters()
    assert list(named) == per_neuron
    assert [name for name in NEURON_TENSORS if getattr(bank.tensors(), name) is not None] == per_neuron
    for name, parameter in named.items():
        assert parameter is getattr(bank, name)
        assert parameter.shape == ((32,) if name.startswith("b_") else (32, 8))
        assert parameter.dtype == torch.bfloat16
    assert (bank.b_out is not None) == add_bias
    assert {name for name, _ in bank.named_parameters()} == {*per_neuron, *(["b_out"] if add_bias else [])}


def test_rows_are_those_that_decide_firing() -> None:
    ungated, gated = (NeuronBank(8, 32, name, True) for name in ("relu", "reglu"))
    assert ungated.rows() is ungated.w_in
    assert ungated.tensors().firing == (ungated.w_in, ungated.b_in)
    assert gated.rows() is gated.w_gate
    assert gated.tensors().firing == (gated.w_gate, gated.b_gate)


def test_identities_start_in_order_and_are_saved() -> None:
    bank = make_bank(4, 6, "relu", False, torch.float32)
    assert bank.neuron_ids.tolist() == [0, 1, 2, 3, 4, 5]
    assert bank.neuron_ids.dtype == torch.int64
    bank.neuron_ids.copy_(torch.tensor([3, 1, 2, 0, 5, 4]))
    other = NeuronBank(4, 6, "relu", False)
    other.load_state_dict(bank.state_dict())
    assert other.neuron_ids.tolist() == [3, 1, 2, 0, 5, 4]
