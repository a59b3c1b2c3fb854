"""Documents out of JSON lines, plain text and parquet; broken records are named by file and line."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow
import pyarrow.parquet

from ssd_megatron.errors import DataError

Format = Literal["jsonl", "text", "parquet"]

# What `auto` makes of a file's suffix; any other suffix is plain text.
FORMAT_OF_SUFFIX: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
}


@dataclass(frozen=True)
class Document:
    """A text, and the bytes of input that it stands for (progress is measured in them)."""

    text: str
    input_bytes: int


@dataclass(frozen=True)
class BrokenRecord:
    """A record that gives no document: where it is ("file:line") and why."""

    where: str
    reason: str


@dataclass(frozen=True)
class InputFile:
    """A file to read, its format and its size in bytes."""

    path: Path
    format: Format
    size: int


def find_inputs(paths: Sequence[Path], format: Literal["auto"] | Format = "auto") -> list[InputFile]:
    """Files behind the paths given: a folder stands for all files in it and below, sorted, hidden ones left out.

    Raises:
        DataError: a path does not exist, or a folder has no file.
    """
    inputs: list[InputFile] = []
    for path in paths:
        if not path.exists():
            raise DataError(f"input {path} does not exist")
        files = [path] if path.is_file() else _files_below(path)
        if not files:
            raise DataError(f"input {path} is a folder without files")
        for file in files:
            kind = FORMAT_OF_SUFFIX.get(file.suffix, "text") if format == "auto" else format
            inputs.append(InputFile(file, kind, file.stat().st_size))
    return inputs


@dataclass
class DocumentReader:
    """Iterates over the documents of some files, one file after the other.

    Attributes:
        inputs: the files, see find_inputs.
        key: of the text in JSON objects; of the text's column in parquet.
        on_error: skip a broken record, or fail at it.
        report: receives one line for each broken record that is skipped.
        broken: broken records met so far.
    Raises:
        DataError: at a broken record, if on_error is "fail".
    """

    inputs: Sequence[InputFile]
    key: str = "text"
    on_error: Literal["skip", "fail"] = "skip"
    report: Callable[[str], None] = print
    broken: int = 0

    @property
    def total_bytes(self) -> int:
        return sum(file.size for file in self.inputs)

    def __iter__(self) -> Iterator[Document]:
        for file in self.inputs:
            for record in _records(file, self.key):
                if isinstance(record, Document):
                    yield record
                elif self.on_error == "fail":
                    raise DataError(f"{record.where}: {record.reason}")
                else:
                    self.broken += 1
                    self.report(f"{record.where}: {record.reason}; skipped")


def _records(file: InputFile, key: str) -> Iterator[Document | BrokenRecord]:
    match file.format:
        case "jsonl":
            return _read_jsonl(file.path, key)
        case "text":
            return _read_text(file.path)
        case "parquet":
            return _read_parquet(file, key)


def read_objects(path: Path) -> Iterator[tuple[str, dict[str, Any] | BrokenRecord, int]]:
    """JSON objects of a file's lines, blank lines left out: where each one is, itself or what is wrong with it, and the
    bytes of its line."""
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if line.strip():
                where = f"{path}:{number}"
                yield where, _json_object(line, where), len(line)


def _json_object(line: bytes, where: str) -> dict[str, Any] | BrokenRecord:
    try:
        record = json.loads(line.rstrip(b"\r\n").decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return BrokenRecord(where, not_utf8(error))
    except json.JSONDecodeError as error:
        return BrokenRecord(where, f"broken JSON: {error.msg} at column {error.colno}")
    except RecursionError:
        return BrokenRecord(where, "broken JSON: nested too deeply")
    return record if isinstance(record, dict) else BrokenRecord(where, f"a JSON {type(record).__name__}, not an object")


def _read_jsonl(path: Path, key: str) -> Iterator[Document | BrokenRecord]:
    for where, record, size in read_objects(path):
        if isinstance(record, BrokenRecord):
            yield record
        elif key not in record:
            yield BrokenRecord(where, f'no key "{key}" among {sorted(record)}')
        else:
            yield _document(record[key], where, f'"{key}"', size)


def _read_text(path: Path) -> Iterator[Document | BrokenRecord]:
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = content.count(b"\n", 0, error.start) + 1
        yield BrokenRecord(f"{path}:{number}", not_utf8(error))
    else:
        yield Document(text, len(content))


def _read_parquet(file: InputFile, key: str) -> Iterator[Document | BrokenRecord]:
    row = 0
    try:
        table = pyarrow.parquet.ParquetFile(file.path)
        if key not in table.schema_arrow.names:
            yield BrokenRecord(f"{file.path}:1", f'no column "{key}" among {table.schema_arrow.names}')
            return
        bytes_per_row = file.size // max(1, table.metadata.num_rows)
        for batch in table.iter_batches(batch_size=1024, columns=[key]):
            for value in batch.column(0):
                row += 1
                yield _parquet_document(value, f"{file.path}:{row}", f'column "{key}"', bytes_per_row)
    except (pyarrow.ArrowException, OSError) as error:
        yield BrokenRecord(f"{file.path}:{row + 1}", f"cannot be read as parquet from here on: {error}")


def _parquet_document(value: pyarrow.Scalar, where: str, what: str, input_bytes: int) -> Document | BrokenRecord:
    try:
        return _document(value.as_py(), where, what, input_bytes)
    except UnicodeDecodeError as error:
        return BrokenRecord(where, not_utf8(error))


def _document(value: object, where: str, what: str, input_bytes: int) -> Document | BrokenRecord:
    if not isinstance(value, str):
        return BrokenRecord(where, f"{what} is {type(value).__name__}, not text")
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON may spell half of a surrogate pair, which no tokenizer takes
        return BrokenRecord(where, f"{what} has a lone surrogate, which is not Unicode text")
    return Document(value, input_bytes)


def not_utf8(error: UnicodeDecodeError) -> str:
    """In words."""
    return f"not UTF-8: {error.reason} at byte {error.start}"


def _files_below(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
