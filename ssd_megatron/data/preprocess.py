"""Documents to tokens: a Megatron IndexedDataset (.bin and .idx) and beside it a .json that says what it is."""

import contextlib
import json
import multiprocessing
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from ssd_megatron.data.documents import Document
from ssd_megatron.data.tokenizers import Tokenizer, load_tokenizer
from ssd_megatron.errors import DataError
from ssd_megatron.files import sha256_of, write_atomically

BATCH_CHARACTERS = 1 << 18  # text sent to a worker at once: enough to hide the cost of sending
BATCHES_AHEAD = 4  # per worker; bounds the memory however fast documents come
SECONDS_BETWEEN_LINES = 10.0  # of progress, where there is no terminal


@dataclass(frozen=True)
class CorpusInfo:
    """What `<prefix>.json` records of a corpus; checks compare it with the configuration."""

    documents: int
    tokens: int
    text_bytes: int
    dtype: str
    eod: int
    vocab_size: int
    tokenizer: str
    tokenizer_sha256: str


@dataclass(frozen=True)
class _Batch:
    texts: list[str]
    input_bytes: int


@dataclass(frozen=True)
class _TokenBatch:
    ids: list[npt.NDArray[np.integer]]
    text_bytes: int
    input_bytes: int


@dataclass(frozen=True)
class _TokenizeJob:
    """What a worker must know; the hash makes a tokenizer file that changed another job."""

    tokenizer_path: Path
    tokenizer_sha256: str
    dtype: type[np.integer]


@dataclass(frozen=True)
class _Totals:
    documents: int
    tokens: int
    text_bytes: int


def corpus_files(prefix: Path) -> tuple[Path, Path, Path]:
    """The files of a corpus: .bin (tokens), .idx (where documents lie) and .json (CorpusInfo)."""
    return Path(f"{prefix}.bin"), Path(f"{prefix}.idx"), Path(f"{prefix}.json")


def preprocess(
    documents: Iterable[Document],
    *,
    tokenizer_path: Path,
    prefix: Path,
    total_bytes: int,
    workers: int,
    overwrite: bool = False,
    console: Console,
) -> CorpusInfo:
    """Tokenise documents, each followed by the tokenizer's end of document, into `<prefix>.bin`, `.idx` and `.json`.

    The order of the documents stays; empty ones are left out. The files appear under their names only when all are
    complete: .idx, without which nothing reads a corpus, is renamed last and removed first.

    Args:
        documents: read once, in this process.
        total_bytes: sum of the documents' input_bytes, for the progress bar.
        workers: processes that tokenise; 1 tokenises here.
        overwrite: replace an existing corpus instead of refusing.
        console: where progress and, at the end, the speed are written.
    Raises:
        DataError: the output exists, there is no document, or the tokenizer cannot be used.
    """
    bin_path, idx_path, info_path = corpus_files(prefix)
    existing = [str(path) for path in (bin_path, idx_path, info_path) if path.exists()]
    if existing and not overwrite:
        raise DataError(f"{', '.join(existing)} exists already: choose another output, or overwrite it (--overwrite)")
    tokenizer = load_tokenizer(tokenizer_path)
    job = _TokenizeJob(tokenizer_path, sha256_of(tokenizer_path), DType.optimal_dtype(tokenizer.vocab_size))
    prefix.parent.mkdir(parents=True, exist_ok=True)
    partial_bin, partial_idx, _ = corpus_files(prefix.with_name(f"{prefix.name}.partial"))
    start = time.perf_counter()
    try:
        batches = _tokenize_all(_batches(documents), job, workers)
        with _progress(console, total_bytes) as advance:
            totals = _write(batches, partial_bin, partial_idx, job.dtype, advance)
        if totals.documents == 0:
            raise DataError(f"there is no document to write to {prefix}")
        info = CorpusInfo(
            documents=totals.documents,
            tokens=totals.tokens,
            text_bytes=totals.text_bytes,
            dtype=np.dtype(job.dtype).name,
            eod=tokenizer.eod,
            vocab_size=tokenizer.vocab_size,
            tokenizer=str(tokenizer_path),
            tokenizer_sha256=job.tokenizer_sha256,
        )
        idx_path.unlink(missing_ok=True)
        partial_bin.replace(bin_path)
        write_atomically(info_path, json.dumps(asdict(info), indent=2).encode() + b"\n")
        partial_idx.replace(idx_path)
    finally:
        partial_bin.unlink(missing_ok=True)
        partial_idx.unlink(missing_ok=True)
    seconds = time.perf_counter() - start
    megabytes = info.text_bytes / 1e6
    console.print(
        f"{prefix}: {info.documents:,} documents, {info.tokens:,} tokens, {megabytes:,.1f} MB of text in "
        f"{seconds:.1f} s ({info.documents / seconds:,.0f} documents/s, {megabytes / seconds:,.2f} MB/s)",
        soft_wrap=True,
        highlight=False,
        markup=False,
    )
    return info


