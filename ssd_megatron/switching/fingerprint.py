"""One integer per neuron over everything that belongs to it, so that a switch can be verified exactly.

Sums over a tensor and the dense loss do not notice moments that were not moved or were moved by another order. A
neuron's fingerprint is a sum modulo 2^64 of the bit patterns of all its values, each multiplied by a fixed odd random
number for its tensor, kind and column: parts held by different ranks add up, and any value in a wrong place shows.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from ssd_megatron.parallel.collectives import Group
from ssd_megatron.parallel.logical_state import LogicalState
from ssd_megatron.parallel.zero import KINDS, MASTER
from ssd_megatron.seeding import generator_for

INTEGER_OF = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
CHUNK_ELEMENTS = 1 << 22


def bank_fingerprints(state: LogicalState, names: Sequence[str], group: Group) -> Tensor:
    """Fingerprints [neurons] int64 of one bank, by position, over masters and moments (collective over `group`).

    Args:
        names: the bank's tensors with one row per neuron.
    """
    neurons = state.specs[names[0]].shape[0]
    total = torch.zeros(neurons, dtype=torch.int64, device=state.parameter(names[0]).device)
    for name in names:
        row_size = state.specs[name].numel // neurons
        for kind in KINDS:
            fragment = state.fragment(name, kind)
            _add_fingerprints(total, fragment.values, fragment.start, row_size, f"{_leaf(name)}/{kind}")
    group.reduce_("fingerprints", total)
    return total


def stale_parameters(state: LogicalState, names: Sequence[str]) -> list[str]:
    """Names whose model parameter is not its master, rounded to the parameter's dtype, in this rank's part."""
    stale = []
    for name in names:
        fragment = state.fragment(name, MASTER)
        parameter = state.parameter(name).detach()
        part = parameter.reshape(-1).narrow(0, fragment.start - state.offset(name), fragment.values.numel())
        if not torch.equal(part, fragment.values.to(parameter.dtype)):
            stale.append(name)
    return stale


def replica_digest(state: LogicalState, names: Sequence[str]) -> str:
    """A hash of this rank's rows of one bank as the model computes with them: the same on ranks that hold the same."""
    total = torch.zeros(len(state.parameter(names[0])), dtype=torch.int64, device=state.parameter(names[0]).device)
    for name in names:
        parameter = state.parameter(name).detach()
        row_size = parameter.numel() // len(parameter)
        _add_fingerprints(total, parameter.reshape(-1), 0, row_size, _leaf(name))
    return hashlib.sha256(total.cpu().numpy().tobytes()).hexdigest()


def _add_fingerprints(total: Tensor, values: Tensor, start: int, row_size: int, key: str) -> None:
    """Add the part of each row's fingerprint that elements [start, start + numel) of a flattened tensor give."""
    weights = _column_weights(key, row_size).to(total.device)
    bits = values.view(INTEGER_OF[values.dtype])
    head = min(-start % row_size, bits.numel())  # a row that began on another rank
    if head:
        column = start % row_size
        total[start // row_size] += (bits[:head].long() * weights[column : column + head]).sum()
    row, rows = (start + head) // row_size, (bits.numel() - head) // row_size
    whole = bits[head : head + rows * row_size].view(rows, row_size)
    chunk = max(1, CHUNK_ELEMENTS // row_size)
    for first in range(0, rows, chunk):
        part = whole[first : first + chunk]
        total[row + first : row + first + len(part)] += (part.long() * weights).sum(1)
    tail = bits[head + rows * row_size :]
    if tail.numel():
        total[row + rows] += (tail.long() * weights[: tail.numel()]).sum()


def _column_weights(key: str, columns: int) -> Tensor:
    """Odd random int64 numbers that depend on `key` alone."""
    return torch.randint(-(2**62), 2**62, (columns,), generator=generator_for(key)) * 2 + 1


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]
