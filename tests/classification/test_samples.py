"""Texts as models read them, and batches without padding."""

from pathlib import Path
from typing import Any

import pytest
import torch

from ssd_megatron.classification import samples as module
from ssd_megatron.classification.labelled import Columns
from ssd_megatron.classification.samples import Encoder, Sample, fit, training_batches, unpadded_batches
from ssd_megatron.config.model import ModelConfig
from ssd_megatron.data.tokenizers import load_tokenizer

CPU = torch.device("cpu")


def encoder(tokenizer: Path, **settings: Any) -> Encoder:
    sizes = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "seq_length": 32, "vocab_size": 512}
    return Encoder(ModelConfig(**{**sizes, **settings}), load_tokenizer(tokenizer), tokenizer)


def test_texts_end_with_the_end_of_document_where_gpt_is_read(tokenizer: Path) -> None:
    known = load_tokenizer(tokenizer)
    (sample, cut) = encoder(tokenizer).encode(["stone river", "cloud"])
    ids = [*known.encode("stone river"), known.eod, *known.encode("cloud"), known.eod]
    assert sample["tokens"].tolist() == ids and sample["position_ids"].tolist() == list(range(len(ids)))
    assert list(sample) == ["tokens", "position_ids"] and not cut


def test_bert_has_its_markers_and_kinds_of_tokens(tokenizer: Path) -> None:
    known = load_tokenizer(tokenizer)
    cls, sep = known.find("[CLS]"), known.find("[SEP]")
    first, second = known.encode("stone river"), known.encode("cloud")
    sample, _ = encoder(tokenizer, family="bert", num_token_types=2).encode(["stone river", "cloud"])
    assert sample["tokens"].tolist() == [cls, *first, sep, *second, sep]
    assert sample["token_types"].tolist() == [0] * (len(first) + 2) + [1] * (len(second) + 1)
    assert "token_types" not in encoder(tokenizer, family="bert").encode(["stone"])[0]


def test_t5_s_decoder_reads_its_start_alone(tokenizer: Path) -> None:
    known = load_tokenizer(tokenizer)
    sample, _ = encoder(tokenizer, family="t5").encode(["stone"])
    assert sample["tokens"].tolist() == [*known.encode("stone"), known.eod]
    assert sample["decoder_tokens"].tolist() == [known.eod]
    other, _ = encoder(tokenizer, family="t5", decoder_start_token=7).encode(["stone"])
    assert other["tokens"].equal(sample["tokens"]) and other["decoder_tokens"].tolist() == [7]


@pytest.mark.parametrize(
    ("lengths", "room", "left"),
    [
        ([3], 8, [3]),
        ([9], 8, [8]),
        ([3, 4], 8, [3, 4]),
        ([10, 5], 8, [4, 4]),
        ([10, 2], 8, [6, 2]),
        ([2, 10], 9, [2, 7]),
        ([10, 10], 9, [5, 4]),
        ([5, 4], 9, [5, 4]),
    ],
)
def test_the_longer_text_gives_first(lengths: list[int], room: int, left: list[int]) -> None:
    assert fit(lengths, room) == left


def test_what_is_too_long_is_cut_and_counted(tokenizer: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text("sentence\tlabel\n" + "stone " * 30 + "\ta\nriver\tb\ncloud\ta\n")
    read = encoder(tokenizer, family="bert", seq_length=10).read(path, Columns(("sentence",), "label"), ["a", "b"])
    assert len(read.samples[0]["tokens"]) == 10
    assert [int(sample["label"]) for sample in read.samples] == [0, 1, 0]
    assert read.cut == 1 and read.majority == pytest.approx(2 / 3)


def numbered(count: int) -> list[Sample]:
    lengths = torch.randint(1, 20, (count,), generator=torch.Generator().manual_seed(0)).tolist()
    return [{"tokens": torch.full((length,), n), "label": torch.tensor(n)} for n, length in enumerate(lengths)]


def test_batches_without_padding_have_every_sample_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PART_TOKENS", 40)
    batches = list(unpadded_batches(numbered(100), CPU))
    assert sorted(n for batch in batches for n in batch["label"].tolist()) == list(range(100))
    for batch in batches:
        assert batch["tokens"].numel() <= 40
        assert bool((batch["tokens"] == batch["label"][:, None]).all())
    lengths = [batch["tokens"].shape[1] for batch in batches]
    assert lengths == sorted(lengths) and len(batches) < 60


def test_batches_of_training_follow_from_seed_and_epoch() -> None:
    samples = numbered(1000)

    def drawn(*arguments: int) -> list[list[int]]:
        return [[int(sample["label"]) for sample in batch] for batch in training_batches(samples, 8, *arguments)]

    assert drawn(1, 1) == drawn(1, 1) and drawn(1, 1) != drawn(1, 2) and drawn(1, 1) != drawn(2, 1)
    assert sorted(n for batch in drawn(1, 1) for n in batch) == list(range(1000))
    assert sorted(map(len, drawn(1, 1))) == [8] * 125
    kinds = [len({len(samples[n]["tokens"]) for n in batch}) for batch in drawn(1, 1)]
    assert sum(kinds) / len(kinds) < 2.5  # of eight samples drawn at random: 6.6
    firsts = [len(samples[batch[0]]["tokens"]) for batch in drawn(1, 1)]
    assert firsts != sorted(firsts)
