"""The sparse feed-forward network for one or two tokens on a GPU: two matrix times vector kernels, and two that choose.

Shapes: T tokens, H hidden, F neurons, E experts of N neurons, K experts per token.

A token's time is what its experts' weights take to come from memory, so the rows are read once, where they lie, by as
many programs as the device has room for; nothing is sorted, padded or added up atomically. All launches have sizes that
follow from the shapes alone, so that a CUDA graph can hold them. A launch takes about as long as reading 10 MB, so a
router of many operators, as in training, would take as long as the experts.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ssd_megatron.ffn.activations import Activation
from ssd_megatron.ffn.bank import NeuronTensors
from ssd_megatron.ffn.kernels.triton_kernels import _act

UP_TILE = {"BN": 16, "BH": 256}
DOWN_TILE = {"BN": 128, "BH": 16}
SCORE_TILE = {"BN": 2, "BH": 1024}
STAGES = tl.constexpr(4)  # of loads on their way


@triton.jit
def _row_sums(w, b, x, row, live, H: tl.constexpr, BH: tl.constexpr):
    """x . w[row] + b[row] of some rows, fp32."""
    sums = tl.zeros(row.shape, dtype=tl.float32)
    for h0 in tl.range(0, H, BH, num_stages=STAGES):
        h = h0 + tl.arange(0, BH)
        weights = tl.load(w + row[:, None] * H + h[None, :], mask=live[:, None] & (h < H)[None, :], other=0.0)
        inputs = tl.load(x + h, mask=h < H, other=0.0)
        sums += tl.sum(weights.to(tl.float32) * inputs.to(tl.float32)[None, :], axis=1)
    if b is not None:
        sums += tl.load(b + row, mask=live, other=0.0).to(tl.float32)
    return sums


@triton.jit
def score(x, w, b, scores, E, H: tl.constexpr, BN: tl.constexpr, BH: tl.constexpr):
    """scores[t] = x[t] w^T + b, fp32; BN experts."""
    token, e = tl.program_id(0), tl.program_id(1) * BN + tl.arange(0, BN)
    tl.store(scores + token * E + e, _row_sums(w, b, x + token * H, e, e < E, H, BH), mask=e < E)


@triton.jit
def best(scores, ids, E, K: tl.constexpr, BINS: tl.constexpr):
    """The K experts with the best scores of one token, best first."""
    token, e = tl.program_id(0), tl.arange(0, BINS)
    left = tl.load(scores + token * E + e, mask=e < E, other=-float("inf"))
    for k in range(K):
        expert = tl.minimum(tl.argmax(left, 0), E - 1)  # an expert, too, where a score is no number
        tl.store(ids + token * K + k, expert.to(tl.int64))
        left = tl.where(e == expert, -float("inf"), left)


@triton.jit
def up(
    x, ids, w, b, w_up, b_up, hidden, H: tl.constexpr, N: tl.constexpr, K: tl.constexpr, ACT: tl.constexpr,
    BN: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """hidden[t, k] = phi(x[t] w^T + b) (x[t] w_up^T + b_up) for the k-th expert of token t, 0 for one of other ranks;
    BN of its neurons."""
    copy = tl.program_id(0)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    expert = tl.load(ids + copy)
    row, live = expert * N + n, (n < N) & (expert >= 0)
    token = x + (copy // K) * H
    out = _act(_row_sums(w, b, token, row, live, H, BH), ACT)
    if w_up is not None:
        out *= _row_sums(w_up, b_up, token, row, live, H, BH)
    tl.store(hidden + copy * N + n, tl.where(live, out, 0.0).to(hidden.dtype.element_ty), mask=n < N)


@triton.jit
def down(
    hidden, ids, w_out, out, H: tl.constexpr, N: tl.constexpr, K: tl.constexpr, BN: tl.constexpr, BH: tl.constexpr
):
    """out[t] = sum over the experts of token t of hidden[t, k] w_out; BH of its columns."""
    token = tl.program_id(0)
    h = tl.program_id(1) * BH + tl.arange(0, BH)
    sums = tl.zeros((BH,), dtype=tl.float32)
    for m0 in tl.range(0, K * N, BN, num_stages=STAGES):
        m = m0 + tl.arange(0, BN)  # neurons of all its experts
        fired = tl.load(hidden + token * K * N + m, mask=m < K * N, other=0.0).to(tl.float32)
        row = tl.load(ids + token * K + m // N, mask=m < K * N, other=0) * N + m % N
        # Of a neuron that does not fire nothing is read.
        mask = (fired != 0.0)[:, None] & (h < H)[None, :]
        weights = tl.load(w_out + row[:, None] * H + h[None, :], mask=mask, other=0.0)
        sums += tl.sum(weights.to(tl.float32) * fired[:, None], axis=0)
    tl.store(out + token * H + h, sums.to(out.dtype.element_ty), mask=h < H)


def best_experts(x_TH: Tensor, rows_EH: Tensor, bias_E: Tensor | None, top_k: int) -> Tensor:
    """The experts whose rows' products with a token, biases added, are largest in fp32: int64 [T, K], best first."""
    (tokens, width), count = x_TH.shape, len(rows_EH)
    scores_TE = torch.empty(tokens, count, dtype=torch.float32, device=x_TH.device)
    ids_TK = torch.empty(tokens, top_k, dtype=torch.int64, device=x_TH.device)
    grid = (tokens, triton.cdiv(count, SCORE_TILE["BN"]))
    score[grid](x_TH.contiguous(), rows_EH, bias_E, scores_TE, count, H=width, **SCORE_TILE)
    best[(tokens,)](scores_TE, ids_TK, count, K=top_k, BINS=triton.next_power_of_2(count))
    return ids_TK


def few_tokens_ffn(
    x_TH: Tensor, expert_ids_TK: Tensor, bank: NeuronTensors, activation: Activation, num_experts: int
) -> Tensor:
    """As `ssd_megatron.ffn.kernels.sparse_ffn`, without gradients; the bank in bf16, fp16 or fp32."""
    (tokens, top_k), width = expert_ids_TK.shape, x_TH.shape[1]
    size = len(bank.w_in) // num_experts
    hidden_TKN = x_TH.new_empty(tokens, top_k, size)
    out_TH = torch.empty_like(x_TH)
    x_TH, ids_TK = x_TH.contiguous(), expert_ids_TK.contiguous()
    sizes = {"H": width, "N": size, "K": top_k}
    gate = (None, None) if bank.w_gate is None else (bank.w_in, bank.b_in)
    grid = (tokens * top_k, triton.cdiv(size, UP_TILE["BN"]))
    up[grid](x_TH, ids_TK, *bank.firing, *gate, hidden_TKN, **sizes, ACT=activation.phi, **UP_TILE)
    grid = (tokens, triton.cdiv(width, DOWN_TILE["BH"]))
    down[grid](hidden_TKN, ids_TK, bank.w_out, out_TH, **sizes, **DOWN_TILE)
    return out_TH
