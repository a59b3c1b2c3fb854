"""Counters of what a rank of a real run holds and sends, for plan_check."""

from collections import Counter
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ssd_megatron.ffn.gathered_weights import KeptBank
from ssd_megatron.planning.traffic import all_gather, all_reduce


class SentBytes(TorchDispatchMode):
    """Counts what this rank sends inside, by the ranks that take part."""

    def __init__(self) -> None:
        super().__init__()
        self.by_ranks: Counter[tuple[int, ...]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self._count(func._opname, args)
        return func(*args, **(kwargs or {}))

    def _count(self, operation: str, args: Any) -> None:
        group = next(dist.ProcessGroup.unbox(arg) for arg in args if isinstance(arg, torch.ScriptObject))
        ranks = tuple(dist.get_process_group_ranks(group))
        n = len(ranks)
        if operation == "allreduce_":
            sent = all_reduce(bytes_of(args[0]), n)
        elif operation in ("_allgather_base_", "_reduce_scatter_base_"):
            sent = all_gather(max(bytes_of(args[0]), bytes_of(args[1])), n)
        elif operation == "alltoall_base_":
            row = bytes_of(args[1]) / max(1, args[1].shape[0])
            parts = args[4] or [args[1].shape[0] // n] * n
            sent = row * sum(size for rank, size in enumerate(parts) if rank != group.rank())
        elif operation == "send":
            sent = float(bytes_of(args[0]))
            ranks = tuple(sorted((dist.get_rank(), ranks[args[2]])))
        elif operation in ("recv_", "barrier", "broadcast_", "allgather_"):
            return  # received, or small and outside the step
        else:
            raise AssertionError(f"an operation that is not counted: {operation}")
        self.by_ranks[ranks] += int(sent)


class KeptBytes:
    """Bytes of the tensors that autograd keeps, each storage once, without parameters."""

    def __init__(self, parameters: list[Tensor]) -> None:
        self._parameters = {p.untyped_storage().data_ptr() for p in parameters}
        self._users: Counter[int] = Counter()
        self._now = self.peak = 0

    def pack(self, tensor: Tensor) -> "Tensor | _Kept":
        storage = tensor.untyped_storage()
        return tensor if storage.data_ptr() in self._parameters else _Kept(self, tensor)

    @staticmethod
    def unpack(kept: "Tensor | _Kept") -> Tensor:
        return kept if isinstance(kept, Tensor) else kept.tensor

    def change(self, pointer: int, size: int, by: int) -> None:
        before = self._users[pointer]
        self._users[pointer] += by
        if (before == 0) != (self._users[pointer] == 0):
            self._now += size * by
            self.peak = max(self.peak, self._now)


class _Kept:
    def __init__(self, counter: KeptBytes, tensor: Tensor) -> None:
        self.tensor = tensor
        self._counter, storage = counter, tensor.untyped_storage()
        self._storage = (storage.data_ptr(), storage.nbytes())
        counter.change(*self._storage, 1)

    def __del__(self) -> None:
        self._counter.change(*self._storage, -1)


class GradientBytes:
    """Most bytes that gradients have when they are reduced (ZeRO 1) or used (ZeRO 2)."""

    def __init__(self, optimizer: Any) -> None:
        self.peak = 0
        name = "step" if optimizer.partition_gradients else "reduce_gradients"
        original = getattr(optimizer, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            tensors = [p.grad for group in optimizer.bit16_groups for p in group if p.grad is not None]
            for groups in (optimizer.averaged_gradients, optimizer.all_grad_tensors):
                tensors += [t for group in groups.values() if group is not None for t in group]
            storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
            self.peak = max(self.peak, sum(storages.values()))
            return original(*args, **kwargs)

        setattr(optimizer, name, watched)


class GatheredBytes:
    """Most bytes of gathered weights that are kept for a step, and of their gradients between microbatches."""

    def __init__(self) -> None:
        self.weights = self.gradients = 0
        kept: dict[int, tuple[int, int]] = {}
        original = KeptBank.add

        def watched(bank: KeptBank, index: int, gradient: Tensor) -> Tensor | None:
            reduced = original(bank, index, gradient)
            weights = [whole for whole in bank._whole or () if whole is not None]
            kept[id(bank)] = bytes_of(weights), bytes_of([total for total, _ in bank._gradients.values()])
            now = [sum(sizes) for sizes in zip(*kept.values(), strict=True)]
            self.weights, self.gradients = max(self.weights, now[0]), max(self.gradients, now[1])
            return reduced

        KeptBank.add = watched


def bytes_of(tensors: Any) -> int:
    """Bytes of a tensor, or of lists of tensors."""
    if isinstance(tensors, Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(bytes_of(t) for t in tensors)
