"""Which corpora feed training, validation and test: the one place that reads DataConfig's paths, weights and shares."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)

from ssd_megatron.config.fields import split_blend
from ssd_megatron.config.schema import DataConfig
from ssd_megatron.data.corpus import Corpus
from ssd_megatron.errors import DataError

SPLITS = ("train", "valid", "test")  # in mcore's order


@dataclass(frozen=True)
class SplitSource:
    """Where one split takes its documents.

    Attributes:
        field: of the configuration, for messages.
        prefixes: of the corpora.
        weights: one for each corpus, or None: in proportion to their tokens in this split.
        share: begin and end of the split in each corpus, as shares of its documents.
    """

    field: str
    prefixes: tuple[str, ...]
    weights: tuple[float, ...] | None
    share: tuple[float, float]

    def document_range(self, corpus: Corpus) -> slice:
        """Documents of a corpus that belong to the split; mcore's rounding."""
        begin, end = (round(share * len(corpus.lengths)) for share in self.share)
        return slice(begin, end)

    def tokens_in(self, corpus: Corpus) -> int:
        return int(corpus.lengths[self.document_range(corpus)].sum(dtype="int64"))

    def normalized_weights(self, corpora: Sequence[Corpus]) -> list[float]:
        """Share of the split's samples that comes from each corpus; `corpora` in the order of `prefixes`."""
        weights = self.weights or [float(self.tokens_in(corpus)) for corpus in corpora]
        return [weight / sum(weights) for weight in weights]


@dataclass(frozen=True)
class SplitSources:
    """Sources of the three splits; None where there is no data for one."""

    train: SplitSource | None
    valid: SplitSource | None
    test: SplitSource | None


def split_sources(data: DataConfig) -> SplitSources:
    """Read `paths` with `split`, or `train_paths`, `valid_paths` and `test_paths`.

    Raises:
        DataError: both or neither are given, or a list is neither paths nor positive weights and paths in turn.
    """
    separate = {name: getattr(data, f"{name}_paths") for name in SPLITS}
    if (data.paths is None) == all(paths is None for paths in separate.values()):
        raise DataError("give either data.paths or data.train_paths (with data.valid_paths and data.test_paths)")
    if data.paths is None:
        return SplitSources(
            **{
                name: None if paths is None else _source(f"data.{name}_paths", paths, (0.0, 1.0))
                for name, paths in separate.items()
            }
        )
    shares = convert_split_vector_to_split_matrix(parse_and_normalize_split(data.split))
    return SplitSources(
        **{
            name: None if share is None else _source("data.paths", data.paths, share)
            for name, share in zip(SPLITS, shares, strict=True)
        }
    )


def _source(field: str, entries: tuple[str | float, ...], share: tuple[float, float]) -> SplitSource:
    try:
        prefixes, weights = split_blend(entries)
    except ValueError as error:
        raise DataError(f"{field} ({list(entries)}) {error}") from error
    return SplitSource(field, tuple(prefixes), None if weights is None else tuple(weights), share)
