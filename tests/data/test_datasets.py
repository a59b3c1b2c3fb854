import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from ssd_megatron.config.schema import DataConfig
from ssd_megatron.data.datasets import Datasets, SampleDataset, build_datasets
from ssd_megatron.data.objectives import NextToken
from ssd_megatron.data.tokenizers import load_tokenizer
from ssd_megatron.errors import DataError
from ssd_megatron.parallel.topology import Topology
from tests.ranks import run_ranks

MakeCorpus = Callable[..., Path]

EOD = 2
SEQ_LENGTH = 16


@dataclass
class Builder:
    """Builds datasets of a corpus of 200 documents, in which the document and the place of each token can be read."""

    tmp_path: Path
    tokenizer: Path
    prefix: str

    def __call__(
        self,
        *paths: str | float,
        train: int = 0,
        valid: int = 0,
        test: int = 0,
        seed: int = 1,
        is_builder_rank: bool = True,
        whole: bool = False,
        data: dict[str, Any] | None = None,
    ) -> Datasets:
        fields: dict[str, Any] = {"paths": paths or (self.prefix,), "split": "80,15,5", "tokenizer": self.tokenizer}
        if whole:
            fields |= {"paths": None, "train_paths": paths}
        return build_datasets(
            DataConfig(**fields | (data or {})),
            tokenizer=load_tokenizer(self.tokenizer),
            objective=NextToken(SEQ_LENGTH),
            seed=seed,
            train_samples=train,
            valid_samples=valid,
            test_samples=test,
            cache_dir=self.tmp_path / "cache",
            is_builder_rank=is_builder_rank,
        )


def numbered_documents(count: int, first: int = 0) -> list[list[int]]:
    """Document i is i + 10 (under 330), repeated 5 to 44 times, and the end."""
    return [[(first + i) % 320 + 10] * (5 + i * 7 % 40) + [EOD] for i in range(count)]


@pytest.fixture
def build(make_corpus: MakeCorpus, tmp_path: Path, sentencepiece_model: Path) -> Builder:
    return Builder(tmp_path, sentencepiece_model, str(make_corpus("c", numbered_documents(200))))


def tokens_of(dataset: SampleDataset | None) -> np.ndarray:
    assert dataset is not None
    return np.stack([dataset[i]["tokens"].numpy() for i in range(len(dataset))])


def test_a_sample(build: Builder) -> None:
    datasets = build(train=50, valid=10, test=5)
    assert datasets.train is not None
    assert [len(split) for split in (datasets.train, datasets.valid, datasets.test) if split] == [50, 10, 5]
    for i in range(50):
        sample = datasets.train[i]
        assert {name: (value.dtype, tuple(value.shape)) for name, value in sample.items()} == {
            "tokens": (torch.int64, (SEQ_LENGTH,)),
            "labels": (torch.int64, (SEQ_LENGTH,)),
            "loss_mask": (torch.float32, (SEQ_LENGTH,)),
            "position_ids": (torch.int64, (SEQ_LENGTH,)),
        }
        assert sample["tokens"][1:].tolist() == sample["labels"][:-1].tolist()
        assert sample["loss_mask"].tolist() == [1.0] * SEQ_LENGTH
        assert sample["position_ids"].tolist() == list(range(SEQ_LENGTH))
    with pytest.raises(IndexError, match="sample 50 of 50"):
        datasets.train[50]


def test_one_epoch_is_the_documents_each_once(build: Builder, make_corpus: MakeCorpus) -> None:
    documents = numbered_documents(40)
    total = sum(map(len, documents))
    samples = (total - 1) // SEQ_LENGTH
    prefix = str(make_corpus("all", documents))
    seen = tokens_of(build(prefix, train=samples, whole=True).train)
    counts = np.bincount(seen.ravel(), minlength=400)
    expected = np.bincount(np.concatenate(documents), minlength=400)
    assert counts.sum() == samples * SEQ_LENGTH
    assert (counts <= expected).all()
    assert (expected - counts).sum() == total - samples * SEQ_LENGTH < SEQ_LENGTH + 1


