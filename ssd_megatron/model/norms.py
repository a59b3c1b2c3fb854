"""Normalisation outside of megatron-core's layers."""

from torch import nn

from ssd_megatron.config.model import ModelConfig


def make_norm(model: ModelConfig) -> nn.Module:
    """The model's kind of normalisation over the hidden size."""
    kind = nn.LayerNorm if model.normalization == "layernorm" else nn.RMSNorm
    return kind(model.hidden_size, eps=model.norm_epsilon)
