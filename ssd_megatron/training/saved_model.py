"""A checkpoint as a model: its settings and logical tensors, whatever layout wrote them, without a process group."""

import math
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from ssd_megatron.config.fields import Section
from ssd_megatron.config.model import ModelConfig
from ssd_megatron.config.schema import DataConfig, SSDConfig
from ssd_megatron.data.checks import check_vocabulary
from ssd_megatron.data.tokenizers import Tokenizer, load_tokenizer
from ssd_megatron.errors import ConfigError
from ssd_megatron.ffn.switchable import SwitchableFFN
from ssd_megatron.model.language_model import ffn_names
from ssd_megatron.parallel.zero import MASTER
from ssd_megatron.training import checkpoint_files as files
from ssd_megatron.training.checkpoint_checks import check_tensors
from ssd_megatron.training.checkpoint_files import CheckpointError, Index, Piece, key_of
from ssd_megatron.training.checkpoint_tools import find_checkpoint

CLASSIFIER = "classifier."  # how names begin of what a language model does not have
ELEMENTS_PER_FILE = 2**28  # of files that hold weights alone, 1 GiB

AnySection = TypeVar("AnySection", bound=Section)


@dataclass(frozen=True)
class Classification:
    """What a classifier was fine-tuned for.

    Attributes:
        labels: by the number of their class.
        columns: of the training file, those of the texts and then that of the label.
        train: path of that file.
    """

    labels: list[str]
    columns: list[str]
    train: str


@dataclass(frozen=True)
class Settings:
    """What the tensors of a model do not say.

    Attributes:
        model, ssd: settings of the run that made it.
        top_k: experts per token of each layer, as the last switch dealt them out.
        has_experts: a switch has formed experts, so that the model can run sparse.
        tokenizer: the file that made the training data; None for a model that was imported without one.
        classification: of a model that has a classifier beside its own head.
    """

    model: ModelConfig
    ssd: SSDConfig
    top_k: list[int]
    has_experts: bool
    tokenizer: Path | None
    classification: Classification | None = None

    @property
    def only_in_training(self) -> str | None:
        """A setting of sparse mode that only training knows so far; None if there is none."""
        tile = self.ssd.routing_granularity
        return None if tile == 1 else f"ssd.routing_granularity ({tile})"


