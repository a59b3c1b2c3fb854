"""Moves neurons to new positions in place: weights, fp32 masters and both Adam moments, over the ranks that own them.

A tensor with one row per neuron is permuted by rows: new row i is old row order[i]. ZeRO cuts the flattened tensor
between ranks anywhere, also inside a row. So the columns at which some rank's part begins cut every row into segments;
a segment of a row has one owner, and for each segment the move is a permutation of whole pieces between ranks.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ssd_megatron.parallel.collectives import Group
from ssd_megatron.parallel.logical_state import Interval, LogicalState
from ssd_megatron.parallel.zero import KINDS


@dataclass(frozen=True)
class Segment:
    """Columns [start, stop) of every row; `owners` [rows] int64 is the rank that owns them in each row."""

    start: int
    stop: int
    owners: Tensor


class RowMoves(NamedTuple):
    """What one rank sends and receives of one segment.

    Attributes:
        sent: old rows, by destination, there in the order of their new positions; `sent_counts` by destination.
        received: new rows, by source, there in order; `received_counts` by source.
    """

    sent: Tensor
    sent_counts: list[int]
    received: Tensor
    received_counts: list[int]


@dataclass(frozen=True)
class MovePlan:
    """Who sends which rows of one tensor to whom; made without any process group.

    Attributes:
        order: [rows] int64, old position of the neuron at each new position.
        row_size: elements of one row.
        ranks: number of ranks that own parts.
    """

    order: Tensor
    row_size: int
    ranks: int
    segments: tuple[Segment, ...]

    def moves(self, rank: int) -> list[RowMoves]:
        """One rank's part, segment by segment."""
        return [self._row_moves(segment, rank) for segment in self.segments]

    def traffic(self) -> Tensor:
        """Elements that each rank sends to each (rows: source, columns: destination), [ranks, ranks] int64."""
        total = torch.zeros(self.ranks * self.ranks, dtype=torch.int64)
        for segment in self.segments:
            pairs = segment.owners[self.order] * self.ranks + segment.owners
            total += torch.bincount(pairs, minlength=total.numel()) * (segment.stop - segment.start)
        return total.view(self.ranks, self.ranks)

    def elements_moved(self) -> int:
        """Elements that cross between ranks, for one kind (master or a moment) of this tensor."""
        traffic = self.traffic()
        return int(traffic.sum() - traffic.diagonal().sum())

    def __str__(self) -> str:
        lines = [f"{len(self.order)} neurons x {self.row_size} elements on {self.ranks} ranks"]
        traffic = self.traffic()
        lines += [
            f"rank {source} -> rank {destination}: {int(traffic[source, destination])} elements"
            for source, destination in traffic.nonzero().tolist()
            if source != destination
        ]
        return "\n".join(lines)

    def _row_moves(self, segment: Segment, rank: int) -> RowMoves:
        source, destination = segment.owners[self.order], segment.owners
        leaving, arriving = (source == rank).nonzero().flatten(), (destination == rank).nonzero().flatten()
        leaving = leaving[destination[leaving].argsort(stable=True)]
        arriving = arriving[source[arriving].argsort(stable=True)]
        return RowMoves(
            self.order[leaving],
            torch.bincount(destination[leaving], minlength=self.ranks).tolist(),
            arriving,
            torch.bincount(source[arriving], minlength=self.ranks).tolist(),
        )


def plan_move(order: Tensor, row_size: int, owners: Sequence[Interval], ranks: int) -> MovePlan:
    """Plan the permutation of a tensor's rows.

    Args:
        order: [rows] int64, a permutation: old position of the neuron at each new position.
        row_size: elements per row.
        owners: who owns which elements of the flattened tensor, ascending, without gaps.
        ranks: number of ranks, of which some may own nothing.
    Raises:
        ValueError: `order` is not a permutation, or `owners` do not cover the tensor.
    """
    rows = order.numel()
    if not torch.equal(order.sort().values, torch.arange(rows)):
        raise ValueError("the order of neurons is not a permutation")
    if owners[-1].stop != rows * row_size:
        raise ValueError(f"the owners cover {owners[-1].stop} elements, the tensor has {rows} x {row_size}")
    cuts = sorted({0, row_size, *(interval.start % row_size for interval in owners)})
    stops = torch.tensor([interval.stop for interval in owners])
    numbers = torch.tensor([interval.rank for interval in owners])
    row_starts = torch.arange(rows) * row_size
    segments = []
    for start, stop in itertools.pairwise(cuts):
        owner = numbers[torch.searchsorted(stops, row_starts + start, right=True)]
        segments.append(Segment(start, stop, owner))
    return MovePlan(order, row_size, ranks, tuple(segments))


