"""The heads and their losses.

Shapes: b batch, s sequence, h hidden, v vocabulary of this tensor-parallel rank.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssd_megatron.config.model import ModelConfig
from ssd_megatron.ffn.activations import ACTIVATIONS
from ssd_megatron.model.cross_entropy import projected_losses
from ssd_megatron.model.norms import make_norm
from ssd_megatron.parallel.regions import enter_region
from ssd_megatron.parallel.sharding import shard_rows
from ssd_megatron.parallel.topology import Topology

# What is projected onto the vocabulary [s, b, h], and where sentences are predicted, their logits [b, 2].
Outputs = Tensor | tuple[Tensor, Tensor]


class LanguageModelHead(nn.Module):
    """Final normalisation (before the blocks' networks, not after them), output projection, and what BERT adds: a
    transform before the projection, a bias after it, and a second head for pairs of sentences. T5 has dropout there.

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
        y_sbh = enter_region(y_sbh, self.tensor.handle)
        return y_sbh if self.sentence is None else (y_sbh, self.sentence(x_sbh[0]))

    def losses(self, outputs: Outputs, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Cross entropy in fp32 by mask: of each token [b, s], of each pair of sentences [b]."""
        if isinstance(outputs, Tensor):
            return {"loss_mask": self.token_losses(outputs, batch["labels"])}
        projected_sbh, sentence_b2 = outputs
        return {
            "loss_mask": self.token_losses(projected_sbh, batch["labels"]),
            "sentence_mask": F.cross_entropy(sentence_b2.float(), batch["sentence_labels"], reduction="none"),
        }

    def logits(self, projected_sbh: Tensor) -> Tensor:
        """Logits [s, b, v]."""
        return F.linear(projected_sbh, self.weight, self.bias)

    def token_losses(self, projected_sbh: Tensor, labels_bs: Tensor) -> Tensor:
        """Cross entropy of each token in fp32, [b, s]."""
        labels_sb = labels_bs.t()
        losses_T = projected_losses(
            projected_sbh.flatten(0, 1),
            self.weight,
            self.bias,
            labels_sb.flatten(),
            self.tensor,
            self.loss_chunk_tokens,
        )
        return losses_T.view(labels_sb.shape).t()


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
