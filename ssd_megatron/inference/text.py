"""Text after prompts, in pieces as they come: never a part of a character, never a part of a stop string."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

from ssd_megatron.data.spans import first_decoder_token
from ssd_megatron.data.tokenizers import Tokenizer
from ssd_megatron.inference.cache import pad_in_front
from ssd_megatron.inference.generate import generate
from ssd_megatron.inference.marks import MarkedTokenizer
from ssd_megatron.inference.sampling import Sampling
from ssd_megatron.inference.steps import Continues
from ssd_megatron.inference.t5 import EncoderDecoder

UNFINISHED = "\ufffd"  # what tokenizers show for bytes that are no whole character


class Vocabulary(Protocol):
    """What texts are made of, of a `Tokenizer` or a `MarkedTokenizer`."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def eod(self) -> int: ...
    def decode(self, ids: list[int]) -> str: ...


class Piece(NamedTuple):
    """Some text of one of several texts, after so many tokens of it; `ended`: its last one."""

    number: int
    text: str
    tokens: int
    ended: bool


class TextStream:
    """Turns one text's tokens into pieces of text.

    Args:
        before: tokens that the text begins with; they are not shown, but a tokenizer may need them for spaces.
        stop: the text ends before the first of these strings.

    Attributes:
        stopped: a stop string was found.
    """

    def __init__(self, tokenizer: Vocabulary, before: Sequence[int] = (), stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        # The last tokens, which new ones are decoded together with, and how many of them have been shown.
        self._ids = list(before[-1:])
        self._shown = len(self._ids)
        self._stop = [string for string in stop if string]
        self._held = ""  # may be the beginning of a stop string
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that is certain now."""
        self._ids.append(token)
        text = self._new_text()
        if text.endswith(UNFINISHED):
            return ""
        self._ids, self._shown = self._ids[self._shown :], len(self._ids) - self._shown
        return self._until_stop(text)

    def finish(self) -> str:
        """The rest, whole characters or not."""
        if self.stopped:
            return ""
        text = self._until_stop(self._new_text() if self._shown < len(self._ids) else "")
        rest = "" if self.stopped else self._held
        self._held = ""
        return text + rest

    def _new_text(self) -> str:
        before = self._tokenizer.decode(self._ids[: self._shown])
        return self._tokenizer.decode(self._ids)[len(before) :]

    def _until_stop(self, text: str) -> str:
        text, self._held = self._held + text, ""
        found = [place for string in self._stop if (place := text.find(string)) >= 0]
        if found:
            self.stopped = True
            return text[: min(found)]
        held = max((_overlap(text, string) for string in self._stop), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def complete(
    model: Continues,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    sampling: Sampling,
    max_new_tokens: int,
    stop: Sequence[str] = (),
) -> Iterator[Piece]:
    """Continue texts; an empty prompt begins a document.

    Args:
        prompts: texts, continued together.
        max_new_tokens: most tokens of each.
        stop: a text ends before the first of these strings.
    Returns:
        pieces of all texts, as they come.
    Raises:
        ConfigError: see `generate`.
    """
    ids = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    return complete_tokens(model, tokenizer, ids, sampling, max_new_tokens, stop)


def prompt_ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Tokens that a text to be continued begins with, at least one."""
    return tokenizer.encode(prompt) or [tokenizer.eod]


def answer(
    model: EncoderDecoder,
    tokenizer: MarkedTokenizer,
    prompts: Sequence[str],
    sampling: Sampling,
    max_new_tokens: int,
    stop: Sequence[str] = (),
) -> Iterator[Piece]:
    """What T5's decoder says to texts: of those with sentinels, what these stand for.

    Args:
        tokenizer: see `t5_tokenizer`.
    """
    decoder = model.encode(*pad_in_front([tokenizer.encode(prompt) for prompt in prompts], model.device))
    starts = [[first_decoder_token(model.config, tokenizer.eod)]] * len(prompts)
    yield from complete_tokens(decoder, tokenizer, starts, sampling, max_new_tokens, stop)


def complete_tokens(
    model: Continues,
    tokenizer: Vocabulary,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    max_new_tokens: int,
    stop: Sequence[str] = (),
) -> Iterator[Piece]:
    """As `complete` of texts that are tokens already, at least one each."""
    streams = [TextStream(tokenizer, prompt, stop) for prompt in prompts]
    counts, ended = [0] * len(prompts), set[int]()
    steps = generate(
        model,
        prompts,
        sampling,
        max_new_tokens,
        eod=tokenizer.eod,
        vocab_size=min(tokenizer.vocab_size, model.config.vocab_size),
        ended=ended,
    )
    for tokens in steps:
        for index, token in enumerate(tokens):
            if token is None:
                continue
            counts[index] += 1
            stream = streams[index]
            text = "" if token == tokenizer.eod else stream.push(token)
            last = token == tokenizer.eod or stream.stopped or counts[index] == max_new_tokens
            if last:
                text += stream.finish()
                ended.add(index)
            if text or last:
                yield Piece(index, text, counts[index], last)


def _overlap(text: str, string: str) -> int:
    """Characters at the end of `text` that are the beginning of `string`, not all of it."""
    return next((n for n in range(min(len(text), len(string) - 1), 0, -1) if text.endswith(string[:n])), 0)
