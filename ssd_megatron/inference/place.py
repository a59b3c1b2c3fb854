"""Where a model in use is: on one device, or in parts on the devices of tensor-parallel ranks that use it together."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ssd_megatron.config.schema import ParallelConfig
from ssd_megatron.ffn.routes import within
from ssd_megatron.parallel.collectives import Group
from ssd_megatron.parallel.device import share_cores
from ssd_megatron.parallel.launch import world_size_of_launch
from ssd_megatron.parallel.sharding import shard_rows
from ssd_megatron.parallel.topology import initialize_topology, leave_topology


@dataclass(frozen=True)
class Place:
    """The device of this process, and its part of a model; without `group` it has all of it.

    What is dealt out over the ranks is what training deals out over tensor-parallel ranks: heads, neurons, rows of the
    vocabulary. All ranks compute the same tokens, and have the same outputs.
    """

    dtype: torch.dtype
    device: torch.device
    group: Group | None = None

    @property
    def rank(self) -> int:
        return 0 if self.group is None else self.group.rank

    @property
    def ranks(self) -> int:
        return 1 if self.group is None else self.group.size

    def part(self, number: int) -> int:
        """How many of so many things this rank has."""
        assert number % self.ranks == 0, (number, self.ranks)
        return number // self.ranks

    def own(self, numbers: Tensor, count: int) -> Tensor:
        """Numbers of things, of which each rank has the next `count`, among this rank's; -1 for those of others."""
        return numbers if self.group is None else within(numbers, self.rank * count, count)

    def parameter(self, *shape: int) -> nn.Parameter:
        """One of this shape on this rank."""
        return nn.Parameter(torch.empty(shape, dtype=self.dtype, device=self.device))

    def rows(self, total: int, *rest: int) -> nn.Parameter:
        """This rank's part of the `total` rows of one, declared as such."""
        parameter = self.parameter(self.part(total), *rest)
        shard_rows(parameter, self.rank, self.ranks)
        return parameter

    def sum(self, what: str, part: Tensor) -> Tensor:
        """The sum of the ranks' tensors; overwrites this one's."""
        if self.group is not None:
            self.group.reduce_(what, part)
        return part

    def all_rows(self, what: str, rows: Tensor) -> Tensor:
        """The ranks' rows one below the other."""
        return rows if self.group is None else self.group.gather_rows(what, rows)

    def all_columns(self, what: str, columns: Tensor) -> Tensor:
        """The ranks' last dimensions side by side."""
        if self.group is None:
            return columns
        parts = self.group.gather_rows(what, columns[None])
        return parts.movedim(0, -2).flatten(-2)


@contextmanager
def launched_group() -> Iterator[Group | None]:
    """All processes that a launcher started for one tool, to use one model together; None for a process of its own.

    Inside, only the first of them has a standard output.
    """
    ranks = world_size_of_launch()
    if ranks == 1:
        yield None
        return
    topology = initialize_topology(ParallelConfig(tensor_parallel_size=ranks))
    try:
        share_cores()
        with open(os.devnull, "w") as nowhere, nullcontext() if topology.is_first else redirect_stdout(nowhere):
            yield topology.tensor
    finally:
        leave_topology()
