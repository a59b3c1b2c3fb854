"""The sparse feed-forward network in Triton kernels, for GPUs: backend "triton".

Shapes: T tokens, H hidden, F neurons, E experts of N neurons, K experts per token, C = T * K rows (token copies sorted
by expert), P parts of N.

Kept for the backward besides inputs and rows: the neurons' outputs [C, N] alone where they tell the activation's slope
(ReLU, squared ReLU), else the pre-activations. Nothing waits for the device and nothing is added up atomically: with
the same tiles (triton_tuning.py) results are the same bit by bit in every run. The structure is SonicMoE's (arXiv
2512.14080): gathers in the loads, expanded rows stored once and then summed.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from ssd_megatron.ffn.activations import Activation
from ssd_megatron.ffn.bank import NeuronTensors
from ssd_megatron.ffn.kernels import triton_kernels as kernels
from ssd_megatron.ffn.kernels.triton_routing import Rows, sort_copies
from ssd_megatron.ffn.kernels.triton_tuning import NARROWEST

OUTPUT_IS_ENOUGH = ("relu", "squared_relu")  # these activations' slope can be told from their output


def sparse_ffn(
    x_TH: Tensor,
    expert_ids_TK: Tensor,
    gates_TK: Tensor | None,
    bank: NeuronTensors,
    activation: Activation,
    num_experts: int,
    scaled: bool,
) -> Tensor:
    """See `ssd_megatron.ffn.kernels.sparse_ffn`; x and the bank in bf16, fp16 or fp32.

    Scaling is three passes over [C, N] between the kernels: routers that scale are there to be compared with.
    """
    assert all(t is None or t.is_contiguous() for t in bank)
    return _apply(x_TH, expert_ids_TK, gates_TK, activation, num_experts, scaled, *bank)


def _of_rows(gates_TK: Tensor, rows: Rows, dtype: torch.dtype) -> Tensor:
    """The gate of each row, [C, 1]."""
    copies = len(rows.token_C)
    row_C = torch.where(rows.row_TK < 0, copies, rows.row_TK).flatten().long()
    return gates_TK.new_ones(copies + 1, dtype=dtype).index_copy_(0, row_C, gates_TK.flatten().to(dtype))[:-1, None]


def _sizes(rows: Rows, x_TH: Tensor, bank: NeuronTensors, num_experts: int) -> dict[str, Any]:
    """What every matmul kernel wants to know. fp32 is multiplied as torch would: `set_float32_matmul_precision`."""
    precision = "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    size = len(bank.w_in) // num_experts
    return {"H": x_TH.shape[1], "N": size, "PRECISION": precision, "load": rows.load, "first_row": rows.first_row_E}


def _tiles(rows: Rows) -> dict[str, Any]:
    return {"tile_expert": rows.tile_expert_M, "tile_row": rows.tile_row_M, "BM": rows.tile_size}


def _tiles_by(rows: Rows, columns: int) -> Callable[[dict[str, int]], tuple[int]]:
    """A program for each tile of rows and of columns."""
    return lambda tile: (len(rows.tile_expert_M) * triton.cdiv(columns, tile["BN"]),)


def _down(
    a_CN: Tensor, w_FH: Tensor, a_up_CN: Tensor | None, w_up_FH: Tensor | None, rows: Rows, sizes: dict[str, Any]
) -> Tensor:
    """The sum over each token's copies of a w + a_up w_up, [T, H]."""
    width, (num_tokens, top_k) = sizes["H"], rows.row_TK.shape
    expanded_CH, out_TH = a_CN.new_empty(len(a_CN), width), a_CN.new_empty(num_tokens, width)
    kernels.down[_tiles_by(rows, width)](
        a=a_CN, w=w_FH, a_up=a_up_CN, w_up=w_up_FH, out=expanded_CH, **sizes, **_tiles(rows)
    )
    columns = min(1024, triton.next_power_of_2(width))
    grid = (num_tokens, triton.cdiv(width, columns))
    kernels.gather_sum[grid](expanded_CH, rows.row_TK, out_TH, H=width, K=top_k, BN=columns)
    return out_TH


