"""The attention core that megatron-core's SelfAttention calls: torch's scaled dot product attention.

Shapes: s sequence, b batch, n query heads, g key/value heads, d head size.
"""

import torch.nn.functional as F
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn


class ScaledDotProductCore(nn.Module):
    """Softmax attention without parameters; runs flash, memory-efficient or plain kernels, whichever torch has here."""

    def __init__(
        self, config: TransformerConfig, layer_number: int, attn_mask_type: AttnMaskType, **_unused_by_this_core: object
    ) -> None:
        super().__init__()
        self.dropout = config.attention_dropout
        self.is_causal = attn_mask_type == AttnMaskType.causal

    def forward(
        self,
        query_sbnd: Tensor,
        key_sbgd: Tensor,
        value_sbgd: Tensor,
        attention_mask: Tensor | None = None,
        **_unused_by_this_core: object,
    ) -> Tensor:
        """Context [s, b, n * d]. `attention_mask`, if given, is True where a query must not look."""
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query_sbnd, key_sbgd, value_sbgd))
        context_bnsd = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=None if attention_mask is None else ~attention_mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=self.is_causal and attention_mask is None,
            enable_gqa=query.size(1) != key.size(1),
        )
        return context_bnsd.permute(2, 0, 1, 3).flatten(2)
