import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sentencepiece

from ssd_megatron.data.tokenizers import NO_PADDING, load_tokenizer, train_sentencepiece
from ssd_megatron.errors import DataError
from tests.data.conftest import TEXTS

AWKWARD_TEXTS = [
    "def f(x):\n\treturn  x\n",
    "   indented\n\n\n\t\tmore ",
    " leading and trailing \n",
    "carriage\r\nreturn",
    "ünïcode 中文 \U0001f600 \x00 \ufeff",
    "<s> </s> <|endoftext|> <unk> <0x0A>",
    "",
]


@pytest.mark.parametrize("text", AWKWARD_TEXTS)
@pytest.mark.parametrize("fixture", ["sentencepiece_model", "hugging_face_json"])
def test_every_text_comes_back_unchanged(fixture: str, text: str, request: pytest.FixtureRequest) -> None:
    tokenizer = load_tokenizer(request.getfixturevalue(fixture))
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.eod not in ids
    assert all(0 <= token < tokenizer.vocab_size for token in ids)


def test_sentencepiece(sentencepiece_model: Path) -> None:
    tokenizer = load_tokenizer(sentencepiece_model)
    assert (tokenizer.vocab_size, tokenizer.eod, tokenizer.pad) == (340, 2, NO_PADDING)
    assert len(tokenizer.encode(" " * 8)) == 1
    assert tokenizer.encode("\n\t") == [3, 4]


def test_hugging_face_prefers_endoftext(hugging_face_json: Path) -> None:
    tokenizer = load_tokenizer(hugging_face_json)
    assert (tokenizer.vocab_size, tokenizer.eod) == (320, 1)


@pytest.mark.parametrize(
    ("tokens", "eod"),
    [(["<eod>", "<eos>", "</s>"], "</s>"), (["<eod>", "<eos>"], "<eos>"), (["<eod>"], "<eod>")],
)
def test_hugging_face_end_of_document(tmp_path: Path, tokens: list[str], eod: str) -> None:
    path = write_word_level(tmp_path / "t.json", {token: 5 * i for i, token in enumerate(["a", *tokens])})
    tokenizer = load_tokenizer(path)
    assert tokenizer.eod == 5 * (1 + tokens.index(eod))
    assert tokenizer.vocab_size == 5 * len(tokens) + 1  # the ids have gaps


def test_no_end_of_document(tmp_path: Path) -> None:
    path = write_word_level(tmp_path / "t.json", {"a": 0})
    with pytest.raises(DataError, match=r"looked for <\|endoftext\|>, </s>, <eos>, <eod>"):
        load_tokenizer(path)
    with pytest.raises(DataError, match="looked for the eos id and the piece <eod>"):
        load_tokenizer(write_sentencepiece(tmp_path / "t.model", eos_id=-1))


def test_sentencepiece_with_a_piece_for_end_of_document(tmp_path: Path) -> None:
    path = write_sentencepiece(tmp_path / "t.model", eos_id=-1, control_symbols=["<eod>"])
    assert load_tokenizer(path).eod == 2


def test_unusable_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"t\.vocab must end in \.model .* or \.json"):
        load_tokenizer(tmp_path / "t.vocab")
    with pytest.raises(DataError, match=r"t\.model does not exist: tools/train_tokenizer\.py makes one"):
        load_tokenizer(tmp_path / "t.model")
    (tmp_path / "t.model").write_bytes(b"not a model")
    with pytest.raises(DataError, match=r"t\.model is not a SentencePiece model"):
        load_tokenizer(tmp_path / "t.model")
    for content in ("not json", "7", '{"a": 1}'):
        (tmp_path / "t.json").write_text(content)
        with pytest.raises(DataError, match=r"t\.json is not a Hugging Face tokenizer\.json"):
            load_tokenizer(tmp_path / "t.json")


def test_a_tokenizer_is_identified_by_its_content(tmp_path: Path, sentencepiece_model: Path) -> None:
    copy = tmp_path / "copy.model"
    copy.write_bytes(sentencepiece_model.read_bytes())
    other = tmp_path / "other.model"
    train_sentencepiece(TEXTS, other, 330)
    identifiers = [load_tokenizer(path).unique_identifiers for path in (sentencepiece_model, copy, other)]
    assert identifiers[0] == identifiers[1] != identifiers[2]


def test_training_is_reproducible(tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.model" for i in range(3)]
    for path, seed in zip(paths, (1, 1, 2), strict=True):
        train_sentencepiece(TEXTS, path, 320, seed=seed, max_lines=200)
    models = [path.read_bytes() for path in paths]
    assert models[0] == models[1] != models[2]


def test_training_refuses_what_it_cannot_use(tmp_path: Path) -> None:
    path = tmp_path / "t.model"
    with pytest.raises(DataError, match=r"a vocabulary of 100,000 tokens does not fit .* value <= \d+"):
        train_sentencepiece(TEXTS, path, 100_000)
    with pytest.raises(DataError, match="a vocabulary of 20 tokens does not fit this text"):
        train_sentencepiece(TEXTS, path, 20)
    with pytest.raises(DataError, match="there is no text"):
        train_sentencepiece(["", "\n"], path, 300)
    with pytest.raises(DataError, match=r"must be named \.model, not .*t\.json"):
        train_sentencepiece(TEXTS, tmp_path / "t.json", 300)
    assert not list(tmp_path.iterdir())


def test_an_error_of_the_texts_stays_what_it_is(tmp_path: Path) -> None:
    def texts() -> Iterator[str]:
        yield TEXTS[0]
        raise DataError("file:2: broken")

    with pytest.raises(DataError, match=r"^file:2: broken$"):
        train_sentencepiece(texts(), tmp_path / "t.model", 300)


def test_very_long_lines_are_learnt_from(tmp_path: Path) -> None:
    path = tmp_path / "t.model"
    train_sentencepiece(["abcabcabd" * 20_000], path, 270)
    assert len(load_tokenizer(path).encode("abcabcabd")) < 9


def write_word_level(path: Path, vocabulary: dict[str, int]) -> Path:
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "a"}
    path.write_text(json.dumps({"version": "1.0", "added_tokens": [], "model": model}))
    return path


def write_sentencepiece(path: Path, **options: Any) -> Path:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=model, vocab_size=300, model_type="bpe", minloglevel=2, **options
    )
    path.write_bytes(model.getvalue())
    return path