def apply_move(plan: MovePlan, moves: Sequence[RowMoves], start: int, values: Tensor, group: Group) -> None:
    """Permute the rows of a distributed tensor in place (collective over `group`, one all-to-all).

    Takes memory for what this rank sends and receives: twice its part of the tensor.

    Args:
        moves: this rank's part of the plan.
        start, values: this rank's elements [start, start + numel) of the flattened tensor, written in place.
    """
    widths = [segment.stop - segment.start for segment in plan.segments]
    sent = [
        _rows(plan, segment, start, values, group.rank, move.sent).split_with_sizes(move.sent_counts)
        for segment, move in zip(plan.segments, moves, strict=True)
    ]
    by_destination = [part[rank].flatten() for rank in range(plan.ranks) for part in sent]
    sent_sizes, received_sizes = (
        [sum(width * count[rank] for width, count in zip(widths, counts, strict=True)) for rank in range(plan.ranks)]
        for counts in ([move.sent_counts for move in moves], [move.received_counts for move in moves])
    )
    received = group.exchange("moving neurons", torch.cat(by_destination), sent_sizes, received_sizes)
    del sent, by_destination
    sizes = [
        width * move.received_counts[rank]
        for rank in range(plan.ranks)
        for width, move in zip(widths, moves, strict=True)
    ]
    pieces = torch.split(received, sizes)
    for index, (segment, move) in enumerate(zip(plan.segments, moves, strict=True)):
        rows = torch.cat([piece.view(-1, widths[index]) for piece in pieces[index :: len(widths)]])
        _set_rows(plan, segment, start, values, group.rank, move.received, rows)


def move_neurons(state: LogicalState, names: Sequence[str], order: Tensor, group: Group) -> int:
    """Give one bank's tensors (one row per neuron) a new order, masters and moments alike, one tensor at a time.

    The model's own parameters follow with `LogicalState.publish`.
    Returns:
        bytes that crossed between ranks.
    """
    moved = 0
    for name in names:
        spec = state.specs[name]
        plan = plan_move(order, spec.numel // spec.shape[0], state.owners(name), group.size)
        moves = plan.moves(group.rank)
        for kind in KINDS:
            fragment = state.fragment(name, kind)
            apply_move(plan, moves, fragment.start, fragment.values, group)
            moved += plan.elements_moved() * fragment.values.element_size()
    return moved


def _rows(plan: MovePlan, segment: Segment, start: int, values: Tensor, rank: int, rows: Tensor) -> Tensor:
    """Some of this rank's rows of a segment, [len(rows), width], copied."""
    if not rows.numel():
        return values.new_empty(0, segment.stop - segment.start)
    view, first = _own_rows(plan, segment, start, values, rank)
    return view[(rows - first).to(view.device)]


def _set_rows(
    plan: MovePlan, segment: Segment, start: int, values: Tensor, rank: int, rows: Tensor, new: Tensor
) -> None:
    if rows.numel():
        view, first = _own_rows(plan, segment, start, values, rank)
        view[(rows - first).to(view.device)] = new


def _own_rows(plan: MovePlan, segment: Segment, start: int, values: Tensor, rank: int) -> tuple[Tensor, int]:
    """This rank's rows of a segment (they follow each other) as a strided view of its flat elements, and the first."""
    mine = segment.owners == rank
    first = int(mine.to(torch.int8).argmax())
    offset = values.storage_offset() + first * plan.row_size + segment.start - start
    shape, stride = (int(mine.sum()), segment.stop - segment.start), (plan.row_size, 1)
    return values.as_strided(shape, stride, offset), first
