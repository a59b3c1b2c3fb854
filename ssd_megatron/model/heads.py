"""The language-model head and its loss.

Shapes: b batch, s sequence, h hidden, v vocabulary of this tensor-parallel rank.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssd_megatron.config.schema import ModelConfig
from ssd_megatron.model.cross_entropy import projected_losses
from ssd_megatron.parallel.regions import enter_region
from ssd_megatron.parallel.sharding import shard_rows
from ssd_megatron.parallel.topology import Topology


class LanguageModelHead(nn.Module):
    """Final normalisation and output projection.

    Args:
        word_embedding: the word embedding's weight [v, h] if this stage has it; it is the head's if they are tied.
        loss_chunk_tokens: see projected_losses.
    """

    def __init__(
        self,
        model: ModelConfig,
        word_embedding: nn.Parameter | None,
        topology: Topology,
        loss_chunk_tokens: int | None = None,
    ) -> None:
        super().__init__()
        self.loss_chunk_tokens = loss_chunk_tokens
        norm = nn.LayerNorm if model.normalization == "layernorm" else nn.RMSNorm
        self.norm = norm(model.hidden_size, eps=model.norm_epsilon)
        self.tensor = topology.tensor
        if model.tie_embeddings and word_embedding is not None:
            self.weight = word_embedding
        else:
            self.weight = nn.Parameter(torch.empty(model.padded_vocab_size // self.tensor.size, model.hidden_size))
            shard_rows(self.weight, self.tensor.rank, self.tensor.size)

    def forward(self, x_sbh: Tensor) -> Tensor:
        """What both logits and losses are made of, [s, b, h]: normalised, and the same on all tensor-parallel ranks."""
        return enter_region(self.norm(x_sbh), self.tensor.handle)

    def logits(self, normed_sbh: Tensor) -> Tensor:
        """Logits [s, b, v]."""
        return F.linear(normed_sbh, self.weight)

    def token_losses(self, normed_sbh: Tensor, labels_bs: Tensor) -> Tensor:
        """Cross entropy of each token in fp32, [b, s]."""
        labels_sb = labels_bs.t()
        losses_T = projected_losses(
            normed_sbh.flatten(0, 1), self.weight, labels_sb.flatten(), self.tensor, self.loss_chunk_tokens
        )
        return losses_T.view(labels_sb.shape).t()