def test_no_token_is_taken_for_padding(build: Builder, make_corpus: MakeCorpus) -> None:
    prefix = str(make_corpus("every", [list(range(340))]))
    dataset = build(prefix, train=21, whole=True).train
    assert dataset is not None
    samples = [dataset[i] for i in range(21)]
    assert sorted(torch.cat([sample["tokens"] for sample in samples]).tolist()) == list(range(21 * SEQ_LENGTH))
    assert all(sample["loss_mask"].min() == 1 for sample in samples)


def test_splits_share_no_document(build: Builder) -> None:
    datasets = build(train=400, valid=30, test=10)
    train, valid, test = (
        set(np.unique(tokens_of(split))) - {EOD} for split in (datasets.train, datasets.valid, datasets.test)
    )
    assert train <= set(range(10, 170))
    assert valid <= set(range(170, 200))
    assert test <= set(range(200, 210))
    assert (len(train), len(valid) > 20, len(test)) == (160, True, 10)


def test_the_seed_gives_the_order(build: Builder) -> None:
    first = tokens_of(build(train=100).train)
    from_cache = tokens_of(build(train=100).train)
    assert (first == from_cache).all()
    for path in (build.tmp_path / "cache").rglob("*"):
        if path.is_file():
            path.unlink()
    assert (tokens_of(build(train=100).train) == first).all()
    assert (tokens_of(build(train=100, seed=2).train) != first).any(axis=1).mean() > 0.9


def test_training_order_does_not_depend_on_the_other_splits(build: Builder) -> None:
    blend = (0.4, build.prefix, 0.6, build.prefix)
    for paths in ((build.prefix,), blend):
        alone, together = build(*paths, train=100).train, build(*paths, train=100, valid=8, test=1).train
        assert (tokens_of(alone) == tokens_of(together)).all()


def test_documents_are_repeated_for_long_training(build: Builder, make_corpus: MakeCorpus) -> None:
    prefix = str(make_corpus("small", [[10] * 40 + [EOD], [11] * 40 + [EOD]]))
    seen = tokens_of(build(prefix, train=50, whole=True).train)
    assert seen.shape == (50, SEQ_LENGTH)
    assert abs((seen == 10).sum() / (seen == 11).sum() - 1) < 0.1


def test_what_is_not_asked_for_is_not_built(build: Builder) -> None:
    assert build() == Datasets(train=None, valid=None, test=None)
    datasets = build(train=3)
    assert (datasets.valid, datasets.test) == (None, None)
    assert not [path for path in (build.tmp_path / "cache").rglob("*") if "valid" in path.name or "test" in path.name]


def test_separate_paths(build: Builder, make_corpus: MakeCorpus) -> None:
    valid = str(make_corpus("valid", [[300] * 99 + [EOD]]))
    paths = {"paths": None, "train_paths": (build.prefix,), "valid_paths": (1.0, valid)}
    datasets = build(train=700, valid=6, data=paths)
    assert set(np.unique(tokens_of(datasets.train))) == {EOD, *range(10, 210)}
    assert set(np.unique(tokens_of(datasets.valid))) <= {EOD, 300}
    with pytest.raises(DataError, match="1 samples are wanted of the test split, which has no data"):
        build(test=1, data=paths)


def test_a_weighted_blend(build: Builder, make_corpus: MakeCorpus) -> None:
    other = str(make_corpus("other", [[300] * 99 + [EOD]] * 20))
    seen = tokens_of(build(0.3, other, 0.7, build.prefix, train=200).train)
    assert seen.shape == (200, SEQ_LENGTH)
    assert (seen == 300).any(axis=1).sum() == 60


def test_paths_without_weights_blend_by_their_tokens(build: Builder, make_corpus: MakeCorpus) -> None:
    once, thrice = (str(make_corpus(str(n), [[300 + n] * 99 + [EOD]] * (10 * n))) for n in (1, 3))
    seen = tokens_of(build(once, thrice, train=400, whole=True).train)
    assert (seen == 301).any(axis=1).sum() == 100


