"""What a model is for: the data on which its neurons are observed, it is tuned, and it is measured."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ssd_megatron.config.model import ModelConfig
from ssd_megatron.config.schema import DataConfig
from ssd_megatron.data.checks import check_tokens
from ssd_megatron.data.datasets import SampleDataset, build_datasets
from ssd_megatron.data.objectives import make_objective
from ssd_megatron.data.tokenizers import load_tokenizer
from ssd_megatron.errors import ConfigError
from ssd_megatron.ffn.switchable import SwitchableFFN
from ssd_megatron.model.language_model import LanguageModel
from ssd_megatron.model.loss_parts import loss_parts, mean_of_parts
from ssd_megatron.training.data_loader import collate, to_device
from ssd_megatron.training.saved_model import SavedModel

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Quality:
    """How well a model does on held-out data; accuracy where there is something to classify."""

    loss: float
    accuracy: float | None = None


class Task(Protocol):
    """A model, in one process, and its data.

    Attributes:
        name: tells the data from other data.
    """

    @property
    def name(self) -> str: ...

    @property
    def ffns(self) -> Mapping[str, SwitchableFFN]:
        """The model's networks by the name of their module, first layer first."""
        ...

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        """By logical name."""
        ...

    def batches(self) -> Iterator[Any]:
        """Training batches without end, the same ones at every call; what one is, `forward_backward` has to know."""
        ...

    def one_pass(self) -> Iterator[Any]:
        """Every training batch once."""
        ...

    def forward_backward(self, batch: Any) -> float:
        """Mean loss, as training has it; its gradients are added to the parameters' where gradients are enabled."""
        ...

    def evaluate(self) -> Quality:
        """On the held-out data."""
        ...


def data_of(saved: SavedModel, prefix: str | None, tokenizer: Path | None) -> DataConfig:
    """The corpus that a user names, or the one that the model was trained on.

    Raises:
        ConfigError: there is none, or no tokenizer.
    """
    trained_on = saved.data
    tokenizer = tokenizer or saved.settings.tokenizer
    if trained_on is not None:
        other = {} if prefix is None else {"paths": (prefix,), "train_paths": None, "valid_paths": None}
        return trained_on.model_copy(update=other | {"tokenizer": tokenizer})
    if prefix is None or tokenizer is None:
        needed = "--data (a corpus that tools/preprocess_data.py made)" if prefix is None else "--tokenizer"
        raise ConfigError(f"{saved.folder} does not say what the model was trained on: give {needed}")
    return DataConfig(paths=(prefix,), tokenizer=tokenizer)


class LanguageTask:
    """To predict tokens of a corpus, as the model's family does.

    Args:
        tokens: on which networks are observed; of T5's decoder as well.
        steps: of tuning.
        batch_size: samples of a training batch.
        held_out_tokens: at least so many, of the validation split.
    Raises:
        DataError: the corpus or the tokenizer cannot be used.
    """

    def __init__(
        self,
        model: LanguageModel,
        config: ModelConfig,
        data: DataConfig,
        cache_dir: Path,
        *,
        seed: int,
        tokens: int,
        steps: int,
        batch_size: int,
        held_out_tokens: int,
    ) -> None:
        self.model = model
        train_samples = max(math.ceil(tokens / config.predicted_tokens), steps * batch_size)
        self.name = f"{data.model_dump_json()} {seed} {batch_size} {train_samples}"
        tokenizer = load_tokenizer(data.tokenizer)
        check_tokens(data, tokenizer, config.vocab_size, cache_dir, report=print)
        datasets = build_datasets(
            data,
            tokenizer=tokenizer,
            objective=make_objective(config, data, tokenizer, seed),
            seed=seed,
            train_samples=train_samples,
            valid_samples=max(1, math.ceil(held_out_tokens / config.seq_length)),
            test_samples=0,
            cache_dir=cache_dir,
        )
        assert datasets.train is not None and datasets.valid is not None
        self._train, self._valid, self._batch_size = datasets.train, datasets.valid, batch_size

    @property
    def ffns(self) -> Mapping[str, SwitchableFFN]:
        return self.model.ffns

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        return self.model.logical_parameters()

    def batches(self) -> Iterator[Batch]:
        while True:
            yield from self.one_pass()

    def one_pass(self) -> Iterator[Batch]:
        return self._batches(self._train)

    def forward_backward(self, batch: Batch) -> float:
        loss = mean_of_parts(self._parts(batch))
        if torch.is_grad_enabled():
            torch.autograd.backward(loss)
        return float(loss.detach())

    @torch.no_grad()
    def evaluate(self) -> Quality:
        self.model.eval()
        parts = torch.stack([self._parts(batch) for batch in self._batches(self._valid)])
        return Quality(float(mean_of_parts(parts.sum(0))))

    def _parts(self, batch: Batch) -> Tensor:
        return loss_parts(self.model(batch), batch)

    def _batches(self, samples: SampleDataset) -> Iterator[Batch]:
        device = next(self.model.parameters()).device
        for start in range(0, len(samples), self._batch_size):
            part = [samples[i] for i in range(start, min(start + self._batch_size, len(samples)))]
            yield to_device(collate(part), device)
