"""The sparse feed-forward network for tiles of tokens that share their experts, in plain PyTorch operators on CPU: part
of backend "torch".

Shapes: M tiles of G tokens, H hidden, F neurons, E experts of N neurons, K experts per tile; c tiles of one chunk.

A tile's tokens lie together and have one set of experts: instead of tokens, the weights of the tile's experts are
gathered, and their K * N neurons are one matmul, however small an expert is. Nothing has a row per token copy.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ssd_megatron.ffn.activations import Activation
from ssd_megatron.ffn.bank import NeuronTensors
from ssd_megatron.ffn.kernels.workspace import scratch

# Gathered rows of one weight tensor, over the tiles that are computed at once.
CHUNK_BYTES = 8 * 2**20


def pays(tile_size: int, expert_size: int, dtype: torch.dtype) -> bool:
    """Whether this is faster than a row for each token copy (measured, docs/log.md): gathering weights must cost less
    than gathering tokens, and in 16 bits sums in fp32 cost something too."""
    return tile_size >= expert_size * (1 if dtype.itemsize > 2 else 2)


def tiled_ffn(
    x_MGH: Tensor,
    expert_ids_MK: Tensor,
    gates_MK: Tensor | None,
    bank: NeuronTensors,
    activation: Activation,
    num_experts: int,
    scaled: bool = False,
) -> Tensor:
    """As `ssd_megatron.ffn.kernels.sparse_ffn`, with experts and gates for each tile; all experts are here.

    Returns:
        y_MGH in x's dtype. A gate's gradient is the sum over the tile's tokens.
    """
    return _apply(x_MGH, expert_ids_MK, gates_MK, activation, num_experts, scaled, *bank)


def _chunks(x_MGH: Tensor, rows: int) -> Iterator[slice]:
    """Tiles that are computed at once, `rows` gathered rows for each."""
    size = max(1, CHUNK_BYTES // (rows * x_MGH.shape[2] * x_MGH.element_size()))
    return (slice(first, first + size) for first in range(0, len(x_MGH), size))


def _gather(name: str, t_F: Tensor, ids_cK: Tensor, num_experts: int) -> Tensor:
    """Rows of each tile's experts, [c, K * N, ...], in scratch memory: gone with the next call of the same name."""
    tiles, top_k = ids_cK.shape
    by_expert = t_F.view(num_experts, -1)
    rows = scratch(name, (tiles * top_k, by_expert.shape[1]), t_F)
    torch.index_select(by_expert, 0, ids_cK.flatten(), out=rows)
    return rows.view(tiles, -1, *t_F.shape[1:])


def _gathered(bank: NeuronTensors, ids_cK: Tensor, num_experts: int) -> NeuronTensors:
    names = iter(NeuronTensors._fields)
    chosen = [None if t is None else _gather(next(names), t, ids_cK, num_experts) for t in bank]
    w_in, w_gate, b_in, b_gate, w_out = chosen
    assert w_in is not None and w_out is not None
    return NeuronTensors(w_in, w_gate, b_in, b_gate, w_out)


def _linear(x_cGH: Tensor, w_cFH: Tensor, b_cF: Tensor | None, out_cGF: Tensor) -> Tensor:
    if b_cF is None:
        return torch.bmm(x_cGH, w_cFH.mT, out=out_cGF)
    return torch.baddbmm(b_cF.unsqueeze(1), x_cGH, w_cFH.mT, out=out_cGF)


def _of_neurons(gates_MK: Tensor, pre_MGF: Tensor) -> Tensor:
    """The gate of each neuron of a tile, [M, 1, K * N]."""
    size = pre_MGF.shape[2] // gates_MK.shape[1]
    return gates_MK.to(pre_MGF.dtype).repeat_interleave(size, dim=1).unsqueeze(1)


class _Gradients:
    """Sums over tiles of the gradients of weights, in at least fp32: in bf16 a long one would stand still."""

    def __init__(self, bank: NeuronTensors, num_experts: int) -> None:
        self._bank = bank
        self._num_experts = num_experts
        self._sums = [None if t is None else torch.zeros_like(t, dtype=_sum_dtype(t)) for t in bank]

    def add(self, field: str, per_tile: Tensor, ids_cK: Tensor) -> None:
        """Add [c, K * N, ...] to the rows of the tiles' experts."""
        total = self._sums[NeuronTensors._fields.index(field)]
        assert total is not None
        by_expert = total.view(self._num_experts, -1)
        rows = per_tile.reshape(-1, by_expert.shape[1])
        for row, expert in zip(rows, ids_cK.flatten().tolist(), strict=True):  # index_add_ would need copies in fp32
            by_expert[expert] += row

    def add_linear(self, weight: str, bias: str | None, d_cGF: Tensor, x_cGH: Tensor, ids_cK: Tensor) -> None:
        """Gradients of a linear layer's weight and bias, given that of its output."""
        product = scratch("product", (len(d_cGF), d_cGF.shape[2], x_cGH.shape[2]), d_cGF)
        self.add(weight, torch.bmm(d_cGF.mT, x_cGH, out=product), ids_cK)
        if bias is not None:
            self.add(bias, d_cGF.sum(dim=1), ids_cK)

    def totals(self) -> list[Tensor | None]:
        pairs = zip(self._sums, self._bank, strict=True)
        return [None if total is None or t is None else total.to(t.dtype) for total, t in pairs]


