"""The sparse feed-forward network in C++ kernels of our own, for CPUs with AVX-512 (fp32) or AMX (bf16): backend "cpp".

Shapes: T tokens, H hidden, F neurons, E experts of N neurons, K experts per token, C rows (token copies sorted by
expert); tensors of rows have 32 rows more, which are read and not used, and N rounded up to a multiple of 32 columns.

Three products, each with what surrounds it in the cache (csrc/sparse_ffn.cpp): `up` gathers token rows, `down` adds up
the rows of each token in fp32, `weight_grad` gathers again. No tensor of size C x H exists. Kept for the backward are
the inputs, the rows' tokens and the neurons' outputs (ReLU), else the pre-activations. A factor per token and expert
would belong to `down`'s sums and to the output gradients in `up`.
"""

import ctypes
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ssd_megatron.ffn.activations import Activation
from ssd_megatron.ffn.bank import NeuronTensors
from ssd_megatron.ffn.kernels.cpp_build import library
from ssd_megatron.ffn.kernels.workspace import scratch

BLOCK = 32  # rows and columns of a product; blocks.h
SUFFIX = {torch.float32: "fp32", torch.bfloat16: "bf16"}


class _Sizes(ctypes.Structure):
    """`Rows` of sparse_ffn.cpp."""

    _fields_ = tuple((name, ctypes.c_int64) for name in ("tokens", "hidden", "size", "experts", "width")) + (
        ("token", ctypes.c_void_p),
        ("first", ctypes.c_void_p),
        ("threads", ctypes.c_int64),
    )


class Rows(NamedTuple):
    """Token copies sorted by expert, inside an expert by token; expert e has rows [first[e], first[e + 1]).

    Attributes:
        token_C, copy_C: int32, the token of each row and its number among the [T, K] copies.
        first_E: int32 [E + 1].
    """

    token_C: Tensor
    copy_C: Tensor
    first_E: Tensor


def sort_copies(expert_ids_TK: Tensor, num_experts: int) -> Rows:
    """Args: expert_ids_TK: int64 in [0, num_experts); -1 for one that is computed elsewhere, which gets no row."""
    (tokens, top_k), ids = expert_ids_TK.shape, expert_ids_TK.contiguous()
    assert ids.numel() < 2**31, ids.shape
    first_E = torch.empty(num_experts + 1, dtype=torch.int32)
    token_C, copy_C = torch.empty(2, tokens * top_k, dtype=torch.int32)
    count = library().sort_copies(
        _at(ids), *map(ctypes.c_int64, (tokens, top_k, num_experts)), _at(first_E), _at(token_C), _at(copy_C)
    )
    return Rows(token_C[:count], copy_C[:count], first_E)


def _at(t: Tensor | None) -> ctypes.c_void_p:
    if t is None:
        return ctypes.c_void_p()
    assert t.is_contiguous() and t.device.type == "cpu"
    return ctypes.c_void_p(t.data_ptr())


