import io
import json
import multiprocessing
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from rich.console import Console

from ssd_megatron.data import preprocess as preprocess_module
from ssd_megatron.data.corpus import open_corpus
from ssd_megatron.data.documents import Document
from ssd_megatron.data.preprocess import CorpusInfo, preprocess, read_corpus_info
from ssd_megatron.data.tokenizers import load_tokenizer
from ssd_megatron.errors import DataError
from ssd_megatron.files import sha256_of
from tests.data.conftest import TEXTS
from tests.data.test_tokenizers import write_word_level


def run(texts: list[str], prefix: Path, tokenizer: Path, workers: int = 1, **options: bool) -> CorpusInfo:
    return preprocess(
        (Document(text, len(text.encode())) for text in texts),
        tokenizer_path=tokenizer,
        prefix=prefix,
        total_bytes=sum(len(text.encode()) for text in texts),
        workers=workers,
        console=Console(file=io.StringIO()),
        **options,
    )


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("fixture", ["sentencepiece_model", "hugging_face_json"])
def test_documents_come_back_with_their_end(fixture: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(fixture)
    texts = [*TEXTS[:5], "ü 中", ""]
    info = run(texts, tmp_path / "c", path)
    tokenizer = load_tokenizer(path)
    dataset = IndexedDataset(str(tmp_path / "c"))
    assert [list(ids) for ids in dataset[:]] == [[*tokenizer.encode(text), tokenizer.eod] for text in texts if text]
    assert list(dataset.document_indices) == list(range(7))
    assert dataset.index.dtype == np.uint16
    assert info == CorpusInfo(
        documents=6,
        tokens=int(dataset.sequence_lengths.sum()),
        text_bytes=sum(len(text.encode()) for text in texts),
        dtype="uint16",
        eod=tokenizer.eod,
        vocab_size=tokenizer.vocab_size,
        tokenizer=str(path),
        tokenizer_sha256=sha256_of(path),
    )
    assert read_corpus_info(tmp_path / "c") == info


def test_large_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    path = write_word_level(tmp_path / "t.json", {"a": 0, "b": 70_000, "</s>": 65_499})
    info = run(["b"], tmp_path / "c", path)
    assert info.dtype == "int32"
    dataset = IndexedDataset(str(tmp_path / "c"))  # kept: mcore unmaps the file with it, under any array read from it
    assert list(dataset[0]) == [70_000, 65_499]


def test_workers_do_not_change_the_output(
    tmp_path: Path, sentencepiece_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preprocess_module, "BATCH_CHARACTERS", 500)  # some 30 batches, more than are sent ahead
    for workers in (1, 3):
        (tmp_path / str(workers)).mkdir()
        run(TEXTS, tmp_path / str(workers) / "c", sentencepiece_model, workers=workers)
    assert files_of(tmp_path / "1") == files_of(tmp_path / "3")


def test_existing_output_is_refused_or_overwritten(
    tmp_path: Path, sentencepiece_model: Path, hugging_face_json: Path
) -> None:
    run(TEXTS[:3], tmp_path / "c", sentencepiece_model)
    before = files_of(tmp_path)
    with pytest.raises(DataError, match=r"c\.bin, .*c\.idx, .*c\.json exists already: .* \(--overwrite\)"):
        run(TEXTS[:4], tmp_path / "c", sentencepiece_model)
    assert files_of(tmp_path) == before
    assert run(TEXTS[:4], tmp_path / "c", hugging_face_json, overwrite=True).documents == 4
    assert len(IndexedDataset(str(tmp_path / "c"))) == 4


def test_a_failure_between_the_renames_leaves_no_index(
    tmp_path: Path, sentencepiece_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path, content: bytes) -> None:
        raise OSError("disk full")

    run(TEXTS[:3], tmp_path / "c", sentencepiece_model)
    monkeypatch.setattr(preprocess_module, "write_atomically", fail)
    with pytest.raises(OSError, match="disk full"):
        run(TEXTS[:4], tmp_path / "c", sentencepiece_model, overwrite=True)
    with pytest.raises(DataError, match=r"c\.idx not found"):  # not the new tokens under the old index
        open_corpus(str(tmp_path / "c"))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_failure_leaves_what_was_there(tmp_path: Path, sentencepiece_model: Path, workers: int) -> None:
    def documents() -> Iterator[Document]:
        yield from (Document(text, 1) for text in TEXTS)
        raise DataError("file:2: broken")

    run(TEXTS[:3], tmp_path / "c", sentencepiece_model)
    before = files_of(tmp_path)
    with pytest.raises(DataError, match="file:2: broken"):
        preprocess(
            documents(),
            tokenizer_path=sentencepiece_model,
            prefix=tmp_path / "c",
            total_bytes=1,
            workers=workers,
            overwrite=True,
            console=Console(file=io.StringIO()),
        )
    assert files_of(tmp_path) == before


def test_a_killed_run_leaves_no_output(tmp_path: Path, sentencepiece_model: Path) -> None:
    def killed() -> None:
        def documents() -> Iterator[Document]:
            yield Document("x" * preprocess_module.BATCH_CHARACTERS, 1)
            yield Document("x" * preprocess_module.BATCH_CHARACTERS, 1)
            os.kill(os.getpid(), signal.SIGKILL)

        preprocess(
            documents(),
            tokenizer_path=sentencepiece_model,
            prefix=tmp_path / "c",
            total_bytes=1,
            workers=1,
            console=Console(file=io.StringIO()),
        )

    process = multiprocessing.get_context("fork").Process(target=killed)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert list(files_of(tmp_path)) == ["c.partial.bin"]
    assert run(TEXTS, tmp_path / "c", sentencepiece_model).documents == len(TEXTS)
    assert sorted(files_of(tmp_path)) == ["c.bin", "c.idx", "c.json"]


def test_no_documents_are_refused(tmp_path: Path, sentencepiece_model: Path) -> None:
    with pytest.raises(DataError, match=r"there is no document to write to .*/c"):
        run(["", ""], tmp_path / "c", sentencepiece_model)
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_that_changed_is_read_again(
    tmp_path: Path, sentencepiece_model: Path, hugging_face_json: Path
) -> None:
    path = tmp_path / "t.json"
    path.write_bytes(hugging_face_json.read_bytes())
    run(TEXTS[:1], tmp_path / "a", path)
    write_word_level(path, {"a": 0, "</s>": 1})
    assert run(TEXTS[:1], tmp_path / "b", path).tokens == 2


def test_speed_is_reported(tmp_path: Path, sentencepiece_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")  # what the tests run in may be a dumb one
    monkeypatch.setattr(preprocess_module, "SECONDS_BETWEEN_LINES", 0.0)
    lines, bar = io.StringIO(), io.StringIO()
    for name, file in (("a", lines), ("b", bar)):
        preprocess(
            [Document(text, 10) for text in TEXTS],
            tokenizer_path=sentencepiece_model,
            prefix=tmp_path / name,
            total_bytes=10 * len(TEXTS),
            workers=1,
            console=Console(file=file, width=200, force_terminal=file is bar),
        )
    first, last = lines.getvalue().splitlines()
    assert first.startswith("300 documents, 100% of the input, ")
    assert last.startswith(f"{tmp_path}/a: 300 documents, ")
    assert "documents/s, " in last
    assert last.endswith(" MB/s)")
    assert "300 documents" in bar.getvalue()
    assert "━" in bar.getvalue()


def test_a_damaged_record_is_refused(tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text(json.dumps({"documents": 3}))
    with pytest.raises(DataError, match=r"c\.json is damaged .*preprocess the corpus again"):
        read_corpus_info(tmp_path / "c")
    assert read_corpus_info(tmp_path / "other") is None
