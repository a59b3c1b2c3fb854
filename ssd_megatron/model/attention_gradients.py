"""Attention of short sequences in bf16 on a CPU, where the backward pass of torch's scaled dot product attention takes
two to four times as long as that of its parts (docs/log.md).

Shapes: s queries, S keys, b batch, n query heads, g key/value heads, r = n / g, d head size.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

LONGEST = 256  # of queries and of keys; above that what the products write costs more than they save


def pays(query_bnsd: Tensor, key_bgSd: Tensor) -> bool:
    """Whether `attend` is faster than torch's for such inputs."""
    short = max(query_bnsd.size(2), key_bgSd.size(2)) <= LONGEST
    on_cpu = query_bnsd.device.type == "cpu" and query_bnsd.dtype == torch.bfloat16
    return short and on_cpu and torch.is_grad_enabled() and not torch.compiler.is_compiling()


def attend(query_bnsd: Tensor, key_bgSd: Tensor, value_bgSd: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
    """softmax(q k^T / sqrt(d)) v, [b, n, s, d].

    Args:
        mask: [b or 1, n or 1, s, S], bool (True where a query looks) or added to the scores, or None.
        is_causal: queries see no later keys.
    """
    return _attend(query_bnsd, key_bgSd, value_bgSd, mask, is_causal)


def products(query_bnsd: Tensor, key_bgSd: Tensor, value_bgSd: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
    """Attention as two products and a softmax, [b, n, s, d]; see `attend`."""
    query_bgrsd = (query_bnsd * query_bnsd.size(3) ** -0.5).unflatten(1, (key_bgSd.size(1), -1))
    scores_bnsS = (query_bgrsd @ key_bgSd.unsqueeze(2).mT).flatten(1, 2)
    if is_causal:
        scores_bnsS = scores_bnsS + torch.full_like(scores_bnsS[0, 0], float("-inf")).triu(1)
    if mask is not None:
        hidden = mask.dtype == torch.bool
        scores_bnsS = scores_bnsS.masked_fill(~mask, float("-inf")) if hidden else scores_bnsS + mask
    shares_bgrsS = scores_bnsS.softmax(dim=-1).unflatten(1, (key_bgSd.size(1), -1))
    context_bnsd: Tensor = (shares_bgrsS @ value_bgSd.unsqueeze(2)).flatten(1, 2)
    return context_bnsd


class _Attend(torch.autograd.Function):
    """Forward by torch's function, backward by that of the products; nothing of s x S is kept in between."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
        ctx.save_for_backward(query, key, value, mask)
        ctx.is_causal = is_causal
        gqa = query.size(1) != key.size(1)
        return F.scaled_dot_product_attention(query, key, value, mask, is_causal=is_causal, enable_gqa=gqa)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dcontext: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, mask = ctx.saved_tensors
        query, key, value = (tensor.detach().requires_grad_() for tensor in inputs)
        mask_learns = ctx.needs_input_grad[3]
        if mask_learns:
            mask = mask.detach().requires_grad_()
        with torch.enable_grad():
            context = products(query, key, value, mask, ctx.is_causal)
        learned = [query, key, value, *([mask] if mask_learns else [])]
        gradients = torch.autograd.grad(context, learned, dcontext)
        return (*gradients, None) if mask_learns else (*gradients, None, None)


_attend: Callable[..., Tensor] = _Attend.apply
