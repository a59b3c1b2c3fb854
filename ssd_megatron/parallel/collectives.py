"""Groups of ranks and what they do together outside the training step. Every operation has a name and a timeout: a rank
that waits in vain says for what, instead of hanging; ranks that see different things say which."""

import hashlib
import json
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


class CollectiveError(RuntimeError):
    """Ranks did not answer in time, or do not agree; the message says at what, and which."""


@contextmanager
def named(what: str) -> Iterator[None]:
    """Within: a failure of torch.distributed (timeout, lost peer) is raised as CollectiveError with this name.

    Names may be nested: a message has all of them, the outermost first. Other errors pass.
    """
    UNDER_WAY.append((what, time.monotonic()))
    try:
        yield
    except CollectiveError as error:
        raise CollectiveError(f"{what}: {error}") from error
    except RuntimeError as error:
        if not _is_from_communication(error):
            raise
        raise CollectiveError(f"{what}: another rank ended or did not answer ({_reason(error)})") from error
    finally:
        UNDER_WAY.pop()


# Names within which this process is now, and since when (time.monotonic), outermost first; waits.py reads it.
UNDER_WAY: list[tuple[str, float]] = []


def _is_from_communication(error: RuntimeError) -> bool:
    # Inside a training step a RuntimeError may be anything. gloo's has no type of its own, but names its source file.
    return isinstance(error, dist.DistError) or "/gloo/" in str(error)


def _reason(error: RuntimeError) -> str:
    """The first line without the path of gloo's source and its general advice."""
    line = str(error).strip().splitlines()[0]
    return re.sub(r"\[\S+/gloo/\S+\] ", "", line).partition(". This is typically caused")[0]


@dataclass(frozen=True)
class Group:
    """Ranks that share something; `rank` is this process among them.

    Attributes:
        name: what they share, for messages.
        ranks: their numbers in the whole job, ascending.
        handle: their process group, for collectives inside the training step.
        device: where tensors of collectives live.
    """

    name: str
    rank: int
    size: int
    ranks: tuple[int, ...]
    handle: dist.ProcessGroup
    device: torch.device

    def sum(self, what: str, values: list[float]) -> list[float]:
        """Sum of small numbers, in float64, the same on every rank."""
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        self.reduce_(what, total)
        return [float(value) for value in total.tolist()]

    def max(self, what: str, values: list[int]) -> list[int]:
        """Largest of small integers: how ranks agree on flags."""
        largest = torch.tensor(values, dtype=torch.int64, device=self.device)
        if self.size > 1:
            with named(self._where(what)):
                dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.handle)
        return [int(value) for value in largest.tolist()]

    def reduce_(self, what: str, tensor: Tensor) -> None:
        """Sum a tensor over the ranks, in place."""
        if self.size > 1:
            with named(self._where(what)):
                dist.all_reduce(tensor, group=self.handle)

    def gather_rows(self, what: str, tensor: Tensor) -> Tensor:
        """The ranks' tensors (all of one shape) one below the other, on every rank."""
        if self.size == 1:
            return tensor
        whole = tensor.new_empty(self.size * tensor.shape[0], *tensor.shape[1:])
        with named(self._where(what)):
            dist.all_gather_into_tensor(whole, tensor.contiguous(), group=self.handle)
        return whole

    def gather_to(self, what: str, tensor: Tensor, destination: int) -> list[Tensor]:
        """The ranks' tensors (all of one shape), by rank, on the rank `destination` of this group; elsewhere none."""
        if self.size == 1:
            return [tensor]
        parts = [torch.empty_like(tensor) for _ in range(self.size)] if self.rank == destination else []
        with named(self._where(what)):
            dist.gather(tensor.contiguous(), parts or None, self.ranks[destination], group=self.handle)
        return parts

    def exchange(self, what: str, sent: Tensor, sent_sizes: list[int], received_sizes: list[int]) -> Tensor:
        """All-to-all of the rows of `sent`: sizes are rows to and from each rank."""
        if self.size == 1:
            return sent
        received = sent.new_empty(sum(received_sizes), *sent.shape[1:])
        with named(self._where(what)):
            dist.all_to_all_single(received, sent, received_sizes, sent_sizes, group=self.handle)
        return received

    def gather_objects(self, what: str, mine: T) -> list[T]:
        """Every rank's object, by rank, on every rank."""
        gathered = [mine] * self.size
        if self.size > 1:
            with named(self._where(what)):
                dist.all_gather_object(gathered, mine, group=self.handle)
        return gathered

    def objects_to_first(self, what: str, mine: T) -> list[T]:
        """Every rank's object, by rank, on this group's first rank; elsewhere none."""
        if self.size == 1:
            return [mine]
        gathered: list[Any] = [None] * self.size if self.rank == 0 else []
        with named(self._where(what)):
            dist.gather_object(mine, gathered or None, self.ranks[0], group=self.handle)
        return gathered

    def agree(self, what: str, value: Any) -> None:
        """Check that every rank has the same value (ready for JSON).

        Raises:
            CollectiveError: on every rank alike, with the ranks that differ from the first.
        """
        digest = hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
        seen = self.gather_objects(what, (digest, str(value)[:200]))
        others = [
            f"rank {rank} has {text}" for rank, (d, text) in zip(self.ranks, seen, strict=True) if d != seen[0][0]
        ]
        if others:
            raise CollectiveError(f"{what}: rank {self.ranks[0]} has {seen[0][1]}, but {'; '.join(others)}")

    def _where(self, what: str) -> str:
        return f"{what} ({self.name} ranks {shown_ranks(self.ranks)}, this is rank {self.ranks[self.rank]})"


def shown_ranks(ranks: Sequence[int]) -> str:
    """Numbers of ranks for a message, shortened where they are many."""
    if len(ranks) <= 8:
        return ", ".join(map(str, ranks))
    return f"{', '.join(map(str, ranks[:4]))} ... {ranks[-1]}, {len(ranks)} in all"