def _sum_dtype(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)


class _TiledFFN(torch.autograd.Function):
    """Arguments: x, expert ids, gates, activation, number of experts, whether outputs are scaled by the gates, then the
    fields of NeuronTensors."""

    @staticmethod
    def forward(
        ctx: Any,
        x_MGH: Tensor,
        expert_ids_MK: Tensor,
        gates_MK: Tensor | None,
        activation: Activation,
        num_experts: int,
        scaled: bool,
        *neuron_tensors: Tensor,
    ) -> Tensor:
        bank, x_MGH = NeuronTensors(*neuron_tensors), x_MGH.contiguous()
        (tiles, size, _), top_k = x_MGH.shape, expert_ids_MK.shape[1]
        pre_MGF = x_MGH.new_empty(tiles, size, top_k * (len(bank.w_in) // num_experts))
        up_MGF = None if bank.w_gate is None else torch.empty_like(pre_MGF)
        y_MGH = torch.empty_like(x_MGH)
        gate_M1F = _of_neurons(gates_MK, pre_MGF) if scaled and gates_MK is not None else None
        for chunk in _chunks(x_MGH, pre_MGF.shape[2]):
            chosen, x = _gathered(bank, expert_ids_MK[chunk], num_experts), x_MGH[chunk]
            hidden = activation.act(_linear(x, *chosen.firing, pre_MGF[chunk]))
            if up_MGF is not None:
                hidden = hidden * _linear(x, chosen.w_in, chosen.b_in, up_MGF[chunk])
            if gate_M1F is not None:
                hidden = hidden * gate_M1F[chunk]
            torch.bmm(hidden, chosen.w_out, out=y_MGH[chunk])
        # What a recomputed forward would make again is saved as tensors, so that checkpointing frees it.
        ctx.save_for_backward(x_MGH, expert_ids_MK, pre_MGF, up_MGF, gate_M1F, *neuron_tensors)
        ctx.activation, ctx.num_experts = activation, num_experts
        return y_MGH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_MGH: Tensor) -> tuple[Tensor | None, ...]:
        # First of all: under checkpointing this line runs the forward again, which uses the scratch memory.
        x_MGH, expert_ids_MK, pre_MGF, up_MGF, gate_M1F, *neuron_tensors = ctx.saved_tensors
        bank, num_experts, activation = NeuronTensors(*neuron_tensors), ctx.num_experts, ctx.activation
        gradients, dy_MGH = _Gradients(bank, num_experts), dy_MGH.contiguous()
        dx_MGH = torch.empty_like(x_MGH)
        dgates_MK = torch.empty_like(expert_ids_MK, dtype=x_MGH.dtype) if ctx.needs_input_grad[2] else None
        firing = ("w_in", "b_in") if bank.w_gate is None else ("w_gate", "b_gate")
        has_bias = bank.b_in is not None
        for chunk in _chunks(x_MGH, pre_MGF.shape[2]):
            ids, x, dy, pre = expert_ids_MK[chunk], x_MGH[chunk], dy_MGH[chunk], pre_MGF[chunk]
            chosen = _gathered(bank, ids, num_experts)
            fired = activation.act_again(pre)
            up = None if up_MGF is None else up_MGF[chunk]
            hidden = fired if up is None else fired * up

            gate = None if gate_M1F is None else gate_M1F[chunk]
            gradients.add_linear("w_out", None, hidden if gate is None else hidden * gate, dy, ids)
            d = torch.bmm(dy, chosen.w_out.mT, out=scratch("hidden", tuple(pre.shape), pre))
            if dgates_MK is not None:
                product = torch.mul(d, hidden, out=scratch("dgate", tuple(pre.shape), pre))
                dgates_MK[chunk] = product.view(*product.shape[:2], ids.shape[1], -1).sum((1, 3))
            if gate is not None:
                d.mul_(gate)

            d_up = None if up is None else d * fired
            d_pre = activation.slope_(d if up is None else d.mul_(up), pre)
            gradients.add_linear(firing[0], firing[1] if has_bias else None, d_pre, x, ids)
            dx = torch.bmm(d_pre, chosen.firing[0], out=dx_MGH[chunk])
            if d_up is not None:
                gradients.add_linear("w_in", "b_in" if has_bias else None, d_up, x, ids)
                dx.baddbmm_(d_up, chosen.w_in)
        return dx_MGH, None, dgates_MK, None, None, None, *gradients.totals()


_apply: Callable[..., Tensor] = _TiledFFN.apply
