"""The sparse feed-forward network in C++ kernels of our own, for CPUs with AVX-512 (fp32) or AMX (bf16): backend "cpp".

Shapes: T tokens, H hidden, F neurons, E experts of N neurons, K experts per token, C rows (token copies sorted by
expert; see cpp_products.py for the shapes of their tensors).

Three products, each with what surrounds it in the cache: `up` gathers the rows' tokens, `down` adds up the rows of each
token in fp32, `linear_grad` gathers again. No tensor has a row of H for each copy. Kept for the backward are inputs,
rows, and the neurons' outputs for ReLU, else the pre-activations. Gates that scale are passes of their own over [C, N];
they could go where `down` adds a row up, and on the gradients that `up` gathers.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ssd_megatron.ffn.activations import Activation
from ssd_megatron.ffn.bank import NeuronTensors
from ssd_megatron.ffn.kernels.cpp_products import Products, Rows, sort_copies


def sparse_ffn(
    x_TH: Tensor,
    expert_ids_TK: Tensor,
    gates_TK: Tensor | None,
    bank: NeuronTensors,
    activation: Activation,
    num_experts: int,
    scaled: bool,
) -> Tensor:
    """See `ssd_megatron.ffn.kernels.sparse_ffn`; x and the bank in fp32 or bf16."""
    return _apply(x_TH, expert_ids_TK, gates_TK, activation, num_experts, scaled, *bank)


def _of_rows(gates_TK: Tensor, copy_C: Tensor, like_CN: Tensor) -> Tensor:
    """The gate of each row, [C, 1]; 0 in rows that are left over."""
    gate_C = like_CN.new_zeros(len(like_CN))
    gate_C[: len(copy_C)] = gates_TK.flatten()[copy_C.long()]
    return gate_C.unsqueeze(1)


class _SparseFFN(torch.autograd.Function):
    """Arguments: x, expert ids, gates, activation, number of experts, whether outputs are scaled by the gates, then the
    fields of NeuronTensors."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TH: Tensor,
        expert_ids_TK: Tensor,
        gates_TK: Tensor | None,
        activation: Activation,
        num_experts: int,
        scaled: bool,
        *neuron_tensors: Tensor,
    ) -> Tensor:
        bank, x_TH = NeuronTensors(*neuron_tensors), x_TH.contiguous()
        rows = sort_copies(expert_ids_TK, num_experts)
        products = Products(rows, x_TH, len(bank.w_in) // num_experts)
        pre_CN = x_TH.new_empty(products.shape)
        up_CN = None if bank.w_gate is None else torch.empty_like(pre_CN)
        products.up(x_TH, *bank.firing, pre_CN, relu=activation.name == "relu")
        hidden_CN = pre_CN if activation.name == "relu" else activation.act(pre_CN)
        if up_CN is not None:
            hidden_CN = hidden_CN * products.up(x_TH, bank.w_in, bank.b_in, up_CN)
        gate_C1 = _of_rows(gates_TK, rows.copy_C, pre_CN) if scaled and gates_TK is not None else None
        if gate_C1 is not None:
            hidden_CN = hidden_CN * gate_C1
        ctx.save_for_backward(x_TH, *rows, pre_CN, up_CN, gate_C1, *neuron_tensors)
        ctx.activation, ctx.num_experts, ctx.top_k = activation, num_experts, expert_ids_TK.shape[1]
        return products.down(hidden_CN, bank.w_out, torch.empty_like(x_TH))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TH: Tensor) -> tuple[Tensor | None, ...]:
        x_TH, token_C, copy_C, first_E, pre_CN, up_CN, gate_C1, *neuron_tensors = ctx.saved_tensors
        activation: Activation = ctx.activation
        bank, dy_TH = NeuronTensors(*neuron_tensors), dy_TH.contiguous()
        grads = bank.each(torch.empty_like)
        rows = Rows(token_C, copy_C, first_E)
        products = Products(rows, x_TH, len(bank.w_in) // ctx.num_experts)
        dgates_TK = x_TH.new_zeros(len(x_TH), ctx.top_k, dtype=torch.float32) if ctx.needs_input_grad[2] else None
        d_CN, d_up_CN = torch.empty_like(pre_CN), None
        if activation.name == "relu":
            products.linear_grad(pre_CN if gate_C1 is None else pre_CN * gate_C1, dy_TH, grads.w_out)
            products.up(dy_TH, bank.w_out, None, d_CN, outputs_CN=pre_CN, dgates_TK=dgates_TK)
        else:
            fired_CN = activation.act_again(pre_CN)
            hidden_CN = fired_CN if up_CN is None else fired_CN * up_CN
            products.linear_grad(hidden_CN if gate_C1 is None else hidden_CN * gate_C1, dy_TH, grads.w_out)
            products.up(dy_TH, bank.w_out, None, d_CN)
            if dgates_TK is not None:
                dgate_C = (d_CN * hidden_CN)[: len(copy_C)].sum(dim=1, dtype=torch.float32)
                dgates_TK.view(-1).index_copy_(0, copy_C.long(), dgate_C)
            d_up_CN = None if up_CN is None else d_CN * fired_CN
            activation.slope_(d_CN if up_CN is None else d_CN.mul_(up_CN), pre_CN)
        if gate_C1 is not None:
            d_CN.mul_(gate_C1)
            d_up_CN = None if d_up_CN is None else d_up_CN.mul_(gate_C1)
        products.linear_grad(d_CN, x_TH, *grads.firing)
        if d_up_CN is not None:
            products.linear_grad(d_up_CN, x_TH, grads.w_in, grads.b_in)
        second = () if d_up_CN is None else (d_up_CN, bank.w_in)
        dx_TH = products.down(d_CN, bank.firing[0], torch.empty_like(x_TH), *second)
        return dx_TH, None, dgates_TK, None, None, None, *grads


_apply: Callable[..., Tensor] = _SparseFFN.apply
