"""Fine-tuning of all weights of a classifier, by BERT's recipe (arXiv 1810.04805); the best epoch is kept."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from ssd_megatron.classification.classifier import Classifier, Score, accuracy
from ssd_megatron.classification.samples import Batch, Sample, training_batches, unpadded_batches
from ssd_megatron.config.deepspeed_keys import WSDParams
from ssd_megatron.errors import ConfigError
from ssd_megatron.ffn.switchable import Mode
from ssd_megatron.training.engine import parameter_groups, wsd_factor
from ssd_megatron.training.saved_model import Settings

Track = Callable[[Sequence[list[Sample]], str], Iterable[list[Sample]]]  # batches, shown under a description


@dataclass(frozen=True)
class Recipe:
    """How to fine-tune.

    Attributes:
        lr: at its peak; it rises linearly over the share `warmup` of all steps, and falls linearly to 0.
        batch: samples of an optimizer step.
        weight_decay: of matrices; norms, biases and routers have none.
        clip: largest norm of the gradient.
        dropout: before the classifier.
        mode: of the networks, in training and on the dev samples.
        dtype: of the products in training: bf16 by autocast, while weights and optimizer stay fp32; dense only.
        seed: of initial weights, order and dropout; the same gives the same model on one machine.
    """

    epochs: int = 3
    lr: float = 5e-5
    batch: int = 32
    warmup: float = 0.1
    weight_decay: float = 0.01
    clip: float = 1.0
    dropout: float = 0.1
    mode: Mode = "dense"
    dtype: Literal["fp32", "bf16"] = "fp32"
    seed: int = 1

    def check(self, settings: Settings) -> None:
        """Raises ConfigError if this cannot be, or not with such a model."""
        for name, value, fine, wanted in (
            ("epochs", self.epochs, self.epochs >= 1, "at least 1"),
            ("lr", self.lr, 0 < self.lr < math.inf, "above 0"),
            ("batch", self.batch, self.batch >= 1, "at least 1"),
            ("warmup", self.warmup, 0 <= self.warmup < 1, "at least 0 and below 1"),
            ("weight_decay", self.weight_decay, 0 <= self.weight_decay < math.inf, "at least 0"),
            ("clip", self.clip, self.clip > 0, "above 0"),
            ("dropout", self.dropout, 0 <= self.dropout < 1, "at least 0 and below 1"),
        ):
            if not fine:
                raise ConfigError(f"{name} ({value}) must be {wanted}")
        if self.mode == "sparse" and not settings.has_experts:
            raise ConfigError("mode (sparse) needs experts, which this model never formed: use dense")
        if self.mode == "sparse" and self.dtype == "bf16":
            raise ConfigError("dtype (bf16) cannot go with mode sparse, whose routers score in fp32: use fp32")


@dataclass(frozen=True)
class Epoch:
    """What one pass over the training samples gave: their mean loss on the way, and the dev samples' score after it."""

    number: int
    train_loss: float
    dev: Score


def finetune(
    classifier: Classifier,
    train: Sequence[Sample],
    dev: Sequence[Sample],
    recipe: Recipe,
    track: Track,
    report: Callable[[Epoch], None],
) -> Epoch:
    """Train, and leave the classifier as it was after its best epoch on the dev samples, the first of equals.

    Args:
        report: called after each epoch.
    Returns:
        the best epoch.
    Raises:
        ConfigError: the gradient is not finite.
    """
    torch.manual_seed(recipe.seed)
    classifier.use(recipe.mode)
    parameters = classifier.logical_parameters()
    optimizer = torch.optim.AdamW(parameter_groups(parameters, recipe.weight_decay), lr=recipe.lr)
    scheduler = _scheduler(optimizer, recipe, steps=recipe.epochs * math.ceil(len(train) / recipe.batch))
    best: Epoch | None = None
    kept: dict[str, Tensor] = {}
    for number in range(1, recipe.epochs + 1):
        classifier.train()
        total = 0.0
        for samples in track(training_batches(train, recipe.batch, recipe.seed, number), f"epoch {number}"):
            optimizer.zero_grad()
            total += forward_backward(classifier, samples, recipe.dtype) * len(samples)
            norm = torch.nn.utils.clip_grad_norm_(parameters.values(), recipe.clip)
            if not torch.isfinite(norm):
                raise ConfigError(f"lr ({recipe.lr}) is too high: the gradient is not finite in epoch {number}")
            optimizer.step()
            scheduler.step()
        epoch = Epoch(number, total / len(train), accuracy(classifier, dev))
        report(epoch)
        if best is None or epoch.dev.correct > best.dev.correct:
            best = epoch
            kept = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    assert best is not None, recipe
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(kept[name])
    classifier.eval()
    return best


def forward_backward(classifier: Classifier, samples: Sequence[Sample], dtype: str = "fp32") -> float:
    """Mean loss of samples of any lengths; its gradients are added to the parameters' where gradients are enabled."""
    device, total = classifier.classifier.weight.device, 0.0
    for batch in unpadded_batches(samples, device):
        share = len(batch["label"]) / len(samples)
        for ffn in classifier.model.ffns.values():
            ffn.router.loss_weight = share
        with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bf16"):
            loss = share * _mean_loss(classifier, batch)
        if torch.is_grad_enabled():
            torch.autograd.backward(loss)
        total += float(loss.detach())
    return total


def _mean_loss(classifier: Classifier, batch: Batch) -> Tensor:
    return F.cross_entropy(classifier(batch).float(), batch["label"])


def _scheduler(optimizer: torch.optim.Optimizer, recipe: Recipe, steps: int) -> LambdaLR:
    """Linear warm-up and linear decay to 0: warm-up, stable, decay without a stable part."""
    warmup = min(max(1, round(recipe.warmup * steps)), max(1, steps - 1))
    wsd = WSDParams(warmup_num_steps=warmup, decay_num_steps=max(1, steps - warmup), total_num_steps=steps)
    return LambdaLR(optimizer, lambda step: wsd_factor(wsd, step))
