"""Homes: the tensor-parallel x expert-parallel ranks over which the neurons of one feed-forward network are split, and
what travels between them. In dense mode the weights do: over the expert-parallel group, gathered in forward and again
in backward, their gradients reduced to the owners. In sparse mode the tokens do: each once to every expert-parallel
rank that owns one of its experts. Inside a tensor-parallel group no token travels: its ranks have the same tokens,
compute what they own, and add up.

Shapes: T tokens, H hidden, E experts of the network, K experts per token, D expert-parallel ranks, R rows that travel.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks

from ssd_megatron.ffn.bank import NeuronTensors
from ssd_megatron.parallel.collectives import Group
from ssd_megatron.parallel.regions import enter_region, leave_region
from ssd_megatron.parallel.topology import Topology


class Route(NamedTuple):
    """How token rows travel over the expert-parallel group.

    Attributes:
        group: that group.
        token_R: int64, the token of each row this rank sends, rows for the first rank first.
        row_TD: int64, the row in which a token goes to each rank; R where it does not.
        sent, received: rows to and from each rank.
    """

    group: Group
    token_R: Tensor
    row_TD: Tensor
    sent: list[int]
    received: list[int]


class _View(NamedTuple):
    """Where to find a view of a gathered tensor again: in the gathered rows of `shard`."""

    shard: Tensor
    shape: torch.Size
    stride: tuple[int, ...]
    offset: int


class Homes:
    """The homes of one network's neurons as seen from one of them; without arguments, a single home.

    Home t * D + e belongs to tensor-parallel rank t and expert-parallel rank e; it owns the neurons (and experts) of
    the home-th of `count` equal parts.

    Args:
        gather_again: gather weights again in backward instead of keeping all layers' until then; False where the whole
            forward pass is recomputed anyway.
        once_per_step: gather weights once per optimizer step and keep them, and their gradients, until it ends.
    """

    def __init__(
        self, topology: Topology | None = None, *, gather_again: bool = True, once_per_step: bool = False
    ) -> None:
        self._tensor = topology.tensor if topology is not None and topology.tensor.size > 1 else None
        self._expert = topology.expert if topology is not None and topology.expert.size > 1 else None
        self._gather_again = gather_again
        self._kept = _KeptBank(self._expert) if once_per_step and self._expert is not None else None
        self.count = 1 if topology is None else topology.homes
        self.index = 0 if topology is None else topology.home

    def enter(self, x: Tensor) -> Tensor:
        """Into the part of the network that tensor-parallel ranks share: gradients are added up over them."""
        return x if self._tensor is None else enter_region(x, self._tensor.handle)

    def leave(self, y: Tensor) -> Tensor:
        """Out of that part: the ranks' outputs are added up."""
        return y if self._tensor is None else leave_region(y, self._tensor.handle)

    @contextmanager
    def gathered(self, shards: NeuronTensors) -> Iterator[NeuronTensors]:
        """Dense mode: all neurons of this tensor-parallel rank, to be used inside the context."""
        if self._expert is None:
            yield shards
            return
        group = self._expert
        if self._kept is not None and torch.is_grad_enabled():
            yield self._kept.use(shards)
            return
        whole = shards.each(lambda shard: _gather(shard, group))
        if not self._gather_again:
            yield whole
            return
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
            return _gather_rows(kept.shard.detach(), group).as_strided(kept.shape, kept.stride, kept.offset)

        with saved_tensors_hooks(pack, unpack):
            yield whole

    def begin_step(self, microbatches: int) -> None:
        """An optimizer step of so many forward and backward passes begins: weights have changed."""
        if self._kept is not None:
            self._kept.begin(microbatches)

    def end_step(self) -> None:
        """It is done: free what was kept."""
        if self._kept is not None:
            self._kept.begin(0)

    def local_ids(self, expert_ids: Tensor, num_experts: int) -> Tensor:
        """Numbers of experts among those of this home; -1 for those of others."""
        return _within(expert_ids, self.index * (num_experts // self.count), num_experts // self.count)

    @property
    def tokens_travel(self) -> bool:
        return self._expert is not None

    @torch.no_grad()
    def route(self, expert_ids_TK: Tensor, num_experts: int) -> tuple[Route, Tensor]:
        """Sparse mode with several expert-parallel ranks: plan the travel (waits for the device once).

        Returns:
            the route, and the experts of the rows that arrive [received rows, K], numbered as by `local_ids`.
        """
        assert self._expert is not None
        group, per_home, ranks = self._expert, num_experts // self.count, self._expert.size
        first_home = self.index - group.rank
        rank_TK = _within(expert_ids_TK // per_home, first_home, ranks)
        goes_TD = torch.zeros(len(rank_TK), ranks + 1, dtype=torch.bool, device=rank_TK.device)
        goes_TD.scatter_(1, rank_TK.remainder(ranks + 1), True)  # -1, another tensor rank's, is the last column
        goes_DT = goes_TD[:, :ranks].t().contiguous()
        row_DT = goes_DT.flatten().cumsum(0).view(ranks, -1) - 1
        sent_D = goes_DT.sum(1)
        received_D = torch.empty_like(sent_D)
        dist.all_to_all_single(received_D, sent_D, group=group.handle)
        sent, received = torch.stack([sent_D, received_D]).tolist()
        rank_R, token_R = goes_DT.nonzero(as_tuple=True)
        route = Route(group, token_R, torch.where(goes_DT, row_DT, len(token_R)).t().contiguous(), sent, received)
        first_R = (first_home + rank_R) * per_home
        ids_RK = _within(expert_ids_TK[token_R], first_R.unsqueeze(1), per_home)
        return route, _travel(ids_RK, route, forth=True)

    def send(self, x_TH: Tensor, route: Route) -> Tensor:
        """Rows of tokens at the ranks that own their experts, [received rows, H]."""
        return _send(x_TH, route)

    def send_gates(self, gates_TK: Tensor | None, route: Route) -> Tensor | None:
        """Gates of the rows that arrive; their gradients travel back."""
        return None if gates_TK is None else _send_gates(gates_TK, route)

    def collect(self, y_RH: Tensor, route: Route) -> Tensor:
        """What the rows' owners computed, back at the tokens and added up, [T, H]."""
        return _collect(y_RH, route)

    def all_rows(self, local: Tensor) -> Tensor:
        """Every home's rows one below the other, without gradients."""
        for group in (self._expert, self._tensor):
            local = local if group is None else _gather_rows(local.detach(), group)
        return local


class _KeptBank:
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
            self._whole = shards.each(lambda shard: _gather_rows(shard.detach(), self.group))
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


def _within(ids: Tensor, first: int | Tensor, count: int) -> Tensor:
    """Numbers counted from `first`; -1 where that is not in [0, count)."""
    ids = ids - first
    return ids.masked_fill((ids < 0) | (ids >= count), -1)


def _gather_rows(shard: Tensor, group: Group) -> Tensor:
    whole = shard.new_empty(group.size * shard.shape[0], *shard.shape[1:])
    dist.all_gather_into_tensor(whole, shard.contiguous(), group=group.handle)
    return whole


def _reduce_rows(dwhole: Tensor, group: Group) -> Tensor:
    """This rank's rows of the sum over the ranks."""
    dshard = dwhole.new_empty(dwhole.shape[0] // group.size, *dwhole.shape[1:])
    dist.reduce_scatter_tensor(dshard, dwhole.contiguous(), group=group.handle)
    return dshard


def _travel(rows: Tensor, route: Route, *, forth: bool) -> Tensor:
    """Exchange rows, from tokens to owners or back."""
    out_sizes, in_sizes = (route.received, route.sent) if forth else (route.sent, route.received)
    arrived = rows.new_empty(sum(out_sizes), rows.shape[1])
    dist.all_to_all_single(arrived, rows.contiguous(), out_sizes, in_sizes, group=route.group.handle)
    return arrived


def _to_owners(x_TH: Tensor, route: Route) -> Tensor:
    return _travel(x_TH[route.token_R], route, forth=True)


def _to_tokens(rows: Tensor, route: Route) -> Tensor:
    """Rows back at their tokens, added up per token in a fixed order."""
    rows_RH = _travel(rows, route, forth=False)
    padded = torch.cat([rows_RH, rows_RH.new_zeros(1, rows_RH.shape[1])])
    return F.embedding_bag(route.row_TD, padded, mode="sum")


class _Gather(torch.autograd.Function):
    """Rows of all ranks of a group; the gradient of each row is added up at its owner."""

    @staticmethod
    def forward(ctx: Any, shard: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _gather_rows(shard, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dwhole: Tensor) -> tuple[Tensor, None]:
        return _reduce_rows(dwhole, ctx.group), None


class _UseKept(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, shard: Tensor, whole: Tensor, kept: _KeptBank, index: int) -> Tensor:
        ctx.kept, ctx.index = kept, index
        return whole.view_as(whole)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dwhole: Tensor) -> tuple[Tensor | None, None, None, None]:
        return ctx.kept.add(ctx.index, dwhole), None, None, None


class _Send(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, route: Route) -> Tensor:
        ctx.route = route
        return _to_owners(x_TH, route)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, drows: Tensor) -> tuple[Tensor, None]:
        return _to_tokens(drows, ctx.route), None


class _SendGates(torch.autograd.Function):
    """A gate is 1 by definition: nothing travels forth."""

    @staticmethod
    def forward(ctx: Any, gates_TK: Tensor, route: Route) -> Tensor:
        ctx.route = route
        return gates_TK.new_ones(sum(route.received), gates_TK.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dgates: Tensor) -> tuple[Tensor, None]:
        return _to_tokens(dgates, ctx.route), None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, route: Route) -> Tensor:
        ctx.route = route
        return _to_tokens(rows, route)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TH: Tensor) -> tuple[Tensor, None]:
        return _to_owners(dy_TH, ctx.route), None


_gather: Callable[..., Tensor] = _Gather.apply
_use_kept: Callable[..., Tensor] = _UseKept.apply
_send: Callable[..., Tensor] = _Send.apply
_send_gates: Callable[..., Tensor] = _SendGates.apply
_collect: Callable[..., Tensor] = _Collect.apply