class _Products:
    """The kernels for one set of rows and one bank."""

    def __init__(self, rows: Rows, x_TH: Tensor, bank: NeuronTensors, num_experts: int) -> None:
        self._rows, self._suffix = rows, SUFFIX[x_TH.dtype]
        size = len(bank.w_in) // num_experts
        self._width, self._neurons = -(-size // BLOCK) * BLOCK, len(bank.w_in)
        self._sizes = _Sizes(
            *x_TH.shape,
            size,
            num_experts,
            self._width,
            rows.token_C.data_ptr(),
            rows.first_E.data_ptr(),
            torch.get_num_threads(),
        )

    def _call(self, name: str, *arguments: Any) -> None:
        getattr(library(), f"{name}_{self._suffix}")(ctypes.byref(self._sizes), *arguments)

    @property
    def shape(self) -> tuple[int, int]:
        """Of a tensor of rows."""
        return len(self._rows.token_C) + BLOCK, self._width

    def up(
        self,
        source_TH: Tensor,
        w_FH: Tensor,
        b_F: Tensor | None,
        out_CN: Tensor,
        *,
        relu: bool = False,
        outputs_CN: Tensor | None = None,
        dgates_TK: Tensor | None = None,
    ) -> Tensor:
        """source w^T + b for the rows' tokens, then ReLU if asked for; or, given ReLU's outputs, the gradient of its
        inputs from that of the network's output, and gradients of gates."""
        self._call(
            "up",
            *map(_at, (source_TH, w_FH, b_F)),
            ctypes.c_int(relu),
            *map(_at, (outputs_CN, self._rows.copy_C, dgates_TK, out_CN)),
        )
        return out_CN

    def down(self, a_CN: Tensor, w_FH: Tensor, a2_CN: Tensor | None, w2_FH: Tensor | None, out_TH: Tensor) -> Tensor:
        """The sum over each token's rows of a w (+ a2 w2)."""
        self._call("down", *map(_at, (a_CN, w_FH, a2_CN, w2_FH, out_TH)))
        return out_TH

    def linear_grad(self, d_CN: Tensor, source_TH: Tensor, dw_FH: Tensor, db_F: Tensor | None) -> None:
        """Gradients of the weights and the bias of source w^T + b."""
        room = self._width * (len(self._rows.token_C) + BLOCK * (len(self._rows.first_E)))
        self._call("weight_grad", *map(_at, (d_CN, source_TH, scratch("transposed", (room,), d_CN), dw_FH)))
        if db_F is not None:
            self._call("bias_grad", *map(_at, (d_CN, db_F)))


def sparse_ffn(
    x_TH: Tensor,
    expert_ids_TK: Tensor,
    gates_TK: Tensor | None,
    bank: NeuronTensors,
    activation: Activation,
    num_experts: int,
) -> Tensor:
    """See `ssd_megatron.ffn.kernels.sparse_ffn`; x and the bank in fp32 or bf16."""
    return _apply(x_TH, expert_ids_TK, gates_TK, activation, num_experts, *bank)


class _SparseFFN(torch.autograd.Function):
    """Arguments: x, expert ids, gates, activation, number of experts, then the fields of NeuronTensors."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TH: Tensor,
        expert_ids_TK: Tensor,
        gates_TK: Tensor | None,
        activation: Activation,
        num_experts: int,
        *neuron_tensors: Tensor,
    ) -> Tensor:
        bank, x_TH = NeuronTensors(*neuron_tensors), x_TH.contiguous()
        rows = sort_copies(expert_ids_TK, num_experts)
        products = _Products(rows, x_TH, bank, num_experts)
        pre_CN = x_TH.new_empty(products.shape)
        up_CN = None if bank.w_gate is None else torch.empty_like(pre_CN)
        products.up(x_TH, *bank.firing, pre_CN, relu=activation.name == "relu")
        hidden_CN = pre_CN if activation.name == "relu" else activation.act(pre_CN)
        if up_CN is not None:
            hidden_CN = hidden_CN * products.up(x_TH, bank.w_in, bank.b_in, up_CN)
        ctx.save_for_backward(x_TH, *rows, pre_CN, up_CN, *neuron_tensors)
        ctx.activation, ctx.num_experts, ctx.top_k = activation, num_experts, expert_ids_TK.shape[1]
        return products.down(hidden_CN, bank.w_out, None, None, torch.empty_like(x_TH))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TH: Tensor) -> tuple[Tensor | None, ...]:
        # First of all: under checkpointing this line runs the forward again, which uses the scratch memory.
        x_TH, token_C, copy_C, first_E, pre_CN, up_CN, *neuron_tensors = ctx.saved_tensors
        activation: Activation = ctx.activation
        bank, dy_TH = NeuronTensors(*neuron_tensors), dy_TH.contiguous()
        grads = bank.each(torch.empty_like)
        rows = Rows(token_C, copy_C, first_E)
        products = _Products(rows, x_TH, bank, ctx.num_experts)
        dgates_TK = x_TH.new_zeros(len(x_TH), ctx.top_k, dtype=torch.float32) if ctx.needs_input_grad[2] else None
        d_CN, d_up_CN = scratch("d", products.shape, pre_CN), None
        if activation.name == "relu":
            products.linear_grad(pre_CN, dy_TH, grads.w_out, None)
            products.up(dy_TH, bank.w_out, None, d_CN, outputs_CN=pre_CN, dgates_TK=dgates_TK)
        else:
            fired_CN = activation.act_again(pre_CN)
            hidden_CN = fired_CN if up_CN is None else fired_CN * up_CN
            products.linear_grad(hidden_CN, dy_TH, grads.w_out, None)
            products.up(dy_TH, bank.w_out, None, d_CN)
            if dgates_TK is not None:
                product_CN = torch.mul(d_CN, hidden_CN, out=scratch("product", products.shape, d_CN))
                dgate_C = product_CN[: len(copy_C)].sum(dim=1, dtype=torch.float32)
                dgates_TK.view(-1).index_copy_(0, copy_C.long(), dgate_C)
            d_up_CN = None if up_CN is None else d_CN * fired_CN
            activation.slope_(d_CN if up_CN is None else d_CN.mul_(up_CN), pre_CN)
        products.linear_grad(d_CN, x_TH, *grads.firing)
        if d_up_CN is not None:
            products.linear_grad(d_up_CN, x_TH, grads.w_in, grads.b_in)
        dx_TH = products.down(
            d_CN, bank.firing[0], d_up_CN, None if d_up_CN is None else bank.w_in, torch.empty_like(x_TH)
        )
        return dx_TH, None, dgates_TK, None, None, *grads


_apply: Callable[..., Tensor] = _SparseFFN.apply
