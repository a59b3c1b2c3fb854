"""Cross entropy of a projection onto the vocabulary with one matrix of logits, in the dtype of the weights: what has to
be in fp32 is made for a few tokens at a time, and the gradient is written over the logits.

Shapes: T tokens, H hidden, V vocabulary of this tensor-parallel rank.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ssd_megatron.parallel.collectives import Group

# Bytes of fp32 values at a time: they should stay in the cache.
WORK_BYTES = {"cpu": 2**22, "cuda": 2**25}


def projected_losses(
    x_TH: Tensor,
    weight_VH: Tensor,
    bias_V: Tensor | None,
    labels_T: Tensor,
    group: Group,
    chunk_tokens: int | None = None,
) -> Tensor:
    """Cross entropy of softmax(x weight^T + bias), fp32 [T].

    Args:
        x_TH: in the dtype of the weights; the same on all ranks. Its gradient is this rank's part of a sum over them.
        weight_VH, bias_V: rows of this rank: of `group.size` equal parts of the vocabulary the `group.rank`-th.
        labels_T: token ids of the whole vocabulary. One outside of it gets the loss of a logit of 0, for masking.
        group: the tensor-parallel ranks.
        chunk_tokens: keep no logits: compute those of so many tokens at a time, and again in backward. None: keep them.
    """
    return _losses(x_TH, weight_VH, bias_V, labels_T, group, chunk_tokens)


class _ProjectedLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        labels_T: Tensor,
        group: Group,
        chunk_tokens: int | None,
    ) -> Tensor:
        columns_T = labels_T - group.rank * len(weight_VH)
        ctx.chunk = chunk_tokens or max(1, len(x_TH))
        kept, statistics = [], []
        for x, columns in zip(torch.split(x_TH, ctx.chunk), torch.split(columns_T, ctx.chunk), strict=True):
            logits = F.linear(x, weight_VH, bias_V)
            statistics += [_statistics(*part) for part in _in_parts(logits, columns)]
            if chunk_tokens is None:
                kept.append(logits)
        largest_T, exponentials_T, chosen_T = torch.cat(statistics, dim=1)
        if group.size > 1:
            local_T, largest_T = largest_T, largest_T.clone()
            dist.all_reduce(largest_T, op=dist.ReduceOp.MAX, group=group.handle)
            sums = torch.stack([exponentials_T * (local_T - largest_T).exp_(), chosen_T])
            dist.all_reduce(sums, group=group.handle)
            exponentials_T, chosen_T = sums
        logarithms_T = exponentials_T.log()
        ctx.save_for_backward(x_TH, weight_VH, bias_V, columns_T, largest_T + logarithms_T, *kept)
        losses_T: Tensor = logarithms_T - (chosen_T - largest_T)
        return losses_T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlosses_T: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None, None, None]:
        x_TH, weight_VH, bias_V, columns_T, normalizers_T, *kept = ctx.saved_tensors
        dx_TH, dweight_VH = torch.empty_like(x_TH), None
        dbias_V = None if bias_V is None else torch.zeros_like(bias_V, dtype=torch.float32)
        per_token = (columns_T, normalizers_T, dlosses_T)
        chunks = zip(*(torch.split(values, ctx.chunk) for values in (x_TH, dx_TH, *per_token)), strict=True)
        for x, dx, *values in chunks:
            logits = kept.pop() if kept else F.linear(x, weight_VH, bias_V)
            for part in _in_parts(logits, *values):
                _gradient_(*part)
            torch.mm(logits, weight_VH, out=dx)
            if dweight_VH is None:
                dweight_VH = logits.t() @ x
            else:
                dweight_VH.addmm_(logits.t(), x)
            if dbias_V is not None:
                dbias_V += logits.sum(0, dtype=torch.float32)
        assert dweight_VH is not None
        return dx_TH, dweight_VH, None if dbias_V is None else dbias_V.to(weight_VH.dtype), None, None, None


def _in_parts(logits_TV: Tensor, *per_token: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views of the rows of some tokens at a time, and of what there is for each token."""
    rows = max(1, WORK_BYTES[logits_TV.device.type] // (4 * logits_TV.shape[1]))
    return zip(*(torch.split(values, rows) for values in (logits_TV, *per_token)), strict=True)


def _statistics(logits_TV: Tensor, columns_T: Tensor) -> Tensor:
    """Largest logit, sum of the exponentials of the differences to it, logit of the label or 0; fp32 [3, T]."""
    values_TV = logits_TV.float()
    inside_T, index_T1 = _inside(columns_T, logits_TV.shape[1])
    chosen_T = values_TV.gather(1, index_T1)[:, 0] * inside_T
    largest_T = values_TV.amax(1)
    copy_TV = None if values_TV is logits_TV else values_TV
    exponentials_T = torch.sub(values_TV, largest_T[:, None], out=copy_TV).exp_().sum(1)
    return torch.stack([largest_T, exponentials_T, chosen_T])


def _gradient_(logits_TV: Tensor, columns_T: Tensor, normalizers_T: Tensor, dlosses_T: Tensor) -> None:
    """Write the gradient over the logits."""
    inside_T, index_T1 = _inside(columns_T, logits_TV.shape[1])
    values_TV = logits_TV.float()
    values_TV.sub_(normalizers_T[:, None]).exp_().mul_(dlosses_T[:, None])
    values_TV.scatter_add_(1, index_T1, -(dlosses_T * inside_T)[:, None])
    if values_TV is not logits_TV:
        logits_TV.copy_(values_TV)


def _inside(columns_T: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Whether this rank has each column, and the column [T, 1], or any other one that it has."""
    return (columns_T >= 0) & (columns_T < size), columns_T.clamp(0, size - 1)[:, None]


_losses: Callable[..., Tensor] = _ProjectedLosses.apply
