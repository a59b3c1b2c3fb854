"""What megatron-core's SelfAttention calls: torch's scaled dot product attention as its core, and the projection of
the heads' outputs.

Shapes: s sequence, b batch, n query heads, g key/value heads, d head size, h hidden; n and g of this tensor-parallel
rank.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from ssd_megatron.model.attention_gradients import attend, pays
from ssd_megatron.parallel.regions import leave_region
from ssd_megatron.parallel.sharding import shard_rows


class ScaledDotProductCore(nn.Module):
    """Softmax attention without parameters; runs flash, memory-efficient or plain kernels, whichever torch has here."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        pg_collection: ProcessGroupCollection,
        **_unused_by_this_core: object,
    ) -> None:
        super().__init__()
        self.tensor_group: dist.ProcessGroup = pg_collection.tp
        self.dropout = config.attention_dropout
        self.is_causal = attn_mask_type == AttnMaskType.causal

    def forward(
        self,
        query_sbnd: Tensor,
        key_sbgd: Tensor,
        value_sbgd: Tensor,
        attention_mask: Tensor | None = None,
        attention_bias: Tensor | None = None,
        **_unused_by_this_core: object,
    ) -> Tensor:
        """Context [s, b, n * d].

        Args:
            attention_mask: True where a query must not look.
            attention_bias: added to the scores [b or 1, n, s, keys]; then it alone says what is hidden, by -infinity.
        """
        assert attention_mask is None or attention_bias is None
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query_sbnd, key_sbgd, value_sbgd))
        mask = attention_bias if attention_mask is None else ~attention_mask
        is_causal = self.is_causal and mask is None
        dropout = self.dropout if self.training else 0.0
        if dropout == 0.0 and pays(query, key):
            return attend(query, key, value, mask, is_causal).permute(2, 0, 1, 3).flatten(2)
        with _own_dropout(dropout, self.tensor_group, query.device):
            context_bnsd = F.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=is_causal,
                enable_gqa=query.size(1) != key.size(1),
            )
        return context_bnsd.permute(2, 0, 1, 3).flatten(2)


class OutputProjection(nn.Module):
    """y = heads @ weight, added up over the tensor-parallel ranks; the bias is left to megatron-core.

    megatron-core's RowParallelLinear stores the transpose, split by columns. Here the rows are split, one for each
    output of a head, as everything that is sharded (parallel/sharding.py).

    Attributes:
        weight: [n * d, h].
        bias: [h] or None.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config: TransformerConfig,
        bias: bool,
        tp_group: dist.ProcessGroup,
        **_unused_here: object,
    ) -> None:
        super().__init__()
        self.tensor_group = tp_group
        self.weight = nn.Parameter(torch.empty(input_size // tp_group.size(), output_size, dtype=config.params_dtype))
        shard_rows(self.weight, tp_group.rank(), tp_group.size())
        self.bias = nn.Parameter(torch.empty(output_size, dtype=config.params_dtype)) if bias else None

    def forward(self, context_sbh: Tensor) -> tuple[Tensor, Tensor | None]:
        return leave_region(context_sbh @ self.weight, self.tensor_group), self.bias


@contextmanager
def _own_dropout(dropout: float, group: dist.ProcessGroup, device: torch.device) -> Iterator[None]:
    """Within: another dropout on each tensor-parallel rank, whose heads differ; outside all draw alike."""
    if dropout == 0.0 or group.size() == 1:
        yield
        return
    seed = int(torch.randint(2**62, ()))  # from the CPU's generator: no waiting for a GPU
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed + group.rank())
        yield
