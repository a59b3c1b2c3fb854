"""Classifiers from checkpoints of language models or of classifiers, on one process, and as checkpoints."""

from dataclasses import dataclass, replace
from pathlib import Path

from ssd_megatron.classification.classifier import Classifier
from ssd_megatron.classification.labelled import Columns
from ssd_megatron.classification.samples import Encoder, Samples
from ssd_megatron.config.schema import DataConfig
from ssd_megatron.errors import ConfigError
from ssd_megatron.files import LOCK, require_empty
from ssd_megatron.parallel.topology import Topology
from ssd_megatron.training.model_alone import build_alone
from ssd_megatron.training.saved_model import (
    Classification,
    SavedModel,
    Settings,
    is_router,
    open_model,
    open_tokenizer,
    write_model,
)


@dataclass(frozen=True)
class Opened:
    """A classifier and what belongs to it.

    Attributes:
        classifier: in fp32, its networks dense, with the experts per token of the last switch; sparse networks have
            backend torch.
        settings: of the checkpoint that it becomes; `classification` names its labels.
        data: of the run that trained its language model, if one did.
        encoder: makes its samples.
    """

    classifier: Classifier
    settings: Settings
    data: DataConfig | None
    encoder: Encoder

    @property
    def labels(self) -> list[str]:
        return self._classification.labels

    def read(self, path: Path, columns: Columns | None = None) -> Samples:
        """Samples of a file, whose columns are named as in the training file unless others are given.

        Raises:
            DataError: see Encoder.read.
        """
        *texts, label = self._classification.columns
        return self.encoder.read(path, columns or Columns(tuple(texts), label), self.labels)

    def write(self, root: Path) -> Path:
        """As a checkpoint of step 0 in `root`, with experts and the identities of neurons as they were.

        Raises:
            ConfigError: `root` is not empty but for its lock.
        """
        require_empty(root, but=(LOCK,))
        ffns, parameters = self.classifier.model.ffns, self.classifier.logical_parameters()
        tensors = (
            (name, parameter.detach().cpu())
            for name, parameter in parameters.items()
            if self.settings.has_experts or not is_router(name)
        )
        neuron_ids = {name: ffn.bank.neuron_ids.cpu() for name, ffn in ffns.items()}
        return write_model(root, self.settings, tensors, neuron_ids, self.data)

    @property
    def _classification(self) -> Classification:
        assert self.settings.classification is not None
        return self.settings.classification


def open_classifier(path: Path, topology: Topology, tokenizer: Path | None = None) -> Opened:
    """The classifier of a checkpoint.

    Args:
        topology: of one process.
        tokenizer: instead of the one that the model was trained with.
    Raises:
        DataError: there is no checkpoint or no tokenizer.
        CheckpointError: it cannot be read, or has not exactly the tensors of its model.
        ConfigError: it is of a model without a classifier.
    """
    return classifier_of(open_model(path), topology, tokenizer)


def classifier_of(saved: SavedModel, topology: Topology, tokenizer: Path | None = None) -> Opened:
    """See open_classifier."""
    if saved.settings.classification is None:
        raise ConfigError(f"{saved.folder} is of a model without a classifier: fine-tune it first")
    opened = _opened(saved, topology, saved.settings.classification, tokenizer, dropout=0.0, seed=0)
    saved.load_into(opened.classifier.logical_parameters(), opened.classifier.model.ffns)
    return opened


def begin_classifier(
    path: Path,
    topology: Topology,
    classification: Classification,
    tokenizer: Path | None = None,
    *,
    dropout: float,
    seed: int,
) -> Opened:
    """A classifier to be trained: a checkpoint's model, and a new linear layer.

    Args:
        path: of a language model, or of a classifier, whose own linear layer is left out.
        dropout, seed: see Classifier.
    Raises:
        DataError, CheckpointError: see open_classifier.
    """
    saved = open_model(path)
    opened = _opened(saved, topology, classification, tokenizer, dropout=dropout, seed=seed)
    model = opened.classifier.model
    saved.load_into(model.logical_parameters(), model.ffns)
    return opened


def _opened(
    saved: SavedModel,
    topology: Topology,
    classification: Classification,
    tokenizer: Path | None,
    *,
    dropout: float,
    seed: int,
) -> Opened:
    """Its weights not loaded yet."""
    known, path = open_tokenizer(saved, tokenizer)
    settings = replace(saved.settings, tokenizer=path, classification=classification)
    encoder = Encoder(settings.model, known, path)
    model = build_alone(settings, topology, "torch")
    classifier = Classifier(model, settings.model, len(classification.labels), dropout, seed).to(topology.device)
    classifier.use("dense", settings.top_k)
    return Opened(classifier.eval(), settings, saved.data, encoder)
