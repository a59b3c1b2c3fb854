from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch

from ssd_megatron.config.model import ModelConfig
from ssd_megatron.config.schema import DataConfig
from ssd_megatron.data.masking import MaskedObjective, Masking, choose_words, replace_tokens
from ssd_megatron.data.objectives import make_objective
from ssd_megatron.data.tokenizers import MARKERS, Words, load_tokenizer, train_sentencepiece
from ssd_megatron.errors import DataError
from tests.data.conftest import TEXTS

MASK, CLS, SEP, EOD = 50, 51, 52, 0
EVERY_THIRD = Words(np.arange(60) % 3 == 1, np.zeros(60, dtype=bool))  # a word begins at ids 1, 4, 7 ...
MASKING = Masking(0.15, 0.8, 0.1, EVERY_THIRD, MASK, CLS, SEP, EOD, vocab_size=60)


class Texts(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Text i: 32 tokens from i on, in 1 to 48."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"tokens": (torch.arange(32) + index) % 48 + 1}


def objective(sentences: Any = "none", seed: int = 1) -> MaskedObjective:
    length = 34 if sentences == "none" else 35
    return MaskedObjective(MASKING, seq_length=length, token_types=True, sentences=sentences, seed=seed)


def test_whole_words_up_to_the_budget() -> None:
    starts = np.arange(40) % 4 == 0
    allowed = np.arange(40) >= 8
    for seed in range(20):
        chosen = choose_words(starts, allowed, 14, np.random.default_rng(seed))
        assert chosen.sum() == 12  # three words of four; a fourth would be too many
        assert all(word.all() or not word.any() for word in chosen.reshape(-1, 4))
        assert not chosen[:8].any()


def test_a_word_longer_than_the_budget_is_cut() -> None:
    starts = np.arange(40) == 0
    chosen = choose_words(starts, np.ones(40, dtype=bool), 6, np.random.default_rng(0))
    assert chosen.sum() == 6 and np.flatnonzero(chosen)[0] % 6 == 0 and np.ptp(np.flatnonzero(chosen)) == 5


def test_tokens_are_replaced_in_the_shares_that_are_set() -> None:
    ids, chosen = np.full(40_000, 7), np.arange(40_000) % 4 != 0
    replaced = replace_tokens(ids, chosen, MASKING, np.random.default_rng(0))
    assert (replaced[~chosen] == 7).all()
    shares = [(replaced[chosen] == token).mean() for token in (MASK, 7)]
    # A random token is the mask token or the token itself once in 60 times each.
    assert shares == pytest.approx([0.8 + 0.1 / 60, 0.1 + 0.1 / 60], abs=0.01)


def test_a_sample() -> None:
    made = objective()
    masked = 0
    for index in range(200):
        sample = made.sample(Texts(), 500, index)
        assert {name: values.dtype for name, values in sample.items()} == {
            "tokens": torch.int64,
            "labels": torch.int64,
            "loss_mask": torch.float32,
            "position_ids": torch.int64,
            "token_types": torch.int64,
        }
        labels, mask = sample["labels"].numpy(), sample["loss_mask"].numpy() == 1
        assert labels.tolist() == [CLS, *Texts()[index]["tokens"].tolist(), SEP]
        assert (sample["tokens"].numpy() == labels)[~mask].all() and not mask[[0, -1]].any()
        for start in np.flatnonzero(EVERY_THIRD.begins[labels]):  # words have three tokens, or fewer at the ends
            word = mask[start : start + 3][labels[start : start + 3] < 50]
            assert word.all() or not word.any()
        masked += mask.sum()
    assert masked / (200 * 32) == pytest.approx(0.15, abs=0.02)


def test_a_sample_depends_on_seed_and_index_alone() -> None:
    first, second = objective(), objective()
    forward = [first.sample(Texts(), 500, i)["tokens"] for i in range(10)]
    backward = [second.sample(Texts(), 500, i)["tokens"] for i in reversed(range(10))]
    assert all(torch.equal(a, b) for a, b in zip(forward, reversed(backward), strict=True))
    others = [objective(seed=2).sample(Texts(), 500, i)["loss_mask"] for i in range(10)]
    masks = [first.sample(Texts(), 500, i)["loss_mask"] for i in range(10)]
    assert sum(torch.equal(a, b) for a, b in zip(masks, others, strict=True)) < 5  # of 11 words one or two


@pytest.mark.parametrize("sentences", ["next", "order"])
def test_pairs_of_segments(sentences: str) -> None:
    made = objective(sentences)
    changed = same = 0
    for index in range(200):
        sample = made.sample(Texts(), 500, index)
        labels, types = sample["labels"].tolist(), sample["token_types"].tolist()
        cut = labels.index(SEP)
        assert labels[0] == CLS and labels[-1] == SEP and types == [0] * (cut + 1) + [1] * (34 - cut)
        first, second, text = labels[1:cut], labels[cut + 1 : -1], Texts()[index]["tokens"].tolist()
        assert 8 <= len(first) <= 24
        assert sample["sentence_mask"] == 1.0
        if sample["sentence_labels"] == 0:
            assert first + second == text
        elif sentences == "order":
            assert second + first == text
        else:
            assert first == text[: len(first)]
            same += second == text[len(first) :]
        changed += int(sample["sentence_labels"])
    assert 80 < changed < 120 and same < 10  # of texts that repeat every 48


def bert(**settings: Any) -> ModelConfig:
    sizes = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "seq_length": 16, "vocab_size": 400}
    return ModelConfig(**{"family": "bert", **sizes, **settings})