def read_corpus_info(prefix: Path) -> CorpusInfo | None:
    """What was recorded beside a corpus; None for one that other tools made.

    Raises:
        DataError: the record is damaged.
    """
    _, _, info_path = corpus_files(prefix)
    if not info_path.exists():
        return None
    try:
        return CorpusInfo(**json.loads(info_path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise DataError(f"{info_path} is damaged ({error}): preprocess the corpus again") from error


def _batches(documents: Iterable[Document]) -> Iterator[_Batch]:
    texts: list[str] = []
    characters = input_bytes = 0
    for document in documents:
        input_bytes += document.input_bytes
        if not document.text:
            continue
        texts.append(document.text)
        characters += len(document.text)
        if characters >= BATCH_CHARACTERS:
            yield _Batch(texts, input_bytes)
            texts, characters, input_bytes = [], 0, 0
    if texts:
        yield _Batch(texts, input_bytes)


def _tokenize_all(batches: Iterator[_Batch], job: _TokenizeJob, workers: int) -> Iterator[_TokenBatch]:
    """The batches tokenised, in their order."""
    if workers <= 1:
        for batch in batches:
            yield _tokenize(batch, job)
        return
    # Forked, because a fresh interpreter would import torch again for each worker.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("fork")) as pool:
        waiting: deque[Future[_TokenBatch]] = deque()
        for batch in batches:
            waiting.append(pool.submit(_tokenize, batch, job))
            if len(waiting) >= BATCHES_AHEAD * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _tokenize(batch: _Batch, job: _TokenizeJob) -> _TokenBatch:
    tokenizer = _tokenizer_of_process(job)
    return _TokenBatch(
        ids=[np.array([*tokenizer.encode(text), tokenizer.eod], dtype=job.dtype) for text in batch.texts],
        text_bytes=sum(len(text.encode()) for text in batch.texts),
        input_bytes=batch.input_bytes,
    )


@lru_cache(maxsize=1)
def _tokenizer_of_process(job: _TokenizeJob) -> Tokenizer:
    return load_tokenizer(job.tokenizer_path)


def _write(
    batches: Iterable[_TokenBatch],
    bin_path: Path,
    idx_path: Path,
    dtype: type[np.integer],
    advance: Callable[[int, int], None],
) -> _Totals:
    builder = IndexedDatasetBuilder(str(bin_path), dtype=dtype)
    documents = tokens = text_bytes = 0
    with contextlib.closing(builder.data_file):
        for batch in batches:
            for ids in batch.ids:
                builder.add_document(ids, [len(ids)])
                tokens += len(ids)
            documents += len(batch.ids)
            text_bytes += batch.text_bytes
            advance(documents, batch.input_bytes)
        builder.finalize(str(idx_path))
    return _Totals(documents, tokens, text_bytes)


@contextlib.contextmanager
def _progress(console: Console, total_bytes: int) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal, else a line now and then; call what it gives with documents so far and new input bytes."""
    if console.is_terminal:
        columns = (
            TextColumn("{task.fields[documents]:,} documents"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task("tokenising", total=total_bytes, documents=0)
            yield lambda documents, new_bytes: bar.update(task, advance=new_bytes, documents=documents)
        return

    done = 0
    start = last_line = time.perf_counter()

    def advance(documents: int, new_bytes: int) -> None:
        nonlocal done, last_line
        done += new_bytes
        now = time.perf_counter()
        if now - last_line >= SECONDS_BETWEEN_LINES:
            last_line = now
            speed = done / 1e6 / (now - start)
            console.print(f"{documents:,} documents, {done / max(1, total_bytes):.0%} of the input, {speed:.2f} MB/s")

    yield advance
