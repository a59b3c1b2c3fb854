"""Small banks and inputs from a seed, and the sparse network written token by token."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ssd_megatron.ffn.bank import NeuronBank
from ssd_megatron.ffn.kernels import cpp_build, sparse_ffn

PHI = {
    "relu": F.relu,
    "squared_relu": lambda pre: F.relu(pre) ** 2,
    "reglu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda pre: F.gelu(pre, approximate="tanh"),
    "silu": F.silu,
    "geglu": F.gelu,
    "geglu_tanh": lambda pre: F.gelu(pre, approximate="tanh"),
    "swiglu": F.silu,
}
GATED = {"reglu", "geglu", "geglu_tanh", "swiglu"}
PLAIN = ("reference", "torch")  # backends that run everywhere and in fp64; test_triton.py has the one for GPUs
HAS_CPP = cpp_build.lacking(torch.float32) is None and cpp_build.lacking(torch.bfloat16) is None
FAST = ("torch", *(["cpp"] if HAS_CPP else []))


def make_bank(hidden: int, neurons: int, activation: str, add_bias: bool, dtype: torch.dtype) -> NeuronBank:
    bank = NeuronBank(hidden, neurons, activation, add_bias, dtype=dtype)
    with torch.no_grad():
        for parameter in bank.parameters():
            parameter.normal_(std=0.4)
    return bank


def make_inputs(tokens: int, hidden: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x, which wants a gradient, and the gradient of y."""
    return torch.randn(tokens, hidden, dtype=dtype).requires_grad_(), torch.randn(tokens, hidden, dtype=dtype)


def choose(tokens: int, experts: int, top_k: int, skew: float = 0.0) -> Tensor:
    """Random experts for each token; with `skew` the same few are chosen by most."""
    scores_TE = torch.randn(tokens, experts) + skew * torch.randn(experts)
    return scores_TE.topk(top_k, dim=1).indices


def brute_force(x_TH: Tensor, expert_ids_TK: Tensor, gates_TK: Tensor, bank: NeuronBank, experts: int) -> Tensor:
    """One token and one expert at a time, each output truly multiplied by its gate."""
    phi, name = PHI[bank.activation.name], bank.activation.name
    size = len(bank.w_in) // experts
    outputs = []
    for x_H, ids_K, gates_K in zip(x_TH, expert_ids_TK.tolist(), gates_TK, strict=True):
        y_H = torch.zeros_like(x_H)
        for expert, gate in zip(ids_K, gates_K, strict=True):
            neurons = slice(expert * size, (expert + 1) * size)
            up = bank.w_in[neurons] @ x_H + (0 if bank.b_in is None else bank.b_in[neurons])
            if name in GATED:
                pre = bank.w_gate[neurons] @ x_H + (0 if bank.b_gate is None else bank.b_gate[neurons])
                hidden = phi(pre) * up
            else:
                hidden = phi(up)
            y_H = y_H + gate * (hidden @ bank.w_out[neurons])
        outputs.append(y_H)
    return torch.stack(outputs)


def relative_error(got: Tensor, wanted: Tensor) -> float:
    got, wanted = got.double(), wanted.double()
    return ((got - wanted).norm() / wanted.norm().clamp(min=1e-30)).item()


def gradients(y: Tensor, dy: Tensor, x: Tensor, gates: Tensor | None, bank: NeuronBank) -> dict[str, Tensor]:
    wanted = {"x": x, **bank.neuron_parameters()} | ({} if gates is None else {"gate": gates})
    return {"y": y, **dict(zip(wanted, torch.autograd.grad(y, list(wanted.values()), dy), strict=True))}


def run(
    backend: str,
    x: Tensor,
    dy: Tensor,
    ids: Tensor,
    gates: Tensor | None,
    bank: NeuronBank,
    experts: int,
    scaled: bool = False,
) -> dict[str, Tensor]:
    """Output and gradients by name."""
    y = sparse_ffn(x, ids, gates, bank.tensors(), bank.activation, experts, backend, scaled)
    return gradients(y, dy, x, gates, bank)


def assert_close(got: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float) -> None:
    assert got.keys() == wanted.keys()
    for name in wanted:
        assert got[name].dtype == wanted[name].dtype and got[name].shape == wanted[name].shape, name
        assert relative_error(got[name], wanted[name]) < tolerance, name