def test_a_tokenizer_without_a_mask_token_is_refused(sentencepiece_model: Path) -> None:
    data = DataConfig(paths="corpus", tokenizer=sentencepiece_model)
    with pytest.raises(DataError, match=r"no mask token, which bert needs: .* <mask>.*--reserve bert"):
        make_objective(bert(), data, load_tokenizer(sentencepiece_model), seed=1)


def test_a_tokenizer_that_reserves_what_bert_needs(tmp_path: Path) -> None:
    path = tmp_path / "t.model"
    train_sentencepiece(TEXTS, path, 340, reserve=["bert"])
    tokenizer = load_tokenizer(path)
    ids = [tokenizer.find(marker) for marker in MARKERS["bert"]]
    assert None not in ids and len(set(ids)) == 3 and tokenizer.find("nowhere") is None
    text = "[MASK] [CLS] [SEP]"
    assert not set(ids) & set(tokenizer.encode(text)) and tokenizer.decode(tokenizer.encode(text)) == text
    made = make_objective(bert(), DataConfig(paths="corpus", tokenizer=path), tokenizer, seed=1)
    assert made.text_length == 14


def words_of(tokenizer: tokenizers.Tokenizer, path: Path, text: str) -> list[str]:
    """A text cut at the words' beginnings."""
    tokenizer.save(str(path))
    loaded = load_tokenizer(path)
    begins, ends = loaded.words()
    words: list[str] = []
    after_end = True
    for token in loaded.encode(text):
        piece = tokenizer.id_to_token(token)
        if begins[token] or after_end:
            words.append("")
        words[-1] += piece
        after_end = bool(ends[token])
    return words


def hugging_face(model: Any, before: Any) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = before
    return tokenizer


def vocabulary(*pieces: str) -> dict[str, int]:
    return {piece: i for i, piece in enumerate(("</s>", "[UNK]", *pieces))}


def test_words_of_hugging_face_tokenizers(tmp_path: Path) -> None:
    models, before, path = tokenizers.models, tokenizers.pre_tokenizers, tmp_path / "t.json"
    pieces = vocabulary("ab", "##c", "d")
    piece = hugging_face(models.WordPiece(pieces, unk_token="[UNK]"), before.Whitespace())
    assert words_of(piece, path, "abc d ab") == ["ab##c", "d", "ab"]
    level = hugging_face(models.WordLevel(pieces, unk_token="[UNK]"), before.Whitespace())
    assert words_of(level, path, "ab d") == ["ab", "d"]
    merged = hugging_face(models.BPE(vocabulary("a", "b</w>", "b", "a</w>"), [], end_of_word_suffix="</w>"), None)
    merged.pre_tokenizer = before.Whitespace()
    assert words_of(merged, path, "ab ba") == ["ab</w>", "ba</w>"]
    bytes_ = hugging_face(models.BPE(vocabulary("a", "b", "Ġ", "Ċ"), []), before.ByteLevel(add_prefix_space=False))
    assert words_of(bytes_, path, "ab a\nb") == ["ab", "Ġa", "Ċb"]
    space = hugging_face(models.BPE(vocabulary("\u2581", "a", "b"), []), before.Metaspace())
    assert words_of(space, path, "ab b") == ["\u2581ab", "\u2581b"]
    with pytest.raises(DataError, match=r"of the kind BPE, does not show where words begin: set data"):
        words_of(hugging_face(models.BPE(vocabulary("a"), []), before.Whitespace()), path, "a")


def test_words_of_sentencepiece(sentencepiece_model: Path) -> None:
    tokenizer = load_tokenizer(sentencepiece_model)
    begins, ends = tokenizer.words()
    ids = tokenizer.encode("return x\n\t        return")
    starts = [bool(begins[token]) or i == 0 or bool(ends[ids[i - 1]]) for i, token in enumerate(ids)]
    words = [tokenizer.decode(ids[a:b]) for a, b in zip(starts_at(starts), [*starts_at(starts)[1:], None], strict=True)]
    assert words == ["return", " x", "\n", "\t", " " * 8, "return"]


def starts_at(starts: list[bool]) -> list[int]:
    return [i for i, start in enumerate(starts) if start]
