"""The sparse feed-forward network in plain PyTorch operators, for CPU and GPU: backend "torch".

Shapes: T tokens, H hidden, F neurons, E experts, K experts per token, S slots; inside one segment g experts of
N neurons with C slots each (dispatch.py).

Segment by segment: gather token rows, batched matmuls, results into one expanded [S, H] buffer; then `embedding_bag`
adds up the K rows of each token. One autograd function, since autograd over slices of the weights would make a
full-size gradient per slice. Kept for the backward: the pre-activations, the inputs and the slots; rows are gathered
again. Nothing is added up atomically, so results are the same bit by bit in every run.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ssd_megatron.ffn.activations import Activation
from ssd_megatron.ffn.bank import NeuronTensors
from ssd_megatron.ffn.kernels.dispatch import Segment, dispatch
from ssd_megatron.ffn.kernels.workspace import scratch


def sparse_ffn(
    x_TH: Tensor,
    expert_ids_TK: Tensor,
    gates_TK: Tensor | None,
    bank: NeuronTensors,
    activation: Activation,
    num_experts: int,
    scaled: bool,
) -> Tensor:
    """See `ssd_megatron.ffn.kernels.sparse_ffn`."""
    return _apply(x_TH, expert_ids_TK, gates_TK, activation, num_experts, scaled, *bank)


def _of_slots(gates_TK: Tensor, slot_TK: Tensor, slots: int, dtype: torch.dtype) -> Tensor:
    """The gate of each slot, [S, 1]; 0 in padding slots."""
    gate_S = gates_TK.new_zeros(slots + 1, dtype=dtype)
    return gate_S.index_copy_(0, slot_TK.flatten(), gates_TK.flatten().to(dtype))[:-1].unsqueeze(1)


def _add_up(slot_TK: Tensor, rows_SH: Tensor, complete: bool) -> Tensor:
    """Sum of the rows of each token's copies, [T, H]. `rows_SH` has one row more than slots, for copies without one."""
    if complete:
        return F.embedding_bag(slot_TK, rows_SH[:-1], mode="sum")
    return F.embedding_bag(slot_TK, rows_SH, mode="sum", padding_idx=len(rows_SH) - 1)


def _by_expert(bank: NeuronTensors, num_experts: int) -> NeuronTensors:
    """Views of [F, ...] tensors as [E, N, ...]."""
    return bank.each(lambda t: t.view(num_experts, -1, *t.shape[1:]))


def _of(segment: Segment, bank: NeuronTensors) -> NeuronTensors:
    """The segment's experts of [E, N, ...] tensors."""
    return bank.each(lambda t: t[segment.experts])


def _gather(source_TH: Tensor, token_S: Tensor, segment: Segment) -> Tensor:
    """The rows of the segment's tokens, [g, C, H], in scratch memory: gone with the next call."""
    tokens, width = token_S[segment.slots], source_TH.shape[1]
    rows = scratch("rows", (len(tokens), width), source_TH)
    torch.index_select(source_TH, 0, tokens, out=rows)
    return rows.view(segment.num_experts, segment.capacity, width)


def _linear(rows_gCH: Tensor, w_gNH: Tensor, b_gN: Tensor | None, out_gCN: Tensor) -> Tensor:
    if b_gN is None:
        return torch.bmm(rows_gCH, w_gNH.mT, out=out_gCN)
    return torch.baddbmm(b_gN.unsqueeze(1), rows_gCH, w_gNH.mT, out=out_gCN)


