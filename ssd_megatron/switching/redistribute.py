"""Moves neurons to new positions in place: weights, fp32 masters and both Adam moments, over the ranks that own them.

A tensor with one row per neuron is permuted by rows: new row i is old row order[i]. ZeRO cuts the flattened tensor
between ranks anywhere, also inside a row. So the columns at which some rank's part begins cut every row into segments;
a segment of a row has one owner, and for each segment the move is a permutation of whole pieces between ranks.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True)
class MovePlan:
    """Who sends which rows of one tensor to whom; made without any process group.

    Attributes:
        order: [rows] int64, old position of the neuron at each new position.
        row_size: elements of one row.
    """

    order: Tensor
    row_size: int
    segments: tuple[Segment, ...]

    def rows_between(self, segment: Segment, source: int, destination: int) -> Tensor:
        """New positions (ascending) that `destination` owns and whose old row `source` owns."""
        mine = segment.owners == destination
        return torch.nonzero(mine & (segment.owners[self.order] == source)).flatten()

    def elements_between(self, source: int, destination: int) -> int:
        """Elements that `source` sends to `destination`."""
        return sum(self.rows_between(s, source, destination).numel() * (s.stop - s.start) for s in self.segments)

    def bytes_sent(self, element_size: int) -> int:
        """Bytes that cross between ranks for one kind of this tensor."""
        moved = 0
        for segment in self.segments:
            crossing = int((segment.owners != segment.owners[self.order]).sum())
            moved += crossing * (segment.stop - segment.start) * element_size
        return moved


def plan_move(order: Tensor, row_size: int, owners: Sequence[Interval]) -> MovePlan:
    """Plan the permutation of a tensor's rows.

    Args:
        order: [rows] int64, a permutation: old position of the neuron at each new position.
        row_size: elements per row.
        owners: who owns which elements of the flattened tensor, ascending, without gaps.
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
    ranks = torch.tensor([interval.rank for interval in owners])
    row_starts = torch.arange(rows) * row_size
    segments = []
    for start, stop in itertools.pairwise(cuts):
        owner = ranks[torch.searchsorted(stops, row_starts + start, right=True)]
        segments.append(Segment(start, stop, owner))
    return MovePlan(order, row_size, tuple(segments))


def apply_move(plan: MovePlan, start: int, values: Tensor, group: Group) -> None:
    """Permute the rows of a distributed tensor in place (collective over `group`, one all-to-all).

    Args:
        start, values: this rank's elements [start, start + numel) of the flattened tensor, written in place.
    """
    ranks = range(group.size)
    sent = [_pack(plan, start, values, group.rank, other) for other in ranks]
    sizes = [plan.elements_between(other, group.rank) for other in ranks]
    received = group.exchange("moving neurons", torch.cat(sent), [piece.numel() for piece in sent], sizes)
    for other, pieces in zip(ranks, torch.split(received, sizes), strict=True):
        _unpack(plan, start, values, group.rank, other, pieces)


def move_neurons(state: LogicalState, names: Sequence[str], order: Tensor, group: Group) -> int:
    """Give one bank's tensors (one row per neuron) a new order, masters and moments alike, one tensor at a time.

    The model's own parameters follow with `LogicalState.publish`.
    Returns:
        bytes that crossed between ranks.
    """
    moved = 0
    for name in names:
        spec = state.specs[name]
        plan = plan_move(order, spec.numel // spec.shape[0], state.owners(name))
        for kind in KINDS:
            fragment = state.fragment(name, kind)
            apply_move(plan, fragment.start, fragment.values, group)
            moved += plan.bytes_sent(fragment.values.element_size())
    return moved


def _pack(plan: MovePlan, start: int, values: Tensor, rank: int, destination: int) -> Tensor:
    """What this rank sends to `destination`, segment by segment, rows in the order of their new positions."""
    pieces = [values[:0]]
    for segment in plan.segments:
        rows = plan.order[plan.rows_between(segment, rank, destination)]
        if rows.numel():
            view, first = _rows(plan, segment, start, values, rank)
            pieces.append(view[(rows - first).to(view.device)].flatten())
    return torch.cat(pieces)


def _unpack(plan: MovePlan, start: int, values: Tensor, rank: int, source: int, pieces: Tensor) -> None:
    """Write what `source` packed for this rank into its new rows."""
    position = 0
    for segment in plan.segments:
        rows = plan.rows_between(segment, source, rank)
        if rows.numel():
            view, first = _rows(plan, segment, start, values, rank)
            piece = pieces.narrow(0, position, rows.numel() * view.shape[1])
            view[(rows - first).to(view.device)] = piece.view(-1, view.shape[1])
            position += piece.numel()


def _rows(plan: MovePlan, segment: Segment, start: int, values: Tensor, rank: int) -> tuple[Tensor, int]:
    """This rank's rows of a segment (they follow each other) as a strided view of its flat elements, and the first."""
    mine = segment.owners == rank
    first = int(mine.to(torch.int8).argmax())
    offset = values.storage_offset() + first * plan.row_size + segment.start - start
    shape, stride = (int(mine.sum()), segment.stop - segment.start), (plan.row_size, 1)
    return values.as_strided(shape, stride, offset), first
