"""The feed-forward network for one or two tokens on a CPU, where time is what the weights take to come from memory.

Shapes: T tokens, H hidden, F neurons, E experts of N neurons, K experts per token, R rows of `w_out`.

The chosen experts' rows are read where they lie: a matrix times vector on each expert's slice of the input weights, and
the output rows added up by `embedding_bag`; of sparse activations only those of neurons that fire, which is exact.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ssd_megatron.ffn.activations import Activation
from ssd_megatron.ffn.bank import NeuronTensors

# More tokens than this touch most experts, and a matrix product reads each weight once for all of them.
MOST_TOKENS = 2


def few_tokens_ffn(
    x_TH: Tensor, expert_ids_TK: Tensor | None, bank: NeuronTensors, activation: Activation, num_experts: int
) -> Tensor:
    """As `ssd_megatron.ffn.kernels.sparse_ffn`, without gradients; all neurons with `expert_ids_TK` None."""
    if expert_ids_TK is None:
        return torch.stack([_dense(x_H, bank, activation) for x_H in x_TH])
    by_expert = bank.each(lambda t: t.view(num_experts, -1, *t.shape[1:]))
    chosen_TK = expert_ids_TK.sort(dim=1).values  # in the order of memory
    rows = zip(x_TH, chosen_TK, strict=True)
    return torch.stack([_sparse(x_H, ids_K, by_expert, bank.w_out, activation) for x_H, ids_K in rows])


def _dense(x_H: Tensor, bank: NeuronTensors, activation: Activation) -> Tensor:
    hidden_F = activation.act(linear_row(x_H, *bank.firing))
    if bank.w_gate is not None:
        hidden_F = hidden_F * linear_row(x_H, bank.w_in, bank.b_in)
    return _add_up(hidden_F, None, bank.w_out, activation)


def _sparse(x_H: Tensor, ids_K: Tensor, experts: NeuronTensors, w_out_FH: Tensor, activation: Activation) -> Tensor:
    w_ENH, b_EN = experts.firing
    numbers = ids_K.tolist()
    elsewhere = numbers.count(-1)  # of other ranks; they come first
    numbers, ids_K = numbers[elsewhere:], ids_K[elsewhere:]
    hidden_KN = activation.act(_linear(x_H, numbers, ids_K, w_ENH, b_EN))
    if experts.w_gate is not None:
        hidden_KN = hidden_KN * _linear(x_H, numbers, ids_K, experts.w_in, experts.b_in)
    size = w_ENH.shape[1]
    rows_R = (ids_K[:, None] * size + torch.arange(size)).flatten()
    return _add_up(hidden_KN.flatten(), rows_R, w_out_FH, activation)


def _linear(x_H: Tensor, numbers: list[int], ids_K: Tensor, w_ENH: Tensor, b_EN: Tensor | None) -> Tensor:
    out_KN = x_H.new_empty(len(numbers), w_ENH.shape[1])
    for place, expert in enumerate(numbers):
        torch.mv(w_ENH[expert], x_H, out=out_KN[place])
    return out_KN if b_EN is None else out_KN.add_(b_EN[ids_K])


def _add_up(hidden_R: Tensor, rows_R: Tensor | None, w_out_FH: Tensor, activation: Activation) -> Tensor:
    """Sum of the rows of `w_out` (all of them without `rows_R`), each times its neuron's output, [H]."""
    if activation.sparse:
        fired = hidden_R.nonzero().squeeze(1)
        hidden_R, rows_R = hidden_R[fired], fired if rows_R is None else rows_R[fired]
    elif rows_R is None:
        if w_out_FH.dtype == torch.float32:
            return hidden_R @ w_out_FH
        rows_R = torch.arange(len(w_out_FH))
    # A bag is one thread's work.
    bag = -(-len(rows_R) // torch.get_num_threads())
    if bag == 0:
        return w_out_FH.new_zeros(w_out_FH.shape[1])
    offsets = torch.arange(0, len(rows_R), bag)
    return F.embedding_bag(rows_R, w_out_FH, offsets, mode="sum", per_sample_weights=hidden_R).sum(0)


def linear_row(x_H: Tensor, w_FH: Tensor, b_F: Tensor | None) -> Tensor:
    """F.linear of one row. In bf16 torch's matrix times vector is up to twice as fast as its matrix times matrix."""
    return torch.mv(w_FH, x_H) if b_F is None else torch.addmv(b_F, w_FH, x_H)
