"""The language-model head and its loss. Shapes: b batch, s sequence, h hidden, v vocabulary."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssd_megatron.config.schema import ModelConfig


class LanguageModelHead(nn.Module):
    """Final normalisation and output projection; `weight` [v, h] is the word embedding's if they are tied."""

    def __init__(self, model: ModelConfig, word_embedding: nn.Parameter) -> None:
        super().__init__()
        norm = nn.LayerNorm if model.normalization == "layernorm" else nn.RMSNorm
        self.norm = norm(model.hidden_size, eps=model.norm_epsilon)
        self.weight = word_embedding
        if not model.tie_embeddings:
            self.weight = nn.Parameter(torch.empty(model.padded_vocab_size, model.hidden_size))

    def forward(self, x_sbh: Tensor) -> Tensor:
        """Logits [s, b, v]."""
        return F.linear(self.norm(x_sbh), self.weight)


def token_losses(logits_sbv: Tensor, labels_bs: Tensor) -> Tensor:
    """Cross entropy of each token in fp32, [b, s]."""
    losses = F.cross_entropy(logits_sbv.flatten(0, 1).float(), labels_bs.t().flatten(), reduction="none")
    return losses.view(logits_sbv.size(0), logits_sbv.size(1)).t()
