"""Tokenizers of two kinds behind one protocol: SentencePiece models (.model) and Hugging Face files (.json)."""

import io
import json
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import sentencepiece
import tokenizers

from ssd_megatron.errors import DataError
from ssd_megatron.files import sha256_of, write_atomically

HUGGING_FACE_EOD_TOKENS = ("<|endoftext|>", "</s>", "<eos>", "<eod>", "[SEP]")

# Tokens that objectives need and no text contains, for a tokenizer to reserve, by family.
MARKERS: dict[str, tuple[str, ...]] = {
    "bert": ("[MASK]", "[CLS]", "[SEP]"),
    "t5": tuple(f"<extra_id_{number}>" for number in range(100)),
}

SPACE = "\u2581"  # SentencePiece's sign for one
BYTE_LEVEL_SPACES = ("Ġ", "Ċ", "ĉ")  # what byte-level vocabularies write for space, newline and tab

# mcore masks the loss wherever a label equals the padding id. Samples here are never padded, so that the id must be
# one that no text contains.
NO_PADDING = -1

# Characters, of at most four bytes each; longer lines are cut for training, because SentencePiece would drop them.
LONGEST_LINE = 2000


class Words(NamedTuple):
    """Where words are, as flags by token id: at a token of `begins` a word begins, and after one of `ends`."""

    begins: npt.NDArray[np.bool_]
    ends: npt.NDArray[np.bool_]


