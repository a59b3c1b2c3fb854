"""Calls of the C++ kernels (csrc/), which read and write tensors where they lie.

Shapes: T tokens, H hidden, F neurons, E experts of N neurons, K experts per token, C rows (token copies sorted by
expert). Tensors of rows have 32 rows more, which are read and not used, and N rounded up to a multiple of 32 columns.
"""

import ctypes
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssd_megatron.ffn.kernels.cpp_build import DTYPES, library

BLOCK = 32  # rows and columns of a product; blocks.h


class Rows(NamedTuple):
    """Token copies sorted by expert, inside an expert by token; expert e has rows [first[e], first[e + 1]).

    Attributes:
        token_C, copy_C: int32, the token of each row, and its number among the [T, K] copies.
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
    count = call("sort_copies_of", ids, tokens, top_k, num_experts, first_E, token_C, copy_C)
    return Rows(token_C[:count], copy_C[:count], first_E)


@lru_cache(maxsize=4)
def every_token(tokens: int) -> Rows:
    """All tokens in order as the rows of a single expert; not to be written to."""
    token_T = torch.arange(tokens, dtype=torch.int32)
    return Rows(token_T, token_T, torch.tensor([0, tokens], dtype=torch.int32))


def padded(count: int) -> int:
    return -(-count // BLOCK) * BLOCK


def call(name: str, *arguments: Tensor | int | None) -> int:
    result: int = getattr(library()[0], name)(*(_address(a) if isinstance(a, Tensor) else a for a in arguments))
    return result


def _address(t: Tensor) -> int:
    assert t.is_contiguous() and t.device.type == "cpu", (t.device, t.shape, t.stride())
    return t.data_ptr()


class _Sizes(ctypes.Structure):
    """`Rows` of network.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("tokens", "hidden", "size", "experts", "width")),
        ("token", ctypes.c_void_p),
        ("first", ctypes.c_void_p),
        ("threads", ctypes.c_int64),
    )


class Products:
    """The kernels for one set of rows and experts of one size, of `source`'s dtype and width."""

    def __init__(self, rows: Rows, source_TH: Tensor, expert_size: int) -> None:
        self._rows, self._dtype, self._width = rows, DTYPES[source_TH.dtype], padded(expert_size)
        addresses, threads = (rows.token_C.data_ptr(), rows.first_E.data_ptr()), torch.get_num_threads()
        experts = len(rows.first_E) - 1
        self._sizes = _Sizes(*source_TH.shape, expert_size, experts, self._width, *addresses, threads)

    @property
    def shape(self) -> tuple[int, int]:
        """Of a tensor of rows."""
        return len(self._rows.token_C) + BLOCK, self._width

    def _call(self, name: str, *arguments: Any) -> None:
        call(f"{name}_{self._dtype}", ctypes.addressof(self._sizes), *arguments)

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
        """source w^T + b for the rows' tokens, then ReLU if asked for. Given ReLU's outputs instead: the gradient of
        its inputs from that of the network's output, and with it fp32 gradients of gates."""
        self._call("up", source_TH, w_FH, b_F, relu, outputs_CN, self._rows.copy_C, dgates_TK, out_CN)
        return out_CN

    def down(
        self, a_CN: Tensor, w_FH: Tensor, out_TH: Tensor, a2_CN: Tensor | None = None, w2_FH: Tensor | None = None
    ) -> Tensor:
        """The sum over each token's rows of a w (+ a2 w2), added up in fp32."""
        self._call("down", a_CN, w_FH, a2_CN, w2_FH, out_TH)
        return out_TH

    def linear_grad(self, d_CN: Tensor, source_TH: Tensor, dw_FH: Tensor, db_F: Tensor | None = None) -> None:
        """Gradients of the weights and the bias of source w^T + b; zeros for an expert without rows."""
        room = self._width * (len(self._rows.token_C) + BLOCK * len(self._rows.first_E))
        self._call("weight_grad", d_CN, source_TH, d_CN.new_empty(room), dw_FH)
        if db_F is not None:
            self._call("bias_grad", d_CN, db_F)
