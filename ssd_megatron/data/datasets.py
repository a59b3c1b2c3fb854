"""The samples of training, validation and test: stretches of text from mcore's GPTDataset and blends, with their index
cache, of which the family's objective makes samples.

The order of the samples follows from the seed, the corpora and the number of samples asked for, and from nothing else:
not from the number of ranks, nor from what the other splits need.
"""

import contextlib
import hashlib
import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch.distributed as dist
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from torch import Tensor
from torch.utils.data import Dataset

from ssd_megatron.config.schema import DataConfig
from ssd_megatron.data.blends import SPLITS, SplitSource, split_sources
from ssd_megatron.data.corpus import make_cache_dir, open_corpus
from ssd_megatron.data.objectives import Objective, Sample
from ssd_megatron.data.tokenizers import Tokenizer
from ssd_megatron.errors import DataError

MCORE_SURPLUS = 0.005  # of samples indexed in each corpus of a blend, mcore's default


class SampleDataset(Dataset[dict[str, Tensor]]):
    """The first `count` samples that an objective makes of an mcore dataset's stretches of text."""

    def __init__(self, texts: Dataset[Sample], objective: Objective, count: int) -> None:
        self._texts = texts
        self._objective = objective
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < self._count:
            raise IndexError(f"sample {index} of {self._count}")
        return self._objective.sample(self._texts, self._count, index)


@dataclass(frozen=True)
class Datasets:
    """Samples of each split; None where no samples were asked for, or on a rank that does not build."""

    train: SampleDataset | None
    valid: SampleDataset | None
    test: SampleDataset | None


def build_datasets(
    data: DataConfig,
    *,
    tokenizer: Tokenizer,
    objective: Objective,
    seed: int,
    train_samples: int,
    valid_samples: int,
    test_samples: int,
    cache_dir: Path,
    is_builder_rank: bool = True,
) -> Datasets:
    """Build the datasets of a run; with several processes, every one of them must call this.

    Rank 0 writes the index cache before the others read it, so that `cache_dir` must be the same folder for all ranks.
    Training repeats its documents as often as the samples need, shuffled anew in each epoch.

    Args:
        is_builder_rank: whether this rank needs the samples; True on rank 0.
    Raises:
        DataError: a corpus that cannot be opened, or a cache folder that cannot be written. Run check_data first: it
            also finds what can only be seen in the tokens, and too few samples.
    """
    sources = split_sources(data)
    wanted = {"train": train_samples, "valid": valid_samples, "test": test_samples}
    with _process_group():
        built: dict[str, SampleDataset | None] = {}
        for name, samples in wanted.items():
            source: SplitSource | None = getattr(sources, name)
            if samples == 0:
                built[name] = None
                continue
            if source is None:
                raise DataError(f"{samples:,} samples are wanted of the {name} split, which has no data")
            config = _mcore_config(name, source, samples, data, tokenizer, objective, seed, cache_dir)
            built[name] = _build(config, objective, SPLITS.index(name), samples, is_builder_rank)
    return Datasets(**built)


def _mcore_config(
    name: str,
    source: SplitSource,
    samples: int,
    data: DataConfig,
    tokenizer: Tokenizer,
    objective: Objective,
    seed: int,
    cache_dir: Path,
) -> GPTDatasetConfig:
    corpora = [open_corpus(prefix) for prefix in source.prefixes]
    for corpus in corpora:
        if source.tokens_in(corpus) <= objective.text_length:  # mcore would add empty epochs for ever
            raise DataError(
                f"{source.field}: {corpus.prefix} has no sample of {objective.text_length} tokens for the {name} split"
            )
    blended = len(corpora) > 1
    weights = source.normalized_weights(corpora)
    config = GPTDatasetConfig(
        random_seed=seed,
        sequence_length=objective.text_length,
        blend=(list(source.prefixes), weights if blended else None),
        split="1,1,1",  # mcore wants one; its meaning, the split matrix, is set below
        path_to_cache=str(_cache_folder(cache_dir, source.prefixes)),
        mid_level_dataset_surplus=_surplus(weights, samples),
        tokenizer=tokenizer,
        reset_position_ids=data.reset_position_ids,
        reset_attention_mask=False,
        eod_mask_loss=data.eod_mask_loss,
        create_attention_mask=False,
    )
    # One split at a time: mcore would otherwise build splits that nobody asked for, and endlessly where one is empty.
    config.split_matrix = [source.share if split == name else None for split in SPLITS]
    return config


def _build(
    config: GPTDatasetConfig, objective: Objective, position: int, samples: int, is_builder_rank: bool
) -> SampleDataset | None:
    if dist.get_rank() == 0:
        _drop_damaged_indices(Path(config.path_to_cache))
    sizes = [samples if split == position else 0 for split in range(len(SPLITS))]
    try:
        dataset = BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: is_builder_rank, config).build()[position]
    except Exception as error:
        cause = error.__cause__ or error  # mcore raises a bare Exception from an OSError
        if not isinstance(cause, OSError):
            raise
        raise DataError(
            f"data.cache_dir: the index of the samples cannot be written to {config.path_to_cache}: {cause}"
        ) from error
    return None if dataset is None else SampleDataset(dataset, objective, samples)


def _surplus(weights: list[float], samples: int) -> float:
    """Share of samples to index beyond the weight of each corpus.

    mcore asks a corpus of weight w for ceil(w * samples), and draws at most one more plus w for each corpus of the
    blend. With few samples that is more than its default surplus, and it would stop.
    """
    fewest = math.ceil(min(weights) * samples)
    return max(MCORE_SURPLUS, len(weights) / samples + 1 / fewest)


def _cache_folder(cache_dir: Path, prefixes: tuple[str, ...]) -> Path:
    """Folder for the indices of these files as they are now: mcore names an index by the path of its corpus alone."""
    identity = hashlib.sha256()
    for prefix in prefixes:
        for suffix in (".bin", ".idx"):
            stat = Path(prefix + suffix).stat()
            identity.update(f"{prefix}{suffix} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    folder = cache_dir / f"index-{identity.hexdigest()[:16]}"
    make_cache_dir(folder)
    return folder


def _drop_damaged_indices(folder: Path) -> None:
    """Remove index files that a killed process left half written; mcore takes any file that exists."""
    for path in folder.glob("*.npy"):
        try:
            np.load(path, mmap_mode="r")
        except (ValueError, EOFError):
            path.unlink()


@contextlib.contextmanager
def _process_group() -> Iterator[None]:
    """A process group of one for the time of the build, where there is none: mcore's blends ask for their rank."""
    if dist.is_initialized():
        yield
        return
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()
