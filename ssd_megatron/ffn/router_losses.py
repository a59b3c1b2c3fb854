"""Losses of routers that hold their load level. Their gradients join a step's without changing the loss it reports.

Shapes: s tokens (or tiles) of b sequences, T = s * b of them, position by position; E experts, K experts per token.

All are means over tokens, and the load is counted sequence by sequence (as in DeepSeek-V2, arXiv 2405.04434, section
2.1.2) or is linear in the tokens, so that no layout of ranks and microbatches shows.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Weight of the gradient by which expert biases follow the load. Adam makes its size the learning rate's whatever it is;
# it is small so that the gradient norm and its clipping do not show it.
BIAS_WEIGHT = 1e-3


def with_loss(gates_TK: Tensor, loss: Tensor, weight: float) -> Tensor:
    """The same gates; in backward `loss` gets the gradient `weight`, beside what comes through the gates."""
    return _with_loss(gates_TK, loss, weight)


def chosen_experts(expert_ids_TK: Tensor, num_experts: int) -> Tensor:
    """1 for each expert of a token, else 0, [T, E] fp32."""
    ones = torch.ones((), device=expert_ids_TK.device).expand(expert_ids_TK.shape)
    return ones.new_zeros(len(expert_ids_TK), num_experts).scatter_(1, expert_ids_TK, ones)


def balance_loss(p_TE: Tensor, expert_ids_TK: Tensor, sequences: int) -> Tensor:
    """E sum_e f_e P_e, mean over sequences: f the share of the choices that e got, P its mean probability (Switch
    Transformer, arXiv 2101.03961, equations 4 to 6). 1 for an even load; gradients through P."""
    num_experts, top_k = p_TE.shape[1], expert_ids_TK.shape[1]
    share_bE = chosen_experts(expert_ids_TK, num_experts).view(-1, sequences, num_experts).mean(dim=0) / top_k
    mean_bE = p_TE.view(-1, sequences, num_experts).mean(dim=0)
    return num_experts * (share_bE * mean_bE).sum(dim=1).mean()


def z_loss(scores_TE: Tensor) -> Tensor:
    """Mean square of the logarithm of the softmax's denominator (ST-MoE, arXiv 2202.08906, equation 5)."""
    return scores_TE.logsumexp(dim=1).square().mean()


def bias_loss(bias_E: Tensor, expert_ids_TK: Tensor) -> Tensor:
    """What has the load above or below the mean as gradient of each expert's bias (as arXiv 2408.15664, which takes its
    sign): busy experts' biases fall. Nothing else gets a gradient from it."""
    num_experts, top_k = len(bias_E), expert_ids_TK.shape[1]
    excess_E = chosen_experts(expert_ids_TK, num_experts).mean(dim=0) - top_k / num_experts
    return (bias_E.float() * excess_E).sum()


class _WithLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gates_TK: Tensor, loss: Tensor, weight: float) -> Tensor:
        ctx.weight, ctx.dtype = weight, loss.dtype
        return gates_TK.view_as(gates_TK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dgates_TK: Tensor) -> tuple[Tensor, Tensor, None]:
        return dgates_TK, torch.full((), ctx.weight, dtype=ctx.dtype, device=dgates_TK.device), None


_with_loss: Callable[..., Tensor] = _WithLoss.apply
