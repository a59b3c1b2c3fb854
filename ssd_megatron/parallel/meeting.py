"""What the ranks of a job tell each other before any process group exists: whether all of them can start, and alike.

It goes over the key-value store from which torch's process groups start, so that it does not depend on device or
backend: a rank that sees no GPU, or no data, is heard.
"""

import json
import os
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from ssd_megatron.errors import ConfigError, DataError
from ssd_megatron.parallel.collectives import CollectiveError, named, shown_ranks
from ssd_megatron.parallel.launch import join_launch

T = TypeVar("T")

AT_WORK = "ranks at work"  # a key: how often they have said so


class Meeting:
    """The ranks that one launcher started; methods are collective, in the same order on every rank.

    Attributes:
        rank, size: this process, and of how many.
        launched: a launcher started this process; False for plain python.
    Raises:
        ConfigError: this process cannot find out which rank it is.
        CollectiveError: a rank did not come in time.
    """

    def __init__(self, timeout_seconds: int) -> None:
        self.launched = join_launch()
        try:
            self._store, self.rank, self.size = next(rendezvous("env://", timeout=timedelta(seconds=timeout_seconds)))
        except dist.DistError as error:
            where, reason = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}", str(error).splitlines()[0]
            raise CollectiveError(f"the ranks do not meet at rank 0's address {where}: {reason}") from error
        self._topics = 0

    def gather(self, what: str, mine: str) -> list[str]:
        """Every rank's text, by rank, on every rank."""
        self._topics += 1
        topic = f"meeting {self._topics}, {what}"
        with named(f"meeting of all ranks, {what}"):
            self._store.set(f"{topic}, rank {self.rank}", mine)
            if self.rank == 0:
                keys = [f"{topic}, rank {rank}" for rank in range(self.size)]
                self._wait(keys)
                self._store.set(topic, json.dumps([text.decode() for text in self._store.multi_get(keys)]))
            self._wait_while_at_work([topic])
            gathered: list[str] = json.loads(self._store.get(topic))
        return gathered

    def at_work(self) -> None:
        """To be called now and then in what takes long, on any rank: the time of those who wait begins anew."""
        self._store.add(AT_WORK, 1)

    def together(self, what: str, action: Callable[[], T]) -> T:
        """Run `action` on every rank; if one cannot, none goes on.

        Raises:
            ConfigError: the same on every rank, if `action` raised ConfigError, DataError or OSError on any; the
                message names the ranks unless it is that of all.
        """
        try:
            result, failure = [action()], ""
        except (ConfigError, DataError, OSError) as error:
            result, failure = [], str(error)
        failures = self.gather(what, failure)
        if any(failures):
            self._leave()
            raise ConfigError(said_by_ranks(failures))
        return result[0]

    def _leave(self) -> None:
        """Rank 0, which may hold the store, goes last."""
        with named("leaving the meeting"):
            self._store.set(f"meeting left, rank {self.rank}", "")
            if self.rank == 0:
                self._wait([f"meeting left, rank {rank}" for rank in range(self.size)])

    def _wait(self, keys: list[str]) -> None:
        """Wait for every rank's key; the message of a timeout names the ranks, where torch's names all keys."""
        try:
            self._wait_while_at_work(keys)
        except dist.DistStoreError as error:
            missing = [rank for rank, key in enumerate(keys) if not self._store.check([key])]
            raise CollectiveError(f"rank {shown_ranks(missing)} ended or did not answer") from error

    def _wait_while_at_work(self, keys: list[str]) -> None:
        while True:
            said = self._store.add(AT_WORK, 0)
            try:
                self._store.wait(keys)
                return
            except dist.DistStoreError:
                if self._store.add(AT_WORK, 0) == said:
                    raise


def said_by_ranks(texts: list[str]) -> str:
    """One message of what ranks said, by rank; empty if they have nothing to say."""
    speakers: dict[str, list[int]] = {}
    for rank, text in enumerate(texts):
        if text:
            speakers.setdefault(text, []).append(rank)
    if len(speakers) == 1 and all(texts):
        return texts[0]
    return "; ".join(f"rank {shown_ranks(ranks)}: {text}" for text, ranks in speakers.items())
