"""Tokens that travel to the expert-parallel ranks that own their experts, as sparse mode computes: each once to every
such rank, and what is computed of it back.

Shapes: T tokens, H hidden, E experts of the network, K experts per token, D expert-parallel ranks, R rows that travel.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ssd_megatron.parallel.collectives import Group


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

    def send(self, x_TH: Tensor) -> Tensor:
        """Rows of tokens at the ranks that own their experts, [received rows, H]."""
        return _send(x_TH, self)

    def send_gates(self, gates_TK: Tensor | None, scaled: bool) -> Tensor | None:
        """Gates of the rows that arrive; their gradients travel back, and their values forth if they are `scaled`."""
        return None if gates_TK is None else _send_gates(gates_TK, self, scaled)

    def collect(self, y_RH: Tensor) -> Tensor:
        """What the rows' owners computed, back at the tokens and added up, [T, H]."""
        return _collect(y_RH, self)


@torch.no_grad()
def plan_route(expert_ids_TK: Tensor, group: Group, first_expert: int, per_rank: int) -> tuple[Route, Tensor]:
    """Plan the travel (waits for the device once).

    Args:
        group: expert-parallel ranks; rank d owns the experts from first_expert + d * per_rank on.
    Returns:
        the route, and the experts of the rows that arrive [received rows, K], counted from the owner's first; -1 for
        those of other ranks.
    """
    rank_TK = within(expert_ids_TK, first_expert, group.size * per_rank) // per_rank  # -1 stays -1
    goes_TD = torch.zeros(len(rank_TK), group.size + 1, dtype=torch.bool, device=rank_TK.device)
    goes_TD.scatter_(1, rank_TK.remainder(group.size + 1), True)  # -1, another tensor rank's, is the last column
    goes_DT = goes_TD[:, : group.size].t().contiguous()
    row_DT = goes_DT.flatten().cumsum(0).view(group.size, -1) - 1
    sent_D = goes_DT.sum(1)
    received_D = torch.empty_like(sent_D)
    dist.all_to_all_single(received_D, sent_D, group=group.handle)
    sent, received = torch.stack([sent_D, received_D]).tolist()
    rank_R, token_R = goes_DT.nonzero(as_tuple=True)
    route = Route(group, token_R, torch.where(goes_DT, row_DT, len(token_R)).t().contiguous(), sent, received)
    first_R = first_expert + rank_R * per_rank
    ids_RK = within(expert_ids_TK[token_R], first_R.unsqueeze(1), per_rank)
    return route, _travel(ids_RK, route, forth=True)


def within(ids: Tensor, first: int | Tensor, count: int) -> Tensor:
    """Numbers counted from `first`; -1 where that is not in [0, count)."""
    ids = ids - first
    return ids.masked_fill((ids < 0) | (ids >= count), -1)


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
    """A gate is 1 by definition unless it scales: nothing travels forth."""

    @staticmethod
    def forward(ctx: Any, gates_TK: Tensor, route: Route, scaled: bool) -> Tensor:
        ctx.route = route
        return _to_owners(gates_TK, route) if scaled else gates_TK.new_ones(sum(route.received), gates_TK.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dgates: Tensor) -> tuple[Tensor, None, None]:
        return _to_tokens(dgates, ctx.route), None, None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, route: Route) -> Tensor:
        ctx.route = route
        return _to_tokens(rows, route)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TH: Tensor) -> tuple[Tensor, None]:
        return _to_owners(dy_TH, ctx.route), None


_send: Callable[..., Tensor] = _Send.apply
_send_gates: Callable[..., Tensor] = _SendGates.apply
_collect: Callable[..., Tensor] = _Collect.apply
