"""The heads and their losses.

Shapes: b batch, s sequence, h hidden, v vocabulary of this tensor-parallel rank.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy
from torch import Tensor, nn

from ssd_megatron.config.schema import ModelConfig
from ssd_megatron.ffn.activations import ACTIVATIONS
from ssd_megatron.model.norms import make_norm
from ssd_megatron.parallel.regions import enter_region
from ssd_megatron.parallel.sharding import shard_rows
from ssd_megatron.parallel.topology import Topology

# Logits [s, b, v], and where sentences are predicted, theirs [b, 2].
Outputs = Tensor | tuple[Tensor, Tensor]


class LanguageModelHead(nn.Module):
    """Final normalisation (before the blocks' networks, not after them), output projection, and what BERT adds: a
    transform before the projection, a bias after it, and a second head for pairs of sentences. T5 has dropout there.

    Args:
        word_embedding: the word embedding's weight [v, h] if this stage has it; it is the head's if they are tied.
    """

    def __init__(self, model: ModelConfig, word_embedding: nn.Parameter | None, topology: Topology) -> None:
        super().__init__()
        self.norm = make_norm(model) if model.norm_position == "pre" else None
        self.transform = Transform(model) if model.family == "bert" else None
        self.dropout = model.dropout if model.family == "t5" else 0.0
        self.tensor = topology.tensor
        rows = model.padded_vocab_size // self.tensor.size
        if model.tie_embeddings and word_embedding is not None:
            self.weight = word_embedding
        else:
            self.weight = nn.Parameter(torch.empty(rows, model.hidden_size))
            shard_rows(self.weight, self.tensor.rank, self.tensor.size)
        self.bias = None
        if model.family == "bert":
            self.bias = nn.Parameter(torch.empty(rows))
            shard_rows(self.bias, self.tensor.rank, self.tensor.size)
        self.sentence = SentenceHead(model) if model.predicts_sentences else None

    def forward(self, x_sbh: Tensor) -> Outputs:
        if self.norm is not None:
            x_sbh = self.norm(x_sbh)
        if self.dropout and self.training:
            x_sbh = F.dropout(x_sbh, self.dropout)
        y_sbh = x_sbh if self.transform is None else self.transform(x_sbh)
        logits_sbv = F.linear(enter_region(y_sbh, self.tensor.handle), self.weight, self.bias)
        return logits_sbv if self.sentence is None else (logits_sbv, self.sentence(x_sbh[0]))

    def losses(self, outputs: Outputs, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Cross entropy in fp32 by mask: of each token [b, s], of each pair of sentences [b]."""
        if isinstance(outputs, Tensor):
            return {"loss_mask": self.token_losses(outputs, batch["labels"])}
        logits_sbv, sentence_b2 = outputs
        return {
            "loss_mask": self.token_losses(logits_sbv, batch["labels"]),
            "sentence_mask": F.cross_entropy(sentence_b2.float(), batch["sentence_labels"], reduction="none"),
        }

    def token_losses(self, logits_sbv: Tensor, labels_bs: Tensor) -> Tensor:
        """Cross entropy of each token in fp32, [b, s]."""
        logits_sbv, labels_sb = logits_sbv.float(), labels_bs.t()
        if self.tensor.size > 1:
            losses: Tensor = vocab_parallel_cross_entropy(logits_sbv, labels_sb.contiguous())
            return losses.t()
        losses = F.cross_entropy(logits_sbv.flatten(0, 1), labels_sb.flatten(), reduction="none")
        return losses.view(labels_sb.shape).t()


class Transform(nn.Module):
    """BERT's last layer before the vocabulary: dense, activation, normalisation (arXiv 1810.04805)."""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(model.hidden_size, model.hidden_size)
        self.norm = make_norm(model)
        self.activation = ACTIVATIONS[model.activation]

    def forward(self, x_sbh: Tensor) -> Tensor:
        y_sbh: Tensor = self.norm(self.activation.act(self.dense(x_sbh)))
        return y_sbh


class SentenceHead(nn.Module):
    """Pooler and classifier of a sample's first token: does the second segment belong where it stands?"""

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.pooler = nn.Linear(model.hidden_size, model.hidden_size)
        self.classifier = nn.Linear(model.hidden_size, 2)

    def forward(self, x_bh: Tensor) -> Tensor:
        logits_b2: Tensor = self.classifier(torch.tanh(self.pooler(x_bh)))
        return logits_b2
