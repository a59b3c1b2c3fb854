"""Which rows of its logical tensor a parameter holds. Whatever is sharded is sharded along its first dimension, so a
shard is one interval of the flattened logical tensor."""

from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class RowShard:
    """Rows [first, first + local) of a logical tensor of `total` rows.

    `replicated`: all tensor-parallel ranks hold the same rows.
    """

    first: int
    total: int
    replicated: bool

    def offset(self, parameter: Tensor) -> int:
        """Position of the parameter's first element in the flattened logical tensor."""
        return self.first * row_size(parameter)

    def shape(self, parameter: Tensor) -> tuple[int, ...]:
        """Shape of the logical tensor."""
        return (self.total, *parameter.shape[1:])


def row_size(parameter: Tensor) -> int:
    return parameter.numel() // max(1, parameter.shape[0])


def shard_rows(parameter: Tensor, index: int, shards: int) -> None:
    """Declare that a parameter holds the `index`-th of `shards` equal parts of a logical tensor's rows."""
    rows = parameter.shape[0]
    # DeepSpeed reads `tensor_model_parallel`: without it a gradient norm counts the parameter on one tensor rank only.
    vars(parameter).update(
        row_shard=RowShard(index * rows, shards * rows, replicated=False), tensor_model_parallel=True
    )


def mark_expert_parallel(parameter: nn.Parameter, group_name: str) -> None:
    """Declare that a parameter belongs to one expert-parallel rank: DeepSpeed reduces its gradient over the ranks that
    hold the same one."""
    vars(parameter).update(allreduce=False, group_name=group_name)


def expert_group_of(parameter: nn.Parameter) -> str | None:
    """Name of a parameter's expert-parallel group; None if it is none's."""
    name = vars(parameter).get("group_name")
    assert name is None or isinstance(name, str)
    return name


def row_shard(parameter: Tensor) -> RowShard:
    """What `shard_rows` declared; a parameter without declaration is whole on every tensor-parallel rank."""
    whole = RowShard(0, parameter.shape[0], replicated=True)
    shard = vars(parameter).get("row_shard", whole)
    assert isinstance(shard, RowShard)
    return shard
