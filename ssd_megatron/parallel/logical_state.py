"""The logical state: every tensor by its global name, global shape and kind, whatever the layout.

Switching, checkpoints, export and verification read and write masters and moments through this module alone.
A tensor's value is laid out flat, and each rank owns one interval of it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

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
    """Elements [start, stop) of a flattened logical tensor, owned by `rank` of the data-parallel group."""

    rank: int
    start: int
    stop: int


class LogicalState:
    """Masters and moments by name. `model` is the module whose parameters ZeRO optimizes."""

    def __init__(self, model: nn.Module, zero: ZeroAdapter, topology: Topology) -> None:
        self._parameters = dict(model.named_parameters())
        self._zero = zero
        self._topology = topology
        self.specs = {name: TensorSpec(name, tuple(p.shape)) for name, p in self._parameters.items()}
        self._owners = self._gather_owners()

    def parameter(self, name: str) -> nn.Parameter:
        """The tensor that the model computes with (its dtype; replicated over data-parallel ranks)."""
        return self._parameters[name]

    def fragment(self, name: str, kind: str) -> Fragment:
        """What this rank owns of a logical tensor; writing its values changes the state."""
        return self._zero.fragment(self._parameters[name], kind)

    def owners(self, name: str) -> list[Interval]:
        """Who owns what of a logical tensor, in order of the elements, without gaps."""
        return self._owners[name]

    def read(self, name: str, kind: str) -> Tensor:
        """The whole logical tensor, fp32, on every rank (collective)."""
        fragment = self.fragment(name, kind)
        spec = self.specs[name]
        whole = torch.zeros(spec.numel, dtype=torch.float32, device=self._topology.device)
        whole.narrow(0, fragment.start, fragment.values.numel()).copy_(fragment.values)
        dist.all_reduce(whole, group=self._topology.data_parallel_group)
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

    def local(self) -> Iterator[tuple[str, str, Fragment]]:
        """Everything that this rank owns, as (name, kind, fragment)."""
        for name in self.specs:
            for kind in KINDS:
                fragment = self.fragment(name, kind)
                if fragment.values.numel():
                    yield name, kind, fragment

    def adam_steps(self) -> dict[str, int]:
        """Adam's step count by the name of the parameter group."""
        return {str(group["name"]): self._zero.step(i) for i, group in enumerate(self._zero.groups)}

    def set_adam_step(self, group_name: str, step: int) -> None:
        names = [str(group["name"]) for group in self._zero.groups]
        self._zero.set_step(names.index(group_name), step)

    def set_learning_rate(self, group_name: str, rate: float) -> None:
        """Learning rate of one parameter group for the next step."""
        next(group for group in self._zero.groups if group["name"] == group_name)["lr"] = rate

    def learning_rates(self) -> dict[str, float]:
        """Learning rate of the next step by the name of the parameter group."""
        return {str(group["name"]): float(str(group["lr"])) for group in self._zero.groups}

    def _gather_owners(self) -> dict[str, list[Interval]]:
        local = {}
        for name in self.specs:
            fragment = self.fragment(name, MASTER)
            local[name] = (fragment.start, fragment.start + fragment.values.numel())
        gathered: list[dict[str, tuple[int, int]]] = [{}] * self._topology.data_parallel_size
        dist.all_gather_object(gathered, local, group=self._topology.data_parallel_group)
        owners = {}
        for name, spec in self.specs.items():
            pieces = sorted((part[name][0], part[name][1], rank) for rank, part in enumerate(gathered))
            intervals = [Interval(rank, start, stop) for start, stop, rank in pieces if stop > start]
            covered = [0, *(interval.stop for interval in intervals)]
            if covered[-1] != spec.numel or any(i.start != stop for i, stop in zip(intervals, covered, strict=False)):
                raise RuntimeError(f"the ranks do not own every element of {name} exactly once: {intervals}")
            owners[name] = intervals
        return owners