def _linear_grad(
    d_CN: Tensor, source_TH: Tensor, w_FH: Tensor, b_F: Tensor | None, rows: Rows, sizes: dict[str, Any]
) -> tuple[Tensor, Tensor | None]:
    """Gradients of the weights and the bias of d = source w^T + b, given that of d."""
    size, num_experts = sizes["N"], len(rows.first_row_E) - 1
    dw_FH, db_F = torch.empty_like(w_FH), None if b_F is None else torch.empty_like(b_F)

    def tiles(tile: dict[str, int]) -> tuple[int]:
        return (num_experts * triton.cdiv(size, tile["BM"]) * triton.cdiv(sizes["H"], tile["BN"]),)

    kernels.weight_grad[tiles](d=d_CN, source=source_TH, dw=dw_FH, token=rows.token_C, **sizes)
    if db_F is not None:
        grid = (num_experts, triton.cdiv(size, 64))
        kernels.bias_grad[grid](d_CN, db_F, rows.first_row_E, N=size, BM=64, BN=64)
    return dw_FH, db_F


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
        sizes = _sizes(rows, x_TH, bank, num_experts)
        hidden_CN = x_TH.new_empty(len(rows.token_C), sizes["N"])
        pre_CN = up_CN = None
        if bank.w_gate is not None:
            pre_CN, up_CN = torch.empty_like(hidden_CN), torch.empty_like(hidden_CN)
        elif activation.phi not in OUTPUT_IS_ENOUGH:
            pre_CN = torch.empty_like(hidden_CN)
        w_FH, b_F = bank.firing
        kernels.up[_tiles_by(rows, sizes["N"])](
            x=x_TH,
            w=w_FH,
            b=b_F,
            w_up=None if up_CN is None else bank.w_in,
            b_up=None if up_CN is None else bank.b_in,
            pre=pre_CN,
            pre_up=up_CN,
            hidden=hidden_CN,
            token=rows.token_C,
            ACT=activation.phi,
            **sizes,
            **_tiles(rows),
        )
        gate_C1 = _of_rows(gates_TK, rows, x_TH.dtype) if scaled and gates_TK is not None else None
        y_TH = _down(hidden_CN if gate_C1 is None else hidden_CN * gate_C1, bank.w_out, None, None, rows, sizes)
        # What a recomputed forward would make again is saved as tensors, so that checkpointing frees it.
        kept_CN = hidden_CN if pre_CN is None else None
        ctx.save_for_backward(x_TH, kept_CN, pre_CN, up_CN, gate_C1, *rows.tensors, *neuron_tensors)
        ctx.tile_size, ctx.load, ctx.activation, ctx.num_experts = rows.tile_size, rows.load, activation, num_experts
        return y_TH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TH: Tensor) -> tuple[Tensor | None, ...]:
        x_TH, kept_CN, pre_CN, up_CN, gate_C1, *saved = ctx.saved_tensors
        rows, bank = Rows(ctx.tile_size, ctx.load, *saved[:5]), NeuronTensors(*saved[5:])
        sizes, dy_TH = _sizes(rows, x_TH, bank, ctx.num_experts), dy_TH.contiguous()
        hidden_CN = x_TH.new_empty(len(rows.token_C), sizes["N"]) if kept_CN is None else kept_CN
        d_pre_CN, d_up_CN = torch.empty_like(hidden_CN), None if up_CN is None else torch.empty_like(hidden_CN)
        dgate_PC = None
        if ctx.needs_input_grad[2]:
            shape = (triton.cdiv(sizes["N"], NARROWEST), len(hidden_CN))
            dgate_PC = torch.empty(shape, dtype=torch.float32, device=x_TH.device)
        kernels.down_grad[_tiles_by(rows, sizes["N"])](
            dy=dy_TH,
            w_out=bank.w_out,
            pre=pre_CN,
            pre_up=up_CN,
            hidden=hidden_CN,
            d_pre=d_pre_CN,
            d_up=d_up_CN,
            dgate=dgate_PC,
            token=rows.token_C,
            copies=len(hidden_CN),
            ACT=ctx.activation.phi,
            **sizes,
            **_tiles(rows),
        )
        dgates_TK = None
        if dgate_PC is not None:
            parts = triton.cdiv(sizes["N"], kernels.down_grad.best_config.kwargs["BN"])
            dgate_C = dgate_PC[:parts].sum(0)
            dgates_TK = dgate_C[rows.row_TK.clamp(min=0)].masked_fill_(rows.row_TK < 0, 0)

        if gate_C1 is not None:
            hidden_CN = hidden_CN * gate_C1
            d_pre_CN.mul_(gate_C1)
            if d_up_CN is not None:
                d_up_CN.mul_(gate_C1)
        dw_out_FH, _ = _linear_grad(hidden_CN, dy_TH, bank.w_out, None, rows, sizes)
        w_FH, b_F = bank.firing
        grads_firing = _linear_grad(d_pre_CN, x_TH, w_FH, b_F, rows, sizes)
        if d_up_CN is None:
            dx_TH = _down(d_pre_CN, w_FH, None, None, rows, sizes)
            (dw_in, db_in), (dw_gate, db_gate) = grads_firing, (None, None)
        else:
            dx_TH = _down(d_pre_CN, w_FH, d_up_CN, bank.w_in, rows, sizes)
            dw_in, db_in = _linear_grad(d_up_CN, x_TH, bank.w_in, bank.b_in, rows, sizes)
            dw_gate, db_gate = grads_firing
        return dx_TH, None, dgates_TK, None, None, None, dw_in, dw_gate, db_in, db_gate, dw_out_FH


_apply: Callable[..., Tensor] = _SparseFFN.apply
