"""The language-model head and its loss.

Shapes: b batch, s sequence, h hidden, v vocabulary of this tensor-parallel rank.
"""

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy
from torch import Tensor, nn

from ssd_megatron.config.schema import ModelConfig
from ssd_megatron.parallel.regions import enter_region
from ssd_megatron.parallel.sharding import shard_rows
from ssd_megatron.parallel.topology import Topology


class LanguageModelHead(nn.Module):
    """Final normalisation and output projection.

    Args:
        word_embedding: the word embedding's weight [v, h] if this stage has it; it is the head's if they are tied.
    """

    def __init__(self, model: ModelConfig, word_embedding: nn.Parameter | None, topology: Topology) -> None:
        super().__init__()
        norm = nn.LayerNorm if model.normalization == "layernorm" else nn.RMSNorm
        self.norm = norm(model.hidden_size, eps=model.norm_epsilon)
        self.tensor = topology.tensor
        if model.tie_embeddings and word_embedding is not None:
            self.weight = word_embedding
        else:
            self.weight = nn.Parameter(torch.empty(model.padded_vocab_size // self.tensor.size, model.hidden_size))
            shard_rows(self.weight, self.tensor.rank, self.tensor.size)

    def forward(self, x_sbh: Tensor) -> Tensor:
        """Logits [s, b, v]."""
        return F.linear(enter_region(self.norm(x_sbh), self.tensor.handle), self.weight)

    def token_losses(self, logits_sbv: Tensor, labels_bs: Tensor) -> Tensor:
        """Cross entropy of each token in fp32, [b, s]."""
        logits_sbv, labels_sb = logits_sbv.float(), labels_bs.t()
        if self.tensor.size > 1:
            losses: Tensor = vocab_parallel_cross_entropy(logits_sbv, labels_sb.contiguous())
            return losses.t()
        losses = F.cross_entropy(logits_sbv.flatten(0, 1), labels_sb.flatten(), reduction="none")
        return losses.view(labels_sb.shape).t()
