import json
from pathlib import Path
from typing import Literal

import pyarrow
import pyarrow.parquet
import pytest

from ssd_megatron.data.documents import DocumentReader, find_inputs
from ssd_megatron.errors import DataError


def read(*paths: Path, format: Literal["auto", "text"] = "auto", key: str = "text") -> tuple[list[str], list[str]]:
    """Texts of the documents, and what was reported about broken records."""
    reports: list[str] = []
    reader = DocumentReader(find_inputs(paths, format), key=key, report=reports.append)
    texts = [document.text for document in reader]
    assert reader.broken == len(reports)
    return texts, reports


def write_parquet(path: Path, **columns: pyarrow.Array | list[object]) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def test_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "one\\n\\ttwo", "body": "b1"}\r\n\n{"text": "\xc3\xbc", "body": "b2"}')
    assert read(path) == (["one\n\ttwo", "ü"], [])
    assert read(path, key="body") == (["b1", "b2"], [])


BROKEN_LINES = {
    b'{"text": "a"': "broken JSON: Expecting ',' delimiter at column 13",
    b'{"text": "\xff"}': "not UTF-8: invalid start byte at byte 10",
    b'{"txt": "a", "id": 1}': "no key \"text\" among ['id', 'txt']",
    b'{"text": 7}': '"text" is int, not text',
    b'{"text": null}': '"text" is NoneType, not text',
    b'["text"]': "a JSON list, not an object",
    b'{"text": "\\ud800"}': '"text" has a lone surrogate, which is not Unicode text',
}


def test_broken_json_lines_are_reported_by_line_and_skipped(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "first"}\n' + b"\n".join(BROKEN_LINES) + b'\n{"text": "last"}\n')
    texts, reports = read(path)
    assert texts == ["first", "last"]
    assert reports == [f"{path}:{line}: {why}; skipped" for line, why in enumerate(BROKEN_LINES.values(), start=2)]


def test_deeply_nested_json_is_a_broken_record(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("[" * 100_000 + '\n{"text": "last"}\n')
    texts, reports = read(path)
    assert texts == ["last"]
    assert reports == [f"{path}:1: broken JSON: nested too deeply; skipped"]


@pytest.mark.parametrize("line", BROKEN_LINES)
def test_a_broken_line_is_fatal_if_asked(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "first"}\n' + line + b"\n")
    with pytest.raises(DataError) as error:
        list(DocumentReader(find_inputs([path]), on_error="fail"))
    assert str(error.value) == f"{path}:2: {BROKEN_LINES[line]}"


def test_a_text_file_is_a_document(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\r\n\n\ttwo \xc3\xbc\n")
    assert read(path) == (["one\r\n\n\ttwo ü\n"], [])


def test_a_folder_of_texts_is_sorted_and_without_hidden_files(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.py", "a/b", ".hidden", ".git/config"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert read(tmp_path) == (["a/b", "a/z.py", "b.txt"], [])


def test_bad_utf8_in_a_text_file_names_its_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\ntwo\nthr\xffee\n")
    (tmp_path / "b.txt").write_text("fine")
    texts, reports = read(tmp_path)
    assert texts == ["fine"]
    assert reports == [f"{tmp_path}/a.txt:3: not UTF-8: invalid start byte at byte 11; skipped"]


def test_parquet(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", text=["one", None, "three"], body=["b1", "b2", "b3"])
    assert read(path, key="body") == (["b1", "b2", "b3"], [])
    texts, reports = read(path)
    assert texts == ["one", "three"]
    assert reports == [f'{path}:2: column "text" is NoneType, not text; skipped']


def test_parquet_without_the_column(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", body=["b1"], id=[1])
    assert read(path) == ([], [f"{path}:1: no column \"text\" among ['body', 'id']; skipped"])
    assert read(path, key="id") == ([], [f'{path}:1: column "id" is int, not text; skipped'])


def test_parquet_with_bad_utf8(tmp_path: Path) -> None:
    offsets, data = pyarrow.py_buffer(bytes([0, 0, 0, 0, 2, 0, 0, 0])), pyarrow.py_buffer(b"\xff\xfe")
    column = pyarrow.Array.from_buffers(pyarrow.string(), 1, [None, offsets, data])
    path = write_parquet(tmp_path / "a.parquet", text=column)
    assert read(path) == ([], [f"{path}:1: not UTF-8: invalid start byte at byte 0; skipped"])


def test_damaged_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 nothing here")
    texts, reports = read(path)
    assert texts == []
    assert reports[0].startswith(f"{path}:1: cannot be read as parquet from here on: Parquet magic bytes not found")


def test_format_overrides_the_suffix(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"text": "one"}')
    assert read(path) == (["one"], [])
    assert read(path, format="text") == (['{"text": "one"}'], [])


def test_several_inputs_keep_their_order_and_add_up(tmp_path: Path) -> None:
    (tmp_path / "z.jsonl").write_text(json.dumps({"text": "json"}) + "\n")
    (tmp_path / "a.txt").write_text("text")
    write_parquet(tmp_path / "m.parquet", text=["parquet"])
    paths = [tmp_path / name for name in ("z.jsonl", "m.parquet", "a.txt")]
    assert read(*paths) == (["json", "parquet", "text"], [])
    reader = DocumentReader(find_inputs(paths))
    assert reader.total_bytes == sum(path.stat().st_size for path in paths)
    assert sum(document.input_bytes for document in reader) == reader.total_bytes


def test_missing_inputs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"input .*/nothing\.jsonl does not exist"):
        find_inputs([tmp_path / "nothing.jsonl"])
    with pytest.raises(DataError, match="is a folder without files"):
        find_inputs([tmp_path])
