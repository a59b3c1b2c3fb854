"""The feed-forward networks of all pipeline stages, of which each rank has those of its own."""

from collections.abc import Mapping, Sequence
from typing import TypeVar

from ssd_megatron.ffn.switchable import SwitchableFFN
from ssd_megatron.parallel.topology import Topology

T = TypeVar("T")


class Networks:
    """Networks by the name of their module.

    Args:
        names: all stages' in order.
        local: this stage's.
        tokens: of a sample in each network, where they differ.

    Attributes:
        homes: ranks over which each network's neurons are split.
    """

    def __init__(
        self,
        names: Sequence[str],
        local: Mapping[str, SwitchableFFN],
        topology: Topology,
        tokens: Sequence[int] | None = None,
    ) -> None:
        assert set(local) <= set(names), (names, list(local))
        self.tokens = list(tokens) if tokens is not None else [1] * len(names)
        assert len(self.tokens) == len(names), (names, tokens)
        self.names = list(names)
        self.local = dict(local)
        self.topology = topology
        self.homes = topology.homes

    def all_stages(self, what: str, mine: Mapping[str, T]) -> list[T]:
        """What each stage has by network, in the order of the networks; networks without are left out (collective).

        Args:
            what: for messages.
        """
        stages = self.topology.pipeline.gather_objects(what, dict(mine))
        merged = {name: value for stage in stages for name, value in stage.items()}
        return [merged[name] for name in self.names if name in merged]

    def top_k(self) -> list[int]:
        """Experts that a token computes in each network of all stages (collective)."""
        return self.all_stages("top_k", {name: ffn.router.top_k for name, ffn in self.local.items()})

    def set_top_k(self, top_k: Sequence[int]) -> None:
        """Set it, given for all stages."""
        for name, experts in zip(self.names, top_k, strict=True):
            if name in self.local:
                self.local[name].router.top_k = experts
