"""Homes: the tensor-parallel x expert-parallel ranks over which the neurons of one feed-forward network are split, and
what travels between them. In dense mode the weights do, over the expert-parallel group (gathered_weights.py); in sparse
mode the tokens (routes.py). Inside a tensor-parallel group no token travels: its ranks have the same tokens, compute
what they own, and add up.

Shapes: T tokens, H hidden, K experts per token, R rows that travel.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ssd_megatron.ffn.bank import NeuronTensors
from ssd_megatron.ffn.gathered_weights import KeptBank, gather_rows, gathered_once, gathered_twice
from ssd_megatron.ffn.routes import Route, plan_route, within
from ssd_megatron.parallel.regions import enter_region, leave_region
from ssd_megatron.parallel.topology import Topology


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
        self._kept = KeptBank(self._expert) if once_per_step and self._expert is not None else None
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
        if not self._gather_again:
            yield gathered_once(shards, group)
            return
        with gathered_twice(shards, group) as whole:
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
        if self.count == 1:
            return expert_ids
        return within(expert_ids, self.index * (num_experts // self.count), num_experts // self.count)

    @property
    def tokens_travel(self) -> bool:
        return self._expert is not None

    def route(self, expert_ids_TK: Tensor, num_experts: int) -> tuple[Route, Tensor]:
        """Sparse mode with several expert-parallel ranks: plan the travel.

        Returns:
            the route, and the experts of the rows that arrive [received rows, K], numbered as by `local_ids`.
        """
        assert self._expert is not None
        per_home = num_experts // self.count
        return plan_route(expert_ids_TK, self._expert, (self.index - self._expert.rank) * per_home, per_home)

    def all_rows(self, local: Tensor) -> Tensor:
        """Every home's rows one below the other, without gradients."""
        for group in (self._expert, self._tensor):
            local = local if group is None else gather_rows(local, group)
        return local
