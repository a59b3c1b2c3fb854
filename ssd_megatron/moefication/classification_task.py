"""A classifier as a task: its training file is what neurons are observed on, and accuracy what they are for."""

from collections.abc import Iterator, Mapping
from itertools import count
from pathlib import Path

from torch import nn

from ssd_megatron.classification.classifier import accuracy
from ssd_megatron.classification.finetune import forward_backward
from ssd_megatron.classification.samples import Sample, training_batches
from ssd_megatron.classification.saved_classifier import Opened
from ssd_megatron.ffn.switchable import SwitchableFFN
from ssd_megatron.files import sha256_of
from ssd_megatron.moefication.task import Quality


class ClassificationTask:
    """To tell classes of texts apart, as the model has learnt it.

    Args:
        train, held_out: files of labelled texts, as the classifier was trained on.
        batch_size: samples of a training batch.
    Raises:
        DataError: a file cannot be read, or has other labels.
    """

    def __init__(self, opened: Opened, train: Path, held_out: Path, *, seed: int, batch_size: int) -> None:
        self._classifier = opened.classifier
        self._train, self._held_out = opened.read(train).samples, opened.read(held_out).samples
        self._seed, self._batch_size = seed, batch_size
        self.name = f"{sha256_of(train)} {seed} {batch_size}"

    @property
    def ffns(self) -> Mapping[str, SwitchableFFN]:
        return self._classifier.model.ffns

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        return self._classifier.logical_parameters()

    def batches(self) -> Iterator[list[Sample]]:
        return (batch for epoch in count(1) for batch in self._epoch(epoch))

    def one_pass(self) -> Iterator[list[Sample]]:
        return iter(self._epoch(1))

    def forward_backward(self, batch: list[Sample]) -> float:
        return forward_backward(self._classifier, batch)

    def evaluate(self) -> Quality:
        score = accuracy(self._classifier, self._held_out)
        return Quality(score.loss, score.accuracy)

    def _epoch(self, number: int) -> list[list[Sample]]:
        return training_batches(self._train, self._batch_size, self._seed, number)
