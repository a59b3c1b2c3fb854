"""Everything that can be wrong with the data, found before anything expensive is made."""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

from ssd_megatron.config.schema import DataConfig
from ssd_megatron.data.blends import SplitSource, split_sources
from ssd_megatron.data.corpus import Corpus, make_cache_dir, open_corpus, token_range
from ssd_megatron.data.preprocess import read_corpus_info
from ssd_megatron.data.tokenizers import Tokenizer
from ssd_megatron.errors import DataError
from ssd_megatron.files import sha256_of


@dataclass(frozen=True)
class Demand:
    """What one split must give: `steps` batches of `batch_size` samples of `text_length` tokens."""

    name: str
    steps: int
    steps_field: str
    batch_size: int
    text_length: int

    @property
    def samples(self) -> int:
        return self.steps * self.batch_size

    @property
    def arithmetic(self) -> str:
        return f"{self.steps_field} {self.steps:,} x train_batch_size {self.batch_size:,} = {self.samples:,}"


def check_data(
    data: DataConfig,
    *,
    tokenizer: Tokenizer,
    model_vocab_size: int,
    text_length: int,
    global_batch_size: int,
    train_steps: int,
    eval_steps: int,
    test_steps: int = 0,
    cache_dir: Path,
    report: Callable[[str], None],
    at_work: Callable[[], None],
) -> None:
    """Refuse data that cannot carry the run. Needs no process group; several ranks may call it at the same time.

    Training may repeat documents, which is reported with the number of epochs; validation and test may not.

    Args:
        text_length: tokens of text in a sample.
        eval_steps: validation batches; the same ones in each evaluation.
        the others: see check_tokens.
    Raises:
        DataError: as check_tokens; too few samples, with the arithmetic.
    """
    corpora = check_tokens(data, tokenizer, model_vocab_size, cache_dir, report, at_work)
    sources = split_sources(data)
    demands = (
        (sources.train, Demand("training", train_steps, "training.train_steps", global_batch_size, text_length)),
        (sources.valid, Demand("validation", eval_steps, "training.eval_steps", global_batch_size, text_length)),
        (sources.test, Demand("test", test_steps, "test steps", global_batch_size, text_length)),
    )
    for source, demand in demands:
        if demand.samples > 0:
            _check_samples(source, demand, corpora, data, report)


def check_tokens(
    data: DataConfig,
    tokenizer: Tokenizer,
    model_vocab_size: int,
    cache_dir: Path,
    report: Callable[[str], None],
    at_work: Callable[[], None] = lambda: None,
) -> dict[str, Corpus]:
    """Refuse corpora and a tokenizer that do not belong to each other, or to the model; returns the corpora by prefix.

    Looks at every token id of a corpus once and keeps the answer in `cache_dir`.

    Args:
        model_vocab_size: model.vocab_size, before padding.
        report: receives lines that the user should see once.
        at_work: is called again and again while a corpus is read.
    Raises:
        DataError: a missing, truncated, damaged or empty corpus; a tokenizer that is too large for the model or did
            not make the corpus; token ids out of range.
    """
    check_vocabulary(tokenizer, data.tokenizer, model_vocab_size)
    make_cache_dir(cache_dir)
    sources = split_sources(data)
    corpora = {
        prefix: open_corpus(prefix)
        for source in (sources.train, sources.valid, sources.test)
        if source is not None
        for prefix in source.prefixes
    }
    for corpus in corpora.values():
        check_made_with(corpus, data.tokenizer)
        check_ids(corpus, token_range(corpus, cache_dir, report, at_work), tokenizer)
    return corpora


def check_vocabulary(tokenizer: Tokenizer, path: Path, vocab_size: int) -> None:
    """Refuse a tokenizer for a model of another vocabulary.

    Args:
        vocab_size: model.vocab_size, before padding.
    Raises:
        DataError: it has more tokens than the model.
    """
    if tokenizer.vocab_size > vocab_size:
        raise DataError(
            f"tokenizer {path} has {tokenizer.vocab_size:,} tokens, more than model.vocab_size ({vocab_size:,}): give "
            "the one that made the model's training data, or, for a new model, set model.vocab_size to "
            f"{tokenizer.vocab_size} or more"
        )


def check_made_with(corpus: Corpus, tokenizer_path: Path) -> None:
    """Raises DataError if another tokenizer made a corpus, as far as that was recorded."""
    info = read_corpus_info(Path(corpus.prefix))
    if info is not None and info.tokenizer_sha256 != sha256_of(tokenizer_path):
        raise DataError(
            f"{corpus.prefix} was made with the tokenizer {info.tokenizer} ({info.vocab_size:,} tokens), not with "
            f"tokenizer {tokenizer_path}: preprocess it again, or give the one that made it if it is the model's"
        )


def check_ids(corpus: Corpus, ids: Collection[int], tokenizer: Tokenizer) -> None:
    """Raises DataError if ids of a corpus, all or the smallest and the largest, are none of a tokenizer."""
    smallest, largest = min(ids, default=0), max(ids, default=0)
    if smallest < 0 or largest >= tokenizer.vocab_size:
        raise DataError(
            f"{corpus.bin_path} has token ids from {smallest} to {largest}, but the tokenizer has only the ids 0 to "
            f"{tokenizer.vocab_size - 1}: it was made with another tokenizer"
        )


def _check_samples(
    source: SplitSource | None,
    demand: Demand,
    corpora: dict[str, Corpus],
    data: DataConfig,
    report: Callable[[str], None],
) -> None:
    if source is None:
        given = f'data.split ("{data.split}") leaves it none' if data.paths is not None else "no paths are given for it"
        raise DataError(f"{demand.name} needs {demand.arithmetic} samples, but {given}")
    chosen = [corpora[prefix] for prefix in source.prefixes]
    if sum(source.tokens_in(corpus) for corpus in chosen) == 0:
        raise DataError(f"{source.field} has no documents for {demand.name}: {_what_helps(source, demand)}")
    for corpus, weight in zip(chosen, source.normalized_weights(chosen), strict=True):
        tokens = source.tokens_in(corpus)
        documents = len(corpus.lengths[source.document_range(corpus)])
        available = max(0, tokens - 1) // demand.text_length
        needed = math.ceil(demand.samples * weight)
        have = (
            f"{source.field}: {corpus.prefix} has {available:,} {demand.name} samples of {demand.text_length:,} tokens "
            f"({tokens:,} tokens in {documents:,} documents)"
        )
        need = f"{demand.name} needs {demand.arithmetic}"
        if len(chosen) > 1:
            need += f", {needed:,} of them from here (weight {weight:.3g})"
        if available == 0 or (demand.name != "training" and available < needed):
            raise DataError(f"{have}; {need}: {_what_helps(source, demand)}")
        if available < needed:
            report(f"{have}; {need}: its documents are repeated, {needed / available:.1f} epochs")


def _what_helps(source: SplitSource, demand: Demand) -> str:
    larger_share = "give it a larger share in data.split, " if source.field == "data.paths" else ""
    return f"lower {demand.steps_field} or train_batch_size, {larger_share}or add data"
