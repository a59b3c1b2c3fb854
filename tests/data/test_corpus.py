import os
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ssd_megatron.data.corpus import open_corpus, token_range
from ssd_megatron.errors import DataError

MakeCorpus = Callable[..., Path]
DOCUMENTS = [[1, 2, 3], [4], [5, 6, 7, 8]]


def test_a_sound_corpus(make_corpus: MakeCorpus) -> None:
    corpus = open_corpus(str(make_corpus("c", DOCUMENTS)))
    assert (corpus.tokens, corpus.dtype.name, list(corpus.lengths)) == (8, "uint16", [3, 1, 4])


@pytest.mark.parametrize(("removed", "named"), [([".bin"], "c.bin"), ([".idx"], "c.idx"), ([".bin", ".idx"], "c.idx")])
def test_missing_files(make_corpus: MakeCorpus, removed: list[str], named: str) -> None:
    prefix = make_corpus("c", DOCUMENTS)
    for suffix in removed:
        Path(f"{prefix}{suffix}").unlink()
    with pytest.raises(DataError, match=rf"{named} not found: tools/preprocess_data\.py --output .*/c makes them"):
        open_corpus(str(prefix))


def test_a_suffix_is_refused(make_corpus: MakeCorpus) -> None:
    prefix = make_corpus("c", DOCUMENTS)
    with pytest.raises(DataError, match=rf"give the path without its suffix, {prefix}$"):
        open_corpus(f"{prefix}.bin")


@pytest.mark.parametrize(("size", "state"), [(12, "truncated: 12"), (0, "truncated: 0"), (18, "too long: 18")])
def test_bin_must_have_the_size_that_idx_says(make_corpus: MakeCorpus, size: int, state: str) -> None:
    prefix = make_corpus("c", DOCUMENTS)
    os.truncate(f"{prefix}.bin", size)
    with pytest.raises(DataError, match=rf"c\.bin is {state} bytes, but c\.idx says 8 tokens x 2 bytes = 16"):
        open_corpus(str(prefix))


def patch(path: Path, offset: int, content: bytes) -> None:
    with path.open("r+b") as stream:
        stream.seek(offset)
        stream.write(content)


DAMAGES = {
    "magic": (0, b"nothing", "it has no IndexedDataset header"),
    "version": (9, struct.pack("<Q", 2), "version 2, dtype code 8"),
    "floating point": (17, struct.pack("<B", 7), "version 1, dtype code 7"),
    "sequence count": (18, struct.pack("<Q", 4), r"102 bytes, but its header says 4 sequences and 3 documents.* 114"),
    "length": (34, struct.pack("<i", -3), "contradict each other"),
    "other lengths": (34, struct.pack("<ii", 1, 3), "contradict each other"),
    "offset": (34 + 12 + 8, struct.pack("<q", 7), "contradict each other"),
    "documents": (34 + 36 + 24, struct.pack("<q", 9), "contradict each other"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_index(make_corpus: MakeCorpus, damage: str) -> None:
    prefix = make_corpus("c", DOCUMENTS)
    offset, content, message = DAMAGES[damage]
    patch(Path(f"{prefix}.idx"), offset, content)
    with pytest.raises(DataError, match=rf"c\.idx is damaged.*{message}"):
        open_corpus(str(prefix))


@pytest.mark.parametrize(("size", "message"), [(0, "no IndexedDataset header"), (101, "101 bytes, but .* take 102")])
def test_a_truncated_index(make_corpus: MakeCorpus, size: int, message: str) -> None:
    prefix = make_corpus("c", DOCUMENTS)
    os.truncate(f"{prefix}.idx", size)
    with pytest.raises(DataError, match=rf"c\.idx is damaged: .*{message}"):
        open_corpus(str(prefix))


@pytest.mark.parametrize(("documents", "count"), [([], 0), ([[], []], 2)])
def test_an_empty_corpus(make_corpus: MakeCorpus, documents: list[list[int]], count: int) -> None:
    with pytest.raises(DataError, match=f"c is empty: {count} documents, 0 tokens"):
        open_corpus(str(make_corpus("c", documents)))


@pytest.mark.parametrize("chunk", [1, 3, 1 << 25])
def test_token_range(make_corpus: MakeCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr("ssd_megatron.data.corpus.SCAN_CHUNK", chunk)
    unsigned = open_corpus(str(make_corpus("a", [[5, 65_535], [3, 9]])))
    signed = open_corpus(str(make_corpus("b", [[7, 70_000], [-2]], dtype=np.int32)))
    parts: list[str] = []
    assert token_range(unsigned, tmp_path, print, lambda: parts.append("unsigned")) == (3, 65_535)
    assert token_range(signed, tmp_path, print, lambda: parts.append("signed")) == (-2, 70_000)
    assert (parts.count("unsigned"), parts.count("signed")) == (-(-4 // chunk), -(-3 // chunk))


def test_tokens_are_looked_at_once(
    make_corpus: MakeCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ssd_megatron.data.corpus.SCAN_WORTH_A_WORD", 0)
    prefix = make_corpus("c", DOCUMENTS)
    bin_path = Path(f"{prefix}.bin")
    assert token_range(open_corpus(str(prefix)), tmp_path, print, lambda: None) == (1, 8)
    assert capsys.readouterr().out == f"{bin_path}: looking at all 8 token ids, once\n"
    stat = bin_path.stat()
    patch(bin_path, 0, b"\x63\x00")
    os.utime(bin_path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert token_range(open_corpus(str(prefix)), tmp_path, print, lambda: None) == (1, 8)
    assert capsys.readouterr().out == ""
    os.utime(bin_path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert token_range(open_corpus(str(prefix)), tmp_path, print, lambda: None) == (2, 99)
