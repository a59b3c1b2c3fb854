"""Tokenizers of two kinds behind one protocol: SentencePiece models (.model) and Hugging Face files (.json)."""

import io
import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Protocol

import sentencepiece
import tokenizers

from ssd_megatron.errors import DataError
from ssd_megatron.files import sha256_of, write_atomically

HUGGING_FACE_EOD_TOKENS = ("<|endoftext|>", "</s>", "<eos>", "<eod>")

# mcore masks the loss wherever a label equals the padding id. Samples here are never padded, so that the id must be
# one that no text contains.
NO_PADDING = -1

# Characters, of at most four bytes each; longer lines are cut for training, because SentencePiece would drop them.
LONGEST_LINE = 2000


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

    def _find_eod(self, path: Path) -> int:
        eos: int = self._processor.eos_id()
        if eos >= 0:
            return eos
        eod: int = self._processor.piece_to_id("<eod>")
        if self._processor.id_to_piece(eod) != "<eod>":  # unknown pieces get the id of <unk>
            raise DataError(f"{path} has no token that ends a document: looked for the eos id and the piece <eod>")
        return eod


class HuggingFaceTokenizer:
    """A Hugging Face tokenizer.json; a document ends with the first of `HUGGING_FACE_EOD_TOKENS` it has."""

    pad = NO_PADDING

    def __init__(self, path: Path) -> None:
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

    def _find_eod(self, path: Path) -> int:
        for token in HUGGING_FACE_EOD_TOKENS:
            eod: int | None = self._tokenizer.token_to_id(token)
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


def train_sentencepiece(
    texts: Iterable[str], model_path: Path, vocab_size: int, *, seed: int = 1, max_lines: int = 500_000
) -> None:
    """Train a SentencePiece BPE model and write it atomically.

    Every text comes back unchanged from encode and decode (but for U+2581, SentencePiece's sign for a space): no
    normalisation, newlines and tabs are tokens of their own, characters out of the vocabulary become bytes.

    Args:
        texts: documents; read once.
        model_path: the file to write, ending in .model; its eos id ends documents.
        vocab_size: tokens, of which 261 are markers, bytes, newline and tab.
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
            max_sentence_length=4 * LONGEST_LINE,
            num_threads=2,  # a fixed number: the model depends on it
            minloglevel=2,
        )
    except RuntimeError as error:
        raise DataError(f"a vocabulary of {vocab_size:,} tokens does not fit this text: {error}") from error
    write_atomically(model_path, model.getvalue())


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
