"""Labelled texts, single ones or pairs: TSV files as GLUE has them (arXiv 1804.07461), or JSON lines."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssd_megatron.data.documents import FORMAT_OF_SUFFIX, BrokenRecord, not_utf8, read_objects
from ssd_megatron.errors import DataError

# What the tasks of GLUE, SNLI and others call their columns; pairs first, whose names contain those of single texts.
TEXT_COLUMNS = (
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("premise", "hypothesis"),
    ("#1 String", "#2 String"),
    ("sentence",),
    ("text",),
)
LABEL_COLUMNS = ("label", "gold_label", "is_duplicate", "Quality")
DISPUTED = ("gold_label", "-")  # of SNLI and MultiNLI, where annotators did not agree


@dataclass(frozen=True)
class Columns:
    """Names of the columns that count: one or two of texts, and that of the label."""

    texts: tuple[str, ...]
    label: str


@dataclass(frozen=True)
class LabelledText:
    """A text, or a pair of texts, its label, and where it is ("file:line")."""

    texts: tuple[str, ...]
    label: str
    where: str


@dataclass(frozen=True)
class _Row:
    where: str
    values: dict[str, Any]


def read_labelled(path: Path, columns: Columns | None = None) -> tuple[Columns, list[LabelledText]]:
    """Read a file: JSON lines if it is named so (.jsonl, .ndjson, .json), else TSV, whose first line names the columns
    and whose tabs all separate.

    Args:
        columns: without, those of TEXT_COLUMNS and LABEL_COLUMNS that the first line has.
    Raises:
        DataError: no such file or no example in it, a broken line, a column that is not there, a label on which
            annotators did not agree.
    """
    if not path.is_file():
        raise DataError(f"{path} does not exist")
    rows = list(_json_rows(path) if FORMAT_OF_SUFFIX.get(path.suffix) == "jsonl" else _tsv_rows(path))
    if not rows:
        raise DataError(f"{path} has no examples")
    columns = columns or find_columns(path, list(rows[0].values))
    return columns, [_labelled(row, columns) for row in rows]


def find_columns(path: Path, names: Sequence[str]) -> Columns:
    """The columns that count among those of a file.

    Raises:
        DataError: none is known.
    """
    texts = next((known for known in TEXT_COLUMNS if set(known) <= set(names)), None)
    label = next((known for known in LABEL_COLUMNS if known in names), None)
    if texts is None:
        known = ", ".join(" and ".join(columns) for columns in TEXT_COLUMNS)
        raise DataError(f"{path} has no columns of texts that are known ({known}) among {list(names)}: name them")
    if label is None:
        known = ", ".join(LABEL_COLUMNS)
        raise DataError(f"{path} has no column of labels that is known ({known}) among {list(names)}: name it")
    return Columns(texts, label)


def labels_of(texts: Sequence[LabelledText]) -> list[str]:
    """All labels in order: of numbers if all are, else of letters.

    Raises:
        DataError: there is nothing to tell apart.
    """
    found = {text.label for text in texts}
    if len(found) < 2:
        raise DataError(f"all {len(texts):,} examples have the label {texts[0].label!r}: training needs two at least")
    return sorted(found, key=int) if all(label.lstrip("-").isdecimal() for label in found) else sorted(found)


def class_numbers(texts: Sequence[LabelledText], labels: Sequence[str]) -> list[int]:
    """Number of each text's label.

    Raises:
        DataError: a label is not among them.
    """
    numbers = {label: number for number, label in enumerate(labels)}
    for text in texts:
        if text.label not in numbers:
            raise DataError(f"{text.where}: the label {text.label!r} is none of those trained on: {', '.join(labels)}")
    return [numbers[text.label] for text in texts]


def _labelled(row: _Row, columns: Columns) -> LabelledText:
    for name in (*columns.texts, columns.label):
        if name not in row.values:
            raise DataError(f"{row.where}: no column {name!r} among {list(row.values)}")
    texts = tuple(row.values[name] for name in columns.texts)
    for name, text in zip(columns.texts, texts, strict=True):
        if not isinstance(text, str):
            raise DataError(f"{row.where}: {name!r} is {type(text).__name__}, not text")
    label = row.values[columns.label]
    if isinstance(label, bool) or not isinstance(label, str | int) or label == "":
        raise DataError(f"{row.where}: the label {columns.label!r} ({label!r}) is neither text nor a whole number")
    if (columns.label, label) == DISPUTED:
        raise DataError(
            f"{row.where}: the label 'gold_label' ('-') says that annotators did not agree, which is no class: leave "
            "such lines out of the file"
        )
    return LabelledText(texts, str(label), row.where)


def _json_rows(path: Path) -> Iterator[_Row]:
    for where, record, _ in read_objects(path):
        if isinstance(record, BrokenRecord):
            raise DataError(f"{where}: {record.reason}")
        yield _Row(where, record)


def _tsv_rows(path: Path) -> Iterator[_Row]:
    names: list[str] = []
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            where = f"{path}:{number}"
            try:
                values = line.rstrip(b"\r\n").decode("utf-8-sig").split("\t")
            except UnicodeDecodeError as error:
                raise DataError(f"{where}: {not_utf8(error)}") from error
            if number == 1:
                names = values
            elif len(values) != len(names):
                raise DataError(f"{where}: {len(values)} columns, and the first line names {len(names)}: {names}")
            else:
                yield _Row(where, dict(zip(names, values, strict=True)))
