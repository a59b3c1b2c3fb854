"""A language model that tells classes of texts apart, and how often it is right.

Shapes: s sequence, b samples, h hidden, C classes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssd_megatron.classification.samples import Batch, Sample, unpadded_batches
from ssd_megatron.confidence import CONFIDENCE
from ssd_megatron.config.model import ModelConfig
from ssd_megatron.errors import ConfigError
from ssd_megatron.ffn.routers import expert_directions
from ssd_megatron.ffn.switchable import Mode
from ssd_megatron.model.init import initialize_parameters
from ssd_megatron.model.language_model import LanguageModel
from ssd_megatron.training.saved_model import CLASSIFIER


class Classifier(nn.Module):
    """A linear layer on one position of the last hidden states (see Encoder), in place of the vocabulary's head.

    BERT's pooler is between them where the model was trained with one (`model.sentence_objective`).

    Attributes:
        model: the language model, on one process; its `ffns` run dense or sparse, as they are set.

    Args:
        dropout: on what the linear layer reads; the model's own is as it was pre-trained with.
        seed: of the linear layer's initial weights.
    """

    def __init__(self, model: LanguageModel, settings: ModelConfig, classes: int, dropout: float, seed: int) -> None:
        super().__init__()
        self.model = model
        self.classifier = nn.Linear(settings.hidden_size, classes)
        self.dropout = dropout
        self._position = -1 if settings.family == "gpt" else 0
        initialize_parameters(self._head(), seed=seed, std=settings.init_std, num_layers=settings.total_layers)

    def logical_parameters(self) -> dict[str, nn.Parameter]:
        """The model's by their logical names, `classifier.weight` [C, h] and `classifier.bias` [C]."""
        return self.model.logical_parameters() | self._head()

    def forward(self, batch: Batch) -> Tensor:
        """Logits [b, C] of the batch's `model.fields.inputs`."""
        x_sbh = self.model.hidden_states(tuple(batch[name] for name in self.model.fields.inputs))
        x_bh = x_sbh[self._position]
        assert self.model.head is not None, "a model on one process has its head"
        if self.model.head.sentence is not None:
            x_bh = torch.tanh(self.model.head.sentence.pooler(x_bh))
        logits_bC: Tensor = self.classifier(F.dropout(x_bh, self.dropout, self.training))
        return logits_bC

    def use(self, mode: Mode, top_k: Sequence[int] | None = None) -> None:
        """Run all networks in a mode, sparse ones with so many experts per token in each, in the model's order."""
        ffns = list(self.model.ffns.values())
        for ffn in ffns:
            ffn.mode = mode
        if top_k is not None:
            for ffn, number in zip(ffns, top_k, strict=True):
                ffn.router.top_k = number

    @torch.no_grad()
    def recompute_routers(self) -> None:
        """Make centroid routers anew of the weights as they are, as a switch does.

        Raises:
            ConfigError: the routers are of another kind: without weights, or trained ones that a switch only begins.
        """
        for ffn in self.model.ffns.values():
            if ffn.router.name != "centroid":
                raise ConfigError(f"router (recomputed) has no meaning for ssd.router {ffn.router.name}: use as_saved")
            values = ffn.router.initial_values(*expert_directions(ffn.bank.rows(), ffn.settings.num_experts))
            for name, parameter in ffn.router.named_parameters():
                parameter.copy_(values[name])

    def _head(self) -> dict[str, nn.Parameter]:
        return {f"{CLASSIFIER}{name}": parameter for name, parameter in self.classifier.named_parameters()}


@dataclass(frozen=True)
class Score:
    """Right answers among `count`, and the mean cross entropy in nats."""

    correct: int
    count: int
    loss: float

    @property
    def accuracy(self) -> float:
        return self.correct / self.count

    @property
    def error(self) -> float:
        """Half of the accuracy's 95 % confidence interval, by a normal distribution."""
        return CONFIDENCE * math.sqrt(self.accuracy * (1 - self.accuracy) / self.count)


@torch.no_grad()
def accuracy(classifier: Classifier, samples: Sequence[Sample]) -> Score:
    """How often a classifier is right, with its networks in the mode and with the `router.top_k` that they have.

    Args:
        samples: as an Encoder makes them, with labels.
    """
    was_training, correct, loss = classifier.training, 0, 0.0
    classifier.eval()
    for batch in unpadded_batches(samples, classifier.classifier.weight.device):
        logits_bC = classifier(batch)
        correct += int((logits_bC.argmax(1) == batch["label"]).sum())
        loss += float(F.cross_entropy(logits_bC.float(), batch["label"], reduction="sum"))
    classifier.train(was_training)
    return Score(correct, len(samples), loss / len(samples))
