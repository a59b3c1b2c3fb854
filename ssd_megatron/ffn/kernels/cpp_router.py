"""Scores, choice of experts and their gradients in the C++ kernels: the router's part of backend "cpp".

Shapes: T tokens, H hidden, E experts, K experts per token.
"""

import torch
from torch import Tensor

from ssd_megatron.ffn.kernels.cpp_build import DTYPES
from ssd_megatron.ffn.kernels.cpp_products import Products, call, every_token, padded


def expert_scores(x_TH: Tensor, weight_EH: Tensor) -> Tensor:
    """x @ weight^T in fp32, [T, E], of rows that are longer; x and weight both fp32 or both bf16."""
    (tokens, hidden), num_experts, x_TH = x_TH.shape, len(weight_EH), x_TH.contiguous()
    scores = x_TH.new_empty(tokens, padded(num_experts), dtype=torch.float32)
    sizes = (tokens, hidden, num_experts, torch.get_num_threads())
    call(f"scores_{DTYPES[x_TH.dtype]}", x_TH, weight_EH, *sizes, scores)
    return scores[:, :num_experts]


def top_k(scores_TE: Tensor, k: int) -> Tensor:
    """The experts with the k best scores of each token, best first, of equal ones the first.

    Args:
        scores_TE: from `expert_scores`.
    """
    (tokens, num_experts), threads = scores_TE.shape, torch.get_num_threads()
    ids_TK = torch.empty(tokens, k, dtype=torch.int64)
    call("top_k_of", _whole(scores_TE), tokens, num_experts, k, threads, ids_TK)
    return ids_TK


def softmax(scores_TE: Tensor, ids_TK: Tensor) -> Tensor:
    """The softmax over the scores, from `expert_scores`, of these experts of each token."""
    (tokens, num_experts), threads = scores_TE.shape, torch.get_num_threads()
    p_TK = scores_TE.new_empty(ids_TK.shape)
    call("softmax_of", _whole(scores_TE), ids_TK, tokens, num_experts, ids_TK.shape[1], threads, p_TK)
    return p_TK


def _whole(scores_TE: Tensor) -> Tensor:
    """The tensor that is longer."""
    (tokens, num_experts), stride = scores_TE.shape, scores_TE.stride(0)
    assert stride == padded(num_experts) and scores_TE.dtype == torch.float32
    return scores_TE.as_strided((tokens, stride), (stride, 1))


def score_gradients(
    dgates_TK: Tensor, p_TK: Tensor, ids_TK: Tensor, x_TH: Tensor, weight_EH: Tensor, dx_TH: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Gradients of x and the weight from those of gates that have the gradients of p, a softmax over chosen scores.

    Args:
        dx_TH: what else x has of a gradient, to be added.
    """
    (tokens, k), (num_experts, hidden), x_TH = ids_TK.shape, weight_EH.shape, x_TH.contiguous()
    products = Products(every_token(tokens), x_TH, num_experts)
    dscores, total_TH, dweight_EH = x_TH.new_empty(products.shape), torch.empty_like(x_TH), torch.empty_like(weight_EH)
    chosen = (ids_TK, p_TK, dgates_TK.float().contiguous())
    sizes = (tokens, hidden, num_experts, k, torch.get_num_threads())
    add_TH = None if dx_TH is None else dx_TH.contiguous()
    call(f"scores_grad_{DTYPES[x_TH.dtype]}", *chosen, weight_EH, add_TH, *sizes, dscores, total_TH)
    products.linear_grad(dscores, x_TH, dweight_EH)
    return total_TH, dweight_EH