@pytest.mark.parametrize("samples", [1, 5, 16, 17])
def test_small_samples_of_uneven_blends(build: Builder, make_corpus: MakeCorpus, samples: int) -> None:
    # 17 tokens: every sample is an epoch of its own, so that nothing is indexed that was not asked for.
    prefixes = [str(make_corpus(str(n), [[300 + n] * 16 + [EOD]])) for n in range(6)]
    paths: list[str | float] = [0.9, prefixes[0]]
    for prefix in prefixes[1:]:
        paths += [0.02, prefix]
    assert tokens_of(build(*paths, train=samples, whole=True).train).shape == (samples, SEQ_LENGTH)


def test_loss_after_the_end_of_a_document_can_be_left_out(build: Builder) -> None:
    dataset = build(train=60, data={"eod_mask_loss": True}).train
    assert dataset is not None
    samples = [dataset[i] for i in range(60)]
    assert all(torch.equal(sample["loss_mask"], (sample["tokens"] != EOD).float()) for sample in samples)
    assert sum(int((sample["tokens"] == EOD).sum()) for sample in samples) > 20


def test_positions_can_start_again_with_each_document(build: Builder) -> None:
    dataset = build(train=60, data={"reset_position_ids": True}).train
    assert dataset is not None
    for i in range(60):
        tokens, positions = dataset[i]["tokens"].tolist(), dataset[i]["position_ids"].tolist()
        starts = [0, *(place + 1 for place, token in enumerate(tokens) if token == EOD)]
        assert positions == [place - max(start for start in starts if start <= place) for place in range(SEQ_LENGTH)]


def test_a_half_written_index_is_built_again(build: Builder) -> None:
    before = tokens_of(build(train=100).train)
    for size in (0, 10, 200):
        for path in (build.tmp_path / "cache").rglob("*shuffle_index.npy"):
            os.truncate(path, size)
        assert (tokens_of(build(train=100).train) == before).all()


def test_a_corpus_that_was_replaced_gets_a_new_index(build: Builder, make_corpus: MakeCorpus) -> None:
    build(train=100)
    make_corpus("c", numbered_documents(100, first=200))
    seen = tokens_of(build(train=100).train)
    assert set(np.unique(seen)) <= {EOD, *range(210, 290)}


def test_a_corpus_without_one_sample_is_refused(build: Builder, make_corpus: MakeCorpus) -> None:
    prefix = str(make_corpus("short", [[5] * SEQ_LENGTH]))
    with pytest.raises(DataError, match=r"data\.train_paths: .*short has no sample of 16 tokens for the train split"):
        build(prefix, train=1, whole=True)


def test_a_lone_process_keeps_no_process_group(build: Builder) -> None:
    build(0.5, build.prefix, 0.5, build.prefix, train=4)
    assert not dist.is_initialized()


def tokens_on_rank(topology: Topology, build: Builder, paths: tuple[str | float, ...]) -> list[np.ndarray]:
    datasets = build(*paths, train=100, valid=8)
    return [tokens_of(datasets.train), tokens_of(datasets.valid)]


def test_the_order_does_not_depend_on_the_ranks(build: Builder) -> None:
    blend = (0.3, build.prefix, 0.7, build.prefix)
    for paths in ((build.prefix,), blend):
        by_rank = run_ranks(2, tokens_on_rank, build, paths)
        for path in (build.tmp_path / "cache").rglob("*"):
            if path.is_file():
                path.unlink()
        datasets = build(*paths, train=100, valid=8)
        for tokens in by_rank:
            assert (tokens[0] == tokens_of(datasets.train)).all()
            assert (tokens[1] == tokens_of(datasets.valid)).all()


def built_on_rank(topology: Topology, build: Builder, paths: tuple[str | float, ...]) -> Datasets:
    return build(*paths, train=10, valid=4, is_builder_rank=topology.is_first)


def test_a_rank_that_does_not_build_has_no_samples(build: Builder) -> None:
    for paths in ((build.prefix,), (0.3, build.prefix, 0.7, build.prefix)):
        datasets = run_ranks(2, built_on_rank, build, paths)
        assert [split is None for split in (datasets[0].train, datasets[0].valid, datasets[0].test)] == [
            False,
            False,
            True,
        ]
        assert datasets[1] == Datasets(None, None, None)
