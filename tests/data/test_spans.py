from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ssd_megatron.config.model import ModelConfig
from ssd_megatron.config.schema import DataConfig
from ssd_megatron.config.span_sizes import SpanSizes, span_sizes
from ssd_megatron.data.objectives import make_objective
from ssd_megatron.data.spans import corrupt, random_parts
from ssd_megatron.data.tokenizers import load_tokenizer, train_sentencepiece
from ssd_megatron.errors import DataError
from tests.data.conftest import TEXTS
from tests.data.test_masking import Texts


def test_sizes_are_those_of_t5() -> None:
    """512 inputs stand for 568 tokens of text, and are predicted in 114 (Raffel et al., section 3.1.4)."""
    sizes = span_sizes(512, 0.15, 3.0)
    assert (sizes.text, sizes.inputs, sizes.targets) == (568, 512, 114)


@pytest.mark.parametrize(("fraction", "mean"), [(0.05, 1.0), (0.15, 1.0), (0.15, 3.0), (0.5, 3.0), (0.5, 8.0)])
def test_inputs_fill_the_sample(fraction: float, mean: float) -> None:
    for length in (8, 17, 64, 333):
        sizes = span_sizes(length, fraction, mean)
        assert sizes.inputs == length
        assert 1 <= sizes.spans <= min(sizes.noise, sizes.text - sizes.noise)


def test_parts_are_positive_add_up_and_are_all_as_likely() -> None:
    generator = np.random.default_rng(0)
    drawn = [tuple(random_parts(5, 3, generator)) for _ in range(3000)]
    assert all(sum(parts) == 5 and min(parts) >= 1 for parts in drawn)
    counts = [drawn.count(parts) for parts in set(drawn)]
    assert len(counts) == 6 and min(counts) > 400
    assert random_parts(4, 1, generator) == [4]


def test_inputs_and_targets_together_are_the_text() -> None:
    text, sentinels = np.arange(100, 140), np.array([9, 8, 7, 6])
    for seed in range(20):
        inputs, targets = corrupt(text, SpanSizes(40, 12, 4), sentinels, np.random.default_rng(seed))
        assert len(inputs) == 28 + 4 and len(targets) == 12 + 4
        spans = [part.tolist() for part in np.split(targets, np.flatnonzero(targets < 10))[1:]]
        assert [span[0] for span in spans] == sentinels.tolist() and min(map(len, spans)) >= 2
        whole: list[int] = []
        for token in inputs.tolist():
            whole += [token] if token >= 100 else spans.pop(0)[1:]
        assert whole == text.tolist() and inputs[0] == 100


def t5(**settings: Any) -> ModelConfig:
    sizes = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "seq_length": 30, "vocab_size": 400}
    return ModelConfig(**{"family": "t5", "decoder_seq_length": 12, **sizes, **settings})


def test_a_sample(sentencepiece_model: Path) -> None:
    """Of 32 tokens of text 5 are in 2 spans; sentinels are the last of the model's ids, which the tokenizer lacks."""
    tokenizer = load_tokenizer(sentencepiece_model)
    made = make_objective(t5(), DataConfig(paths="corpus", tokenizer=sentencepiece_model), tokenizer, seed=1)
    assert made.text_length == 32
    for index in range(20):
        sample = made.sample(Texts(), 500, index)
        assert {name: (len(values), values.dtype) for name, values in sample.items()} == {
            "tokens": (30, torch.int64),
            "decoder_tokens": (12, torch.int64),
            "labels": (12, torch.int64),
            "loss_mask": (12, torch.float32),
        }
        tokens, labels = sample["tokens"].tolist(), sample["labels"].tolist()
        assert tokens[-1] == tokenizer.eod and [token for token in tokens if token > 339] == [399, 398]
        assert labels[0] == 399 and labels[7:] == [tokenizer.eod] * 5
        assert sample["decoder_tokens"].tolist() == [tokenizer.eod, *labels[:-1]]
        assert sample["loss_mask"].tolist() == [1.0] * 8 + [0.0] * 4
        again = made.sample(Texts(), 500, index)
        assert all(torch.equal(sample[name], again[name]) for name in sample)


def test_the_decoder_begins_with_the_model_s_token(sentencepiece_model: Path) -> None:
    tokenizer, data = load_tokenizer(sentencepiece_model), DataConfig(paths="corpus", tokenizer=sentencepiece_model)
    plain, other = (
        make_objective(t5(decoder_start_token=start), data, tokenizer, seed=1).sample(Texts(), 500, 0)
        for start in (None, 0)
    )
    assert tokenizer.eod != 0
    assert other["decoder_tokens"].tolist() == [0, *plain["decoder_tokens"].tolist()[1:]]
    assert all(torch.equal(other[name], plain[name]) for name in ("tokens", "labels", "loss_mask"))


def test_sentinels_of_the_tokenizer_and_too_few(tmp_path: Path, sentencepiece_model: Path) -> None:
    path = tmp_path / "t.model"
    train_sentencepiece(TEXTS, path, 440, reserve=["t5"])
    tokenizer = load_tokenizer(path)
    data = DataConfig(paths="corpus", tokenizer=path)
    sample = make_objective(t5(vocab_size=440), data, tokenizer, seed=1).sample(Texts(), 500, 0)
    assert sample["labels"][0] == tokenizer.find("<extra_id_0>")
    plain = load_tokenizer(sentencepiece_model)
    with pytest.raises(DataError, match=r"needs 2 sentinel .* has 0, and model.vocab_size \(341\) leaves 1 free"):
        make_objective(t5(vocab_size=341), DataConfig(paths="corpus", tokenizer=sentencepiece_model), plain, seed=1)


def test_a_model_without_room_for_spans_is_refused_by_name(sentencepiece_model: Path) -> None:
    """A model that was imported has been through no checks of a ds.json."""
    tokenizer, data = load_tokenizer(sentencepiece_model), DataConfig(paths="corpus", tokenizer=sentencepiece_model)
    with pytest.raises(DataError, match=r"model.decoder_seq_length \(7\) is too short .*: try 8"):
        make_objective(t5(decoder_seq_length=7), data, tokenizer, seed=1)
