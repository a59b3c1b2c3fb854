"""Labelled texts as files have them, and what is said of files that cannot be used."""

import json
from pathlib import Path
from typing import Any

import pytest

from ssd_megatron.classification.labelled import Columns, class_numbers, find_columns, labels_of, read_labelled
from ssd_megatron.errors import DataError

GLUE = {
    "sentence\tlabel": Columns(("sentence",), "label"),
    "index\tquestion\tsentence\tlabel": Columns(("question", "sentence"), "label"),
    "index\tpromptID\tsentence1\tsentence2\tlabel1\tgold_label": Columns(("sentence1", "sentence2"), "gold_label"),
    "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate": Columns(("question1", "question2"), "is_duplicate"),
    "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String": Columns(("#1 String", "#2 String"), "Quality"),
}


def write(path: Path, *lines: str | bytes) -> Path:
    path.write_bytes(b"".join((line.encode() if isinstance(line, str) else line) + b"\n" for line in lines))
    return path


@pytest.mark.parametrize("header", GLUE)
def test_the_columns_of_glue_are_known(header: str) -> None:
    assert find_columns(Path("train.tsv"), header.split("\t")) == GLUE[header]


def test_a_tsv_is_read_as_it_stands(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tsv", b"\xef\xbb\xbfsentence1\tsentence2\tlabel\r", "a \"quoted\tb's\t1\r", "\tempty\t0")
    columns, texts = read_labelled(path)
    assert columns == Columns(("sentence1", "sentence2"), "label")
    assert [(text.texts, text.label) for text in texts] == [(('a "quoted', "b's"), "1"), (("", "empty"), "0")]
    assert [text.where for text in texts] == [f"{path}:2", f"{path}:3"]


def test_json_lines_are_read_with_columns_of_any_name(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", json.dumps({"t": "naïve", "y": 10}), "", json.dumps({"t": "b", "y": 9, "z": 0}))
    columns, texts = read_labelled(path, Columns(("t",), "y"))
    assert columns.label == "y"
    assert [(text.texts, text.label, text.where) for text in texts] == [
        (("naïve",), "10", f"{path}:1"),
        (("b",), "9", f"{path}:3"),
    ]
    assert labels_of(texts) == ["9", "10"]  # numbers by size
    assert class_numbers(texts, ["9", "10"]) == [1, 0]


def broken(*lines: str | bytes, name: str = "a.tsv", **columns: Any) -> dict[str, Any]:
    return {"name": name, "lines": lines, "columns": Columns(**columns) if columns else None}


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (broken("sentence\tlabel", "a\t1", "a\tb\t1"), r"a.tsv:3: 3 columns, and the first line names 2: \['sent"),
        (broken("sentence\tlabel", b"\xff\t1"), "a.tsv:2: not UTF-8"),
        (broken("sentence\tlabel"), "a.tsv has no examples"),
        (broken("words\tlabel", "a\t1"), r"no columns of texts that are known \(sentence1 and sentence2, .*\['words'"),
        (broken("sentence\tclass", "a\t1"), "no column of labels that is known"),
        (broken("sentence\tlabel", "a\t1", texts=("text",), label="label"), "a.tsv:2: no column 'text' among"),
        (broken("sentence\tlabel", "a\t"), r"a.tsv:2: the label 'label' \(''\) is neither text nor a whole number"),
        (
            broken("gold_label\tsentence1\tsentence2", "neutral\ta\tb", "-\ta\tb"),
            r"a.tsv:3: the label 'gold_label' \('-'\) says that annotators did not agree, .*: leave such lines out",
        ),
        (broken('{"text": "a", "label": 0.5}', name="a.jsonl"), r"a.jsonl:1: the label 'label' \(0.5\)"),
        (broken('{"text": "a", "label": true}', name="a.jsonl"), r"a.jsonl:1: the label 'label' \(True\)"),
        (broken('{"text": 7, "label": "x"}', name="a.jsonl"), "a.jsonl:1: 'text' is int, not text"),
        (broken('{"text": "a", "label": 1}', "{", name="a.jsonl"), "a.jsonl:2: broken JSON: "),
    ],
)
def test_unusable_files_are_refused_with_file_and_line(tmp_path: Path, case: dict[str, Any], message: str) -> None:
    path = write(tmp_path / case["name"], *case["lines"])
    with pytest.raises(DataError, match=message):
        read_labelled(path, case["columns"])


def test_labels_that_were_not_trained_on_or_tell_nothing_apart_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing.tsv does not exist"):
        read_labelled(tmp_path / "nothing.tsv")
    _, texts = read_labelled(write(tmp_path / "a.tsv", "text\tlabel", "a\tyes", "b\tyes"))
    with pytest.raises(DataError, match="all 2 examples have the label 'yes': training needs two at least"):
        labels_of(texts)
    with pytest.raises(DataError, match=r"a.tsv:2: the label 'yes' is none of those trained on: no, perhaps"):
        class_numbers(texts, ["no", "perhaps"])