class Tokenizer(Protocol):
    """What the project and mcore's GPTDatasetConfig ask of a tokenizer.

    Attributes:
        vocab_size: all token ids are below it.
        eod: id of the token that ends a document.
        pad: padding id for mcore, `NO_PADDING`.
        unique_identifiers: names the tokenizer in mcore's index cache by content, not by path.
    """

    @property
    def vocab_size(self) -> int: ...
    @property
    def eod(self) -> int: ...
    @property
    def pad(self) -> int: ...
    @property
    def unique_identifiers(self) -> dict[str, str]: ...

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; markers such as end of document are neither added nor recognised in the text."""
        ...

    def decode(self, ids: list[int]) -> str:
        """Text of token ids."""
        ...

    def find(self, token: str) -> int | None:
        """Id of a token by its text in the vocabulary."""
        ...

    def words(self) -> Words:
        """Where words are.

        Raises:
            DataError: the vocabulary does not show it.
        """
        ...


class SentencePieceTokenizer:
    """A SentencePiece model; a document ends with its eos id or, where it has none, with the piece `<eod>`."""

    pad = NO_PADDING

    def __init__(self, path: Path) -> None:
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        except RuntimeError as error:
            raise DataError(f"{path} is not a SentencePiece model: {error}") from error
        self.vocab_size: int = self._processor.get_piece_size()
        self.eod = self._find_eod(path)
        self.unique_identifiers = {"class": type(self).__name__, "sha256": sha256_of(path)}

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._processor.encode(text)
        return ids

    def decode(self, ids: list[int]) -> str:
        text: str = self._processor.decode(ids)
        return text

    def find(self, token: str) -> int | None:
        found: int = self._processor.piece_to_id(token)
        return found if self._processor.id_to_piece(found) == token else None  # unknown ones get the id of <unk>

    def words(self) -> Words:
        return _words_by_space([self._processor.id_to_piece(i) for i in range(self.vocab_size)])

    def _find_eod(self, path: Path) -> int:
        eos: int = self._processor.eos_id()
        if eos >= 0:
            return eos
        eod = self.find("<eod>")
        if eod is None:
            raise DataError(f"{path} has no token that ends a document: looked for the eos id and the piece <eod>")
        return eod


class HuggingFaceTokenizer:
    """A Hugging Face tokenizer.json; a document ends with the first of `HUGGING_FACE_EOD_TOKENS` it has."""

    pad = NO_PADDING

    def __init__(self, path: Path) -> None:
        self._path = path
        self._tokenizer = tokenizers.Tokenizer.from_str(_hugging_face_json(path))
        # A text that quotes "<|endoftext|>" does not end there.
        self._tokenizer.encode_special_tokens = True
        # Added tokens may leave gaps, so that counting the tokens is not enough.
        self.vocab_size: int = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.eod = self._find_eod(path)
        self.unique_identifiers = {"class": type(self).__name__, "sha256": sha256_of(path)}

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False)
        return text

    def find(self, token: str) -> int | None:
        found: int | None = self._tokenizer.token_to_id(token)
        return found

    def words(self) -> Words:
        content = json.loads(self._tokenizer.to_str())
        pieces = [self._tokenizer.id_to_token(i) or "" for i in range(self.vocab_size)]
        model: dict[str, Any] = content["model"]
        if model["type"] == "WordLevel":
            return _words(pieces, lambda _piece: True, lambda _piece: True)
        if model["type"] == "WordPiece":
            inside = model["continuing_subword_prefix"]
            return _words(pieces, lambda piece: not piece.startswith(inside), lambda _piece: False)
        if model.get("end_of_word_suffix"):
            last = model["end_of_word_suffix"]
            return _words(pieces, lambda _piece: False, lambda piece: piece.endswith(last))
        steps = json.dumps([content["pre_tokenizer"], content["normalizer"]])
        if "ByteLevel" in steps:
            return _words(pieces, lambda piece: piece.startswith(BYTE_LEVEL_SPACES), lambda _piece: False)
        if "Metaspace" in steps or SPACE in steps:
            return _words_by_space(pieces)
        raise DataError(
            f"{self._path}, of the kind {model['type']}, does not show where words begin: set data.whole_words to false"
        )

    def _find_eod(self, path: Path) -> int:
        for token in HUGGING_FACE_EOD_TOKENS:
            eod = self.find(token)
            if eod is not None:
                return eod
        raise DataError(f"{path} has no token that ends a document: looked for {', '.join(HUGGING_FACE_EOD_TOKENS)}")


def load_tokenizer(path: Path) -> Tokenizer:
    """Load a tokenizer; its suffix says of which kind it is.

    Raises:
        DataError: no such file, an unknown suffix, a damaged file, or no token that ends a document.
    """
    if path.suffix not in (".model", ".json"):
        raise DataError(f"tokenizer {path} must end in .model (SentencePiece) or .json (Hugging Face tokenizer.json)")
    if not path.is_file():
        raise DataError(f"tokenizer {path} does not exist: tools/train_tokenizer.py makes one")
    return SentencePieceTokenizer(path) if path.suffix == ".model" else HuggingFaceTokenizer(path)


def require_token(tokenizer: Tokenizer, path: Path, kind: str, family: str, tokens: tuple[str, ...]) -> int:
    """Id of the first of some tokens that a tokenizer has.

    Raises:
        DataError: it has none of them.
    """
    for token in tokens:
        found = tokenizer.find(token)
        if found is not None:
            return found
    raise DataError(
        f"data.tokenizer ({path}) has no {kind} token, which {family} needs: looked for {', '.join(tokens)}. Make one "
        f"with tools/train_tokenizer.py --reserve {family}, and the data anew with tools/preprocess_data.py"
    )


def train_sentencepiece(
    texts: Iterable[str],
    model_path: Path,
    vocab_size: int,
    *,
    reserve: Iterable[str] = (),
    seed: int = 1,
    max_lines: int = 500_000,
) -> None:
    """Train a SentencePiece BPE model and write it atomically.

    Every text comes back unchanged from encode and decode (but for U+2581, SentencePiece's sign for a space): no
    normalisation, newlines and tabs are tokens of their own, characters out of the vocabulary become bytes.

    Args:
        texts: documents; read once.
        model_path: the file to write, ending in .model; its eos id ends documents.
        vocab_size: tokens, of which 261 are markers, bytes, newline and tab.
        reserve: families whose MARKERS are tokens that no text contains.
        seed: of the choice of lines; the same texts and seed give the same model.
        max_lines: lines drawn at random for training, where there are more.
    Raises:
        DataError: no text, or a vocabulary that does not fit the text.
    """
    if model_path.suffix != ".model":
        raise DataError(f"a SentencePiece model must be named .model, not {model_path}")
    lines = _sample_lines(texts, max_lines, random.Random(seed))
    if not lines:
        raise DataError(f"there is no text to train {model_path} on")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,  # an indentation is one token
            add_dummy_prefix=False,
            user_defined_symbols=["\n", "\t"],
            control_symbols=[marker for family in reserve for marker in MARKERS[family]],
            max_sentence_length=4 * LONGEST_LINE,
            num_threads=2,  # a fixed number: the model depends on it
            minloglevel=2,
        )
    except RuntimeError as error:
        raise DataError(f"a vocabulary of {vocab_size:,} tokens does not fit this text: {error}") from error
    write_atomically(model_path, model.getvalue())


def _words(pieces: list[str], begins: Callable[[str], bool], ends: Callable[[str], bool]) -> Words:
    return Words(np.array([begins(piece) for piece in pieces]), np.array([ends(piece) for piece in pieces]))


def _words_by_space(pieces: list[str]) -> Words:
    """Words begin with a space, and after newlines, tabs and indentations."""

    def is_gap(piece: str) -> bool:
        return piece in ("\n", "\t") or (len(piece) > 1 and not piece.strip(SPACE))

    return _words(pieces, lambda piece: piece.startswith(SPACE) or is_gap(piece), is_gap)


def _sample_lines(texts: Iterable[str], count: int, generator: random.Random) -> list[str]:
    """At most `count` lines, each line of the texts with the same chance (reservoir sampling)."""
    sample: list[str] = []
    for seen, line in enumerate(line for text in texts for line in _lines(text)):
        if seen < count:
            sample.append(line)
        elif (slot := generator.randrange(seen + 1)) < count:
            sample[slot] = line
    return sample


def _lines(text: str) -> Iterator[str]:
    for line in text.split("\n"):
        for start in range(0, len(line), LONGEST_LINE):
            yield line[start : start + LONGEST_LINE]


def _hugging_face_json(path: Path) -> str:
    try:
        content = path.read_text(encoding="utf-8")
        is_tokenizer = "model" in json.loads(content)
    except (ValueError, TypeError) as error:
        raise DataError(f"{path} is not a Hugging Face tokenizer.json: {error}") from error
    if not is_tokenizer:
        raise DataError(f'{path} is not a Hugging Face tokenizer.json: it has no "model"')
    return content
