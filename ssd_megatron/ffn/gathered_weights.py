"""Weights of neurons gathered from the expert-parallel ranks that own them, as dense mode computes: in forward and
again in backward, or once per optimizer step; their gradients are reduced to the owners."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks

from ssd_megatron.ffn.bank import NeuronTensors
from ssd_megatron.parallel.collectives import Group


class _View(NamedTuple):
    """Where to find a view of a gathered tensor again: in the gathered rows of `shard`."""

    shard: Tensor
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int


def gather_rows(shard: Tensor, group: Group) -> Tensor:
    """Every rank's rows one below the other, without gradients."""
    whole = shard.new_empty(group.size * shard.shape[0], *shard.shape[1:])
    dist.all_gather_into_tensor(whole, shard.detach().contiguous(), group=group.handle)
    return whole


@contextmanager
def gathered_twice(shards: NeuronTensors, group: Group) -> Iterator[NeuronTensors]:
    """All neurons, to be used inside the context: what backward needs of them is gathered again then, not kept."""
    whole = gathered_once(shards, group)
    shard_of = {
        gathered.untyped_storage().data_ptr(): shard
        for gathered, shard in zip(whole, shards, strict=True)
        if gathered is not None and shard is not None
    }

    def pack(saved: Tensor) -> Tensor | _View:
        shard = shard_of.get(saved.untyped_storage().data_ptr())
        return saved if shard is None else _View(shard, saved.shape, saved.stride(), int(saved.storage_offset()))

    def unpack(kept: Tensor | _View) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        return gather_rows(kept.shard, group).as_strided(kept.shape, kept.stride, kept.offset)

    with saved_tensors_hooks(pack, unpack):
        yield whole


def gathered_once(shards: NeuronTensors, group: Group) -> NeuronTensors:
    """All neurons."""
    return shards.each(lambda shard: _gather(shard, group))


class KeptBank:
    """Gathered weights of one optimizer step, and the sum of their gradients over its microbatches."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self.begin(0)

    def begin(self, microbatches: int) -> None:
        self._microbatches = microbatches
        self._whole: NeuronTensors | None = None
        self._gradients: dict[int, tuple[Tensor, int]] = {}

    def use(self, shards: NeuronTensors) -> NeuronTensors:
        """All neurons; their gradients reach the shards with the last backward pass of the step."""
        if self._whole is None:
            self._whole = shards.each(lambda shard: gather_rows(shard, self.group))
        parts = zip(shards, self._whole, strict=True)
        used = [
            None if shard is None or whole is None else _use_kept(shard, whole, self, index)
            for index, (shard, whole) in enumerate(parts)
        ]
        w_in, w_gate, b_in, b_gate, w_out = used
        assert w_in is not None and w_out is not None
        return NeuronTensors(w_in, w_gate, b_in, b_gate, w_out)

    def add(self, index: int, gradient: Tensor) -> Tensor | None:
        """Take in a microbatch's gradient; with the last, this rank's part of the sum over microbatches and ranks."""
        total, count = self._gradients.pop(index, (None, 0))
        total = gradient.clone() if total is None else total.add_(gradient)
        if count + 1 == self._microbatches:
            return _reduce_rows(total, self.group)
        self._gradients[index] = (total, count + 1)
        return None


def _reduce_rows(dwhole: Tensor, group: Group) -> Tensor:
    """This rank's rows of the sum over the ranks."""
    dshard = dwhole.new_empty(dwhole.shape[0] // group.size, *dwhole.shape[1:])
    dist.reduce_scatter_tensor(dshard, dwhole.contiguous(), group=group.handle)
    return dshard


class _Gather(torch.autograd.Function):
    """Rows of all ranks of a group; the gradient of each row is added up at its owner."""

    @staticmethod
    def forward(ctx: Any, shard: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return gather_rows(shard, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dwhole: Tensor) -> tuple[Tensor, None]:
        return _reduce_rows(dwhole, ctx.group), None


class _UseKept(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shard: Tensor, whole: Tensor, kept: KeptBank, index: int) -> Tensor:
        ctx.kept, ctx.index = kept, index
        return whole.view_as(whole)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dwhole: Tensor) -> tuple[Tensor | None, None, None, None]:
        return ctx.kept.add(ctx.index, dwhole), None, None, None


_gather: Callable[..., Tensor] = _Gather.apply
_use_kept: Callable[..., Tensor] = _UseKept.apply
