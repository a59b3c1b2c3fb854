"""Brute force: every neuron for every token, the experts not chosen masked out. What the other backends must equal.

Shapes: T tokens, H hidden, F neurons, E experts, K experts per token.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ssd_megatron.ffn.activations import Activation
from ssd_megatron.ffn.bank import NeuronTensors


def sparse_ffn(
    x_TH: Tensor,
    expert_ids_TK: Tensor,
    gates_TK: Tensor | None,
    bank: NeuronTensors,
    activation: Activation,
    num_experts: int,
    scaled: bool,
) -> Tensor:
    """See `ssd_megatron.ffn.kernels.sparse_ffn`; gradients by autograd."""
    num_tokens, num_neurons = len(x_TH), len(bank.w_in)
    factor_TK = torch.ones_like(expert_ids_TK, dtype=x_TH.dtype)
    if gates_TK is not None:
        factor_TK = gates_TK.to(x_TH.dtype) if scaled else factor_TK + (gates_TK - gates_TK.detach()).to(x_TH.dtype)
    column_TK = expert_ids_TK.remainder(num_experts + 1)  # -1 is the last column, which is cut off
    mask_TE = factor_TK.new_zeros(num_tokens, num_experts + 1).scatter(1, column_TK, factor_TK)[:, :num_experts]
    hidden_TF = bank.hidden(activation.act(F.linear(x_TH, *bank.firing)), x_TH)
    return (hidden_TF * mask_TE.repeat_interleave(num_neurons // num_experts, dim=1)) @ bank.w_out
