"""Into and out of what tensor-parallel ranks compute in parts: f and g of Megatron-LM (arXiv 1909.08053, section 3).

megatron-core's own functions reduce in place, also a gradient that autograd may have handed to others, and return a
tensor that is not contiguous unreduced.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def enter_region(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The same x; its gradient is the sum of the ranks' gradients."""
    return x if group.size() == 1 else _enter(x, group)


def leave_region(y: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of the ranks' y; its gradient is that of the sum."""
    return y if group.size() == 1 else _leave(y, group)


def _sum(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    total = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dx: Tensor) -> tuple[Tensor, None]:
        return _sum(dx, ctx.group), None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, group: dist.ProcessGroup) -> Tensor:
        return _sum(y, group)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return dy, None


_enter: Callable[..., Tensor] = _Enter.apply
_leave: Callable[..., Tensor] = _Leave.apply
