"""A Megatron IndexedDataset on disk, opened with every check that reading its index allows.

Layout of .idx: magic (9 bytes), version (u64 = 1), dtype code (u8), sequences S (u64), documents + 1 D (u64), lengths
(S x i32), byte offsets (S x i64), first sequence of each document and S (D x i64). The .bin is the tokens alone.
"""

import hashlib
import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ssd_megatron.errors import DataError
from ssd_megatron.files import write_atomically

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPES: dict[int, type[np.integer]] = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}

SCAN_CHUNK = 1 << 25  # tokens
SCAN_WORTH_A_WORD = 1 << 30  # bytes


@dataclass(frozen=True)
class Corpus:
    """An IndexedDataset whose index is sound and whose .bin has the size that the index says.

    Attributes:
        prefix: path without .bin and .idx.
        dtype: of the tokens in .bin.
        lengths: tokens of each sequence, int32; a sequence is a document in corpora made here.
    """

    prefix: str
    dtype: np.dtype[np.integer]
    lengths: npt.NDArray[np.int32]

    @property
    def bin_path(self) -> Path:
        return Path(f"{self.prefix}.bin")

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum(dtype=np.int64))


def open_corpus(prefix: str) -> Corpus:
    """Open a corpus by its prefix.

    Raises:
        DataError: .bin or .idx is missing, .idx is damaged, .bin has not the size that .idx says, or it is empty.
    """
    if prefix.endswith((".bin", ".idx")):
        raise DataError(f"{prefix}: give the path without its suffix, {prefix[:-4]}")
    bin_path, idx_path = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
    missing = [str(path) for path in (bin_path, idx_path) if not path.is_file()]
    if missing:
        raise DataError(f"{' and '.join(missing)} not found: tools/preprocess_data.py --output {prefix} makes them")
    dtype, lengths = _read_index(idx_path)
    corpus = Corpus(prefix, dtype, lengths)
    if corpus.tokens == 0:
        raise DataError(f"{prefix} is empty: {len(lengths):,} documents, 0 tokens")
    size, expected = bin_path.stat().st_size, corpus.tokens * dtype.itemsize
    if size != expected:
        state = "truncated" if size < expected else "too long"
        raise DataError(
            f"{bin_path} is {state}: {size:,} bytes, but {idx_path.name} says {corpus.tokens:,} tokens x "
            f"{dtype.itemsize} bytes = {expected:,}: copy both files again, or preprocess again"
        )
    return corpus


def token_range(
    corpus: Corpus, cache_dir: Path, report: Callable[[str], None], at_work: Callable[[], None]
) -> tuple[int, int]:
    """Smallest and largest token id of a corpus.

    Reads all of .bin once; the result is kept in `cache_dir` for as long as path, size and time of the file stay.

    Args:
        at_work: is called after each part of the file.
    Raises:
        DataError: it cannot be kept there.
    """
    stat = corpus.bin_path.stat()
    identity = f"{corpus.bin_path.resolve()} {stat.st_size} {stat.st_mtime_ns}"
    cached = cache_dir / f"token_range-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.json"
    if cached.exists():
        smallest, largest = json.loads(cached.read_text())
        return int(smallest), int(largest)
    if stat.st_size > SCAN_WORTH_A_WORD:
        report(f"{corpus.bin_path}: looking at all {corpus.tokens:,} token ids, once")
    tokens = np.memmap(corpus.bin_path, dtype=corpus.dtype, mode="r")
    smallest = largest = int(tokens[0])
    for start in range(0, len(tokens), SCAN_CHUNK):
        chunk = tokens[start : start + SCAN_CHUNK]
        smallest, largest = min(smallest, int(chunk.min())), max(largest, int(chunk.max()))
        at_work()
    try:
        write_atomically(cached, json.dumps([smallest, largest]).encode())
    except OSError as error:
        raise DataError(f"data.cache_dir: {cached} cannot be written: {error}") from error
    return smallest, largest


def _read_index(path: Path) -> tuple[np.dtype[np.integer], npt.NDArray[np.int32]]:
    size = path.stat().st_size
    with path.open("rb") as stream:
        header = stream.read(HEADER.size)
    if len(header) < HEADER.size or not header.startswith(MAGIC):
        raise DataError(f"{path} is damaged: it has no IndexedDataset header")
    _, version, code, sequences, documents = HEADER.unpack(header)
    if version != 1 or code not in DTYPES:
        raise DataError(f"{path} is damaged or no token corpus: version {version}, dtype code {code}")
    expected = HEADER.size + sequences * (4 + 8) + documents * 8
    if size != expected:
        raise DataError(
            f"{path} is damaged: {size:,} bytes, but its header says {sequences:,} sequences and "
            f"{documents - 1:,} documents, which take {expected:,}"
        )
    dtype = np.dtype(DTYPES[code])
    body = np.memmap(path, mode="r", dtype=np.uint8)[HEADER.size :]
    lengths = body[: 4 * sequences].view(np.int32)
    offsets = body[4 * sequences : 12 * sequences].view(np.int64)
    firsts = body[12 * sequences :].view(np.int64)
    ends = np.cumsum(lengths, dtype=np.int64) * dtype.itemsize
    if (
        (sequences and lengths.min() < 0)
        or not np.array_equal(offsets, ends - lengths.astype(np.int64) * dtype.itemsize)
        or documents < 1
        or firsts[-1] != sequences
    ):
        raise DataError(f"{path} is damaged: its lengths, offsets and documents contradict each other")
    return dtype, lengths


def make_cache_dir(path: Path) -> None:
    """Make the folder of the index cache, or a folder in it.

    Raises:
        DataError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"data.cache_dir: the folder {path} cannot be made: {error}") from error
