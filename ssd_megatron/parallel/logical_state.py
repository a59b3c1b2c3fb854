"""The logical state: every tensor by its global name, global shape and kind, whatever the layout.

Switching, checkpoints, export and verification read and write masters and moments through this module alone.
A tensor's value is laid out flat, and each rank holds one interval of it: its rows (parallel/sharding.py), of which
ZeRO leaves it a part.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ssd_megatron.parallel.sharding import row_shard
from ssd_megatron.parallel.topology import Topology
from ssd_megatron.parallel.zero import KINDS, MASTER, Fragment, ZeroAdapter


@dataclass(frozen=True)
class TensorSpec:
    """A logical tensor: its global name and shape."""

    name: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return int(torch.Size(self.shape).numel())


@dataclass(frozen=True)
class Interval:
    """Elements [start, stop) of a flattened logical tensor, owned by `rank` of the stage group."""

    rank: int
    start: int
    stop: int


class LogicalState:
    """Masters and moments of this stage's tensors by name.

    Args:
        parameters: what ZeRO optimizes, by logical name.
        kept_elsewhere: names whose tensors other ranks save (copies of a tied embedding).
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        zero: ZeroAdapter,
        topology: Topology,
        kept_elsewhere: frozenset[str] = frozenset(),
    ) -> None:
        self._parameters = dict(parameters)
        self._shards = {name: row_shard(p) for name, p in parameters.items()}
        self._zero = zero
        self._topology = topology
        self._kept_elsewhere = kept_elsewhere
        self.specs = {name: TensorSpec(name, self._shards[name].shape(p)) for name, p in parameters.items()}
        self._owners = self._gather_owners()

    def parameter(self, name: str) -> nn.Parameter:
        """This rank's rows of the tensor that the model computes with (its dtype; replicated over ZeRO's ranks)."""
        return self._parameters[name]

    def offset(self, name: str) -> int:
        """Position of the first element of this rank's rows in the flattened logical tensor."""
        return self._shards[name].offset(self._parameters[name])

    def fragment(self, name: str, kind: str) -> Fragment:
        """What this rank holds of a flattened logical tensor; writing its values changes the state."""
        fragment = self._zero.fragment(self._parameters[name], kind)
        return Fragment(self.offset(name) + fragment.start, fragment.values)

    def owners(self, name: str) -> list[Interval]:
        """Who owns what of a logical tensor, in order of the elements, without gaps; each element once."""
        return self._owners[name]

    def read(self, name: str, kind: str) -> Tensor:
        """The whole logical tensor, fp32, on every rank of the stage (collective over the stage)."""
        spec = self.specs[name]
        whole = torch.zeros(spec.numel, dtype=torch.float32, device=self._topology.device)
        if self._owns(name):
            fragment = self.fragment(name, kind)
            whole.narrow(0, fragment.start, fragment.values.numel()).copy_(fragment.values)
        self._topology.stage.reduce_(f"reading {name}", whole)
        return whole.view(spec.shape)

    def write(self, name: str, kind: str, whole: Tensor) -> None:
        """Set a logical tensor from its whole value, given on every rank. `publish` makes the model see masters."""
        if tuple(whole.shape) != self.specs[name].shape:
            raise ValueError(f"{name} has shape {self.specs[name].shape}, not {tuple(whole.shape)}")
        fragment = self.fragment(name, kind)
        fragment.values.copy_(whole.reshape(-1).narrow(0, fragment.start, fragment.values.numel()))

    def publish(self) -> None:
        """Copy masters into the model's parameters on all ranks (collective)."""
        self._zero.publish()

    def held(self) -> Iterator[tuple[str, str, Fragment]]:
        """Everything that this rank holds, as (name, kind, fragment)."""
        for name in self.specs:
            for kind in KINDS:
                fragment = self.fragment(name, kind)
                if fragment.values.numel():
                    yield name, kind, fragment

    def owned(self) -> Iterator[tuple[str, str, Fragment]]:
        """What this rank holds and is the one to save: over all ranks of the job, every element once."""
        return (item for item in self.held() if self._owns(item[0]) and item[0] not in self._kept_elsewhere)

    def adam_steps(self) -> dict[str, int]:
        """Adam's step count by the role of the parameter group."""
        return {str(group["role"]): self._zero.step(i) for i, group in enumerate(self._zero.groups)}

    def set_adam_step(self, role: str, step: int) -> None:
        for index, group in enumerate(self._zero.groups):
            if group["role"] == role:
                self._zero.set_step(index, step)

    def set_learning_rate(self, role: str, rate: float) -> None:
        """Learning rate of the parameter groups of one role for the next step."""
        for group in self._zero.groups:
            if group["role"] == role:
                group["lr"] = rate

    def learning_rates(self) -> dict[str, float]:
        """Learning rate of the next step by the role of the parameter group."""
        return {str(group["role"]): float(str(group["lr"])) for group in self._zero.groups}

    def _owns(self, name: str) -> bool:
        """Whether this rank's fragment counts: of what all tensor-parallel ranks hold alike, the first's does."""
        return self._topology.tensor.rank == 0 or not self._shards[name].replicated

    def _gather_owners(self) -> dict[str, list[Interval]]:
        local = {}
        for name in self.specs:
            fragment = self.fragment(name, MASTER)
            numel = fragment.values.numel() if self._owns(name) else 0
            local[name] = (fragment.start, fragment.start + numel)
        gathered = self._topology.stage.gather_objects("who owns what", local)
        owners = {}
        for name, spec in self.specs.items():
            pieces = sorted((part[name][0], part[name][1], rank) for rank, part in enumerate(gathered))
            intervals = [Interval(rank, start, stop) for start, stop, rank in pieces if stop > start]
            covered = [0, *(interval.stop for interval in intervals)]
            if covered[-1] != spec.numel or any(i.start != stop for i, stop in zip(intervals, covered, strict=False)):
                raise RuntimeError(f"the ranks do not own every element of {name} exactly once: {intervals}")
            owners[name] = intervals
        return owners