@dataclass(frozen=True)
class SavedModel:
    """A checkpoint's folder and index, and what they say of the model."""

    folder: Path
    index: Index
    settings: Settings

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the language model's logical tensors, by name: all but a classifier's."""
        return {name: shape for name, shape in self.index.shapes.items() if not name.startswith(CLASSIFIER)}

    @property
    def data(self) -> DataConfig | None:
        """Of the run that trained it; None of a model without a run.

        Raises:
            CheckpointError: it was made with settings that this version does not know.
        """
        identity = self.index.values["identity"]
        has_run = any(identity.get(field) is not None for field in ("data.paths", "data.train_paths"))
        return _section(DataConfig, self.folder, self.index, "data") if has_run else None

    def tensor(self, name: str) -> Tensor:
        """A weight by its logical name, fp32.

        Raises:
            CheckpointError: the checkpoint does not hold all of its elements.
        """
        return self.rows(name, 0, self.index.shapes[name][0])

    def rows(self, name: str, first: int, count: int) -> Tensor:
        """So many of its rows."""
        row = self.index.shapes[name][1:]
        size = math.prod(row)
        values = files.read_interval(self.folder, self.index, key_of(name, MASTER), first * size, count * size)
        return values.view(count, *row)

    def neuron_ids(self) -> dict[str, Tensor]:
        """Which neuron lies at each position of a bank, [F] int64 by the name of the network."""
        found = files.read_tensors(self.folder, files.SHARED, lambda key: key.endswith(files.NEURON_IDS))
        return {key.removesuffix(files.NEURON_IDS): ids for key, ids in found.items()}

    @torch.no_grad()
    def load_into(self, parameters: Mapping[str, nn.Parameter], ffns: Mapping[str, SwitchableFFN]) -> None:
        """Give a model of one process these weights, and its banks the identities of their neurons.

        Routers stay as they are where no experts were ever formed, and a classifier is nothing to a model without one.

        Args:
            parameters: by logical name.
        Raises:
            CheckpointError: it cannot be read, or has not exactly the tensors of the model.
        """
        wanted = {name: shape for name, shape in self.index.shapes.items() if self._says(name, parameters)}
        filled = {name: value for name, value in parameters.items() if self.settings.has_experts or not is_router(name)}
        check_tensors(self.folder, wanted, {name: tuple(value.shape) for name, value in filled.items()})
        for name, parameter in filled.items():
            parameter.copy_(self.tensor(name))
        for name, ids in self.neuron_ids().items():
            ffns[name].bank.neuron_ids.copy_(ids)

    def _says(self, name: str, parameters: Mapping[str, nn.Parameter]) -> bool:
        """Whether a tensor says something to a model with these parameters."""
        if is_router(name):
            return self.settings.has_experts
        return name in parameters or not name.startswith(CLASSIFIER)


def open_model(path: Path) -> SavedModel:
    """The model of a run_dir's newest complete checkpoint, or of one checkpoint's folder.

    Raises:
        DataError: there is no checkpoint.
        CheckpointError: it cannot be read, or was made with settings that this version does not know.
    """
    folder = find_checkpoint(path)
    index = files.read_index(folder)
    identity, coordinator = index.values["identity"], index.values["coordinator"]
    tokenizer, classified = identity.get("data.tokenizer"), _below(identity, "classification")
    settings = Settings(
        _section(ModelConfig, folder, index, "model"),
        _section(SSDConfig, folder, index, "ssd"),
        top_k=[int(number) for number in coordinator["top_k"]],
        has_experts=bool(coordinator["has_partition"]),
        tokenizer=None if tokenizer is None else Path(tokenizer),
        classification=Classification(**classified) if classified else None,
    )
    return SavedModel(folder, index, settings)


def is_router(name: str) -> bool:
    """Whether a logical tensor belongs to a router: dense mode has no use for it, and a switch sets it anew."""
    return ".mlp.router." in name


def tokenizer_path(saved: SavedModel, given: Path | None) -> Path:
    """The tokenizer that a user gave, or the one that made the model's training data.

    Raises:
        ConfigError: neither is known, or the latter is not where it was.
    """
    if given is not None:
        return given
    path = saved.settings.tokenizer
    if path is None:
        raise ConfigError(f"{saved.folder} names no tokenizer: give one with --tokenizer")
    if not path.is_file():
        raise ConfigError(
            f"{saved.folder} is of a model of tokenizer {path}, which is not found from the folder {Path.cwd()}: give "
            "its path with --tokenizer"
        )
    return path


def open_tokenizer(saved: SavedModel, given: Path | None) -> tuple[Tokenizer, Path]:
    """The same tokenizer, loaded, and its path.

    Raises:
        ConfigError: see tokenizer_path.
        DataError: it cannot be loaded, or has more tokens than the model.
    """
    path = tokenizer_path(saved, given)
    tokenizer = load_tokenizer(path)
    check_vocabulary(tokenizer, path, saved.settings.model.vocab_size)
    return tokenizer, path


def write_model(
    root: Path,
    settings: Settings,
    tensors: Iterable[tuple[str, Tensor]],
    neuron_ids: Mapping[str, Tensor] | None = None,
    data: DataConfig | None = None,
) -> Path:
    """Write a checkpoint of step 0 that holds weights alone: what the tools read and a run can start from.

    Args:
        root: the checkpoint's folder is made in here.
        tensors: by logical name; read one after the other, and written as fp32.
        neuron_ids: which neuron lies at each position, [F] int64 by the name of every network; as numbered without.
        data: of the run that trained the model, if one did; the tokenizer is that of the settings.
    """
    folder = files.temporary_folder(root, 0)
    shutil.rmtree(folder, ignore_errors=True)  # what an interrupted write left
    folder.mkdir(parents=True)
    if neuron_ids is None:
        names = ffn_names(settings.model.total_layers)
        neuron_ids = {name: torch.arange(settings.model.ffn_hidden_size) for name in names}
    identities = {f"{name}{files.NEURON_IDS}": ids for name, ids in neuron_ids.items()}
    records = [files.write_tensors(folder, files.SHARED, identities)]
    shapes: dict[str, tuple[int, ...]] = {}
    pieces: dict[str, list[Piece]] = {}
    for number, part in enumerate(_parts(tensors)):
        file = files.rank_file(number)
        flat = {key_of(name, MASTER): tensor.flatten().float() for name, tensor in part.items()}
        records.append(files.write_tensors(folder, file, flat))
        shapes |= {name: tuple(tensor.shape) for name, tensor in part.items()}
        pieces |= {key: [Piece(file, 0, values.numel())] for key, values in flat.items()}
    return files.commit(root, Index(0, shapes, pieces, _values(settings, data), records))


def _parts(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """Tensors by name, as many together as one file shall hold."""
    part: dict[str, Tensor] = {}
    for name, tensor in tensors:
        if part and sum(t.numel() for t in part.values()) + tensor.numel() > ELEMENTS_PER_FILE:
            yield part
            part = {}
        part[name] = tensor
    yield part


def _values(settings: Settings, data: DataConfig | None) -> dict[str, Any]:
    """What a run that has not begun would save with its state."""
    identity: dict[str, Any] = {"training.train_steps": 0}
    identity |= {f"model.{field}": value for field, value in settings.model.model_dump(mode="json").items()}
    identity |= {f"ssd.{field}": value for field, value in settings.ssd.model_dump(mode="json").items()}
    if data is not None:
        identity |= {f"data.{field}": value for field, value in data.model_dump(mode="json").items()}
    if settings.tokenizer is not None:
        identity["data.tokenizer"] = str(settings.tokenizer)
    if settings.classification is not None:
        identity |= {f"classification.{field}": value for field, value in asdict(settings.classification).items()}
    coordinator = {
        "mode": "dense",
        "schedule": {"decisions": []},
        "top_k": settings.top_k,
        "has_partition": settings.has_experts,
    }
    nothing: dict[str, dict[str, float]] = {name: {} for name in ("layout", "adam_steps", "learning_rates", "counters")}
    return {"kinds": [MASTER], "identity": identity, "coordinator": coordinator, **nothing}


def _section(kind: type[AnySection], folder: Path, index: Index, name: str) -> AnySection:
    try:
        return kind.model_validate(_below(index.values["identity"], name))
    except ValidationError as error:
        raise CheckpointError(f"{folder} was made with settings that this version does not know: {error}") from error


def _below(identity: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Values of a section by field."""
    start = f"{name}."
    return {path.removeprefix(start): value for path, value in identity.items() if path.startswith(start)}