def _linear_grad(d_gCN: Tensor, rows_gCH: Tensor, dw_gNH: Tensor, db_gN: Tensor | None) -> None:
    torch.bmm(d_gCN.mT, rows_gCH, out=dw_gNH)
    if db_gN is not None:
        torch.sum(d_gCN, dim=1, out=db_gN)


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
        width = x_TH.shape[1]
        bank = _by_expert(NeuronTensors(*neuron_tensors), num_experts)
        token_S, slot_TK, segments, complete = dispatch(expert_ids_TK, num_experts, width * x_TH.element_size())
        token_of_row_S = token_S.clamp(max=len(x_TH) - 1)  # padding slots take any row
        pre_SN = x_TH.new_empty(len(token_S), bank.w_in.shape[1])
        up_SN = None if bank.w_gate is None else torch.empty_like(pre_SN)
        out_SH = scratch("out", (len(token_S) + 1, width), x_TH)
        gate_S1 = _of_slots(gates_TK, slot_TK, len(token_S), x_TH.dtype) if scaled and gates_TK is not None else None
        for segment in segments:
            expert = _of(segment, bank)
            rows = _gather(x_TH, token_of_row_S, segment)
            hidden = activation.act(_linear(rows, *expert.firing, segment.bucket(pre_SN)))
            if up_SN is not None:
                hidden = hidden * _linear(rows, expert.w_in, expert.b_in, segment.bucket(up_SN))
            if gate_S1 is not None:
                hidden = hidden * segment.bucket(gate_S1)
            torch.bmm(hidden, expert.w_out, out=segment.bucket(out_SH))
        # What a recomputed forward would make again is saved as tensors, so that checkpointing frees it.
        ctx.save_for_backward(x_TH, token_S, slot_TK, pre_SN, up_SN, gate_S1, *neuron_tensors)
        ctx.segments, ctx.complete = segments, complete
        ctx.activation, ctx.num_experts = activation, num_experts
        return _add_up(slot_TK, out_SH, complete)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TH: Tensor) -> tuple[Tensor | None, ...]:
        # First of all: under checkpointing this line runs the forward again, which uses the scratch memory.
        x_TH, token_S, slot_TK, pre_SN, up_SN, gate_S1, *neuron_tensors = ctx.saved_tensors
        activation: Activation = ctx.activation
        bank = NeuronTensors(*neuron_tensors)
        grads = bank.each(torch.empty_like)
        bank, grads_E = _by_expert(bank, ctx.num_experts), _by_expert(grads, ctx.num_experts)
        dgate_S = x_TH.new_zeros(len(token_S) + 1) if ctx.needs_input_grad[2] else None
        token_of_row_S = token_S.clamp(max=len(x_TH) - 1)
        padded_dy = scratch("dy", (len(x_TH) + 1, x_TH.shape[1]), x_TH)
        padded_dy[:-1] = dy_TH
        padded_dy[-1] = 0  # the row of padding slots, which so add nothing to any gradient
        dx_SH = scratch("out", (len(token_S) + 1, x_TH.shape[1]), x_TH)
        for segment in ctx.segments:
            expert, grad = _of(segment, bank), _of(segment, grads_E)
            pre, dx = segment.bucket(pre_SN), segment.bucket(dx_SH)
            fired = activation.act_again(pre)
            up = None if up_SN is None else segment.bucket(up_SN)
            hidden = fired if up is None else fired * up

            dy = _gather(padded_dy, token_S, segment)
            gate = None if gate_S1 is None else segment.bucket(gate_S1)
            torch.bmm((hidden if gate is None else hidden * gate).mT, dy, out=grad.w_out)
            d = torch.bmm(dy, expert.w_out.mT, out=scratch("hidden", pre.shape, pre))
            if dgate_S is not None:
                product = torch.mul(d, hidden, out=scratch("product", pre.shape, pre))
                torch.sum(product.flatten(0, 1), dim=1, out=dgate_S[segment.slots])
            if gate is not None:
                d.mul_(gate)

            d_up = None if up is None else d * fired
            d_pre = activation.slope_(d if up is None else d.mul_(up), pre)
            rows = _gather(x_TH, token_of_row_S, segment)
            _linear_grad(d_pre, rows, *grad.firing)
            torch.bmm(d_pre, expert.firing[0], out=dx)
            if d_up is not None:
                _linear_grad(d_up, rows, grad.w_in, grad.b_in)
                dx.baddbmm_(d_up, expert.w_in)
        dx_TH = _add_up(slot_TK, dx_SH, ctx.complete)
        dgates_TK = None if dgate_S is None else dgate_S[slot_TK]
        return dx_TH, None, dgates_TK, None, None, None, *grads


_apply: Callable[..., Tensor] = _SparseFFN.apply
