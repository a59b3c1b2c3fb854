"""The labelled set of docstrings: classes, names taken out, no text twice."""

import random
import re
from collections import Counter
from pathlib import Path

import pytest

from ssd_megatron.classification.labelled import read_labelled
from ssd_megatron.errors import DataError
from tools import docstring_task


def function(name: str, text: str) -> str:
    return f'def {name}():\n    """{text}"""\n'


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """Two packages with docstrings enough and one with too few; tests must not be read."""
    sources = {
        "alpha/__init__.py": "".join(
            function(f"f{n}", f"Use alpha.beta.f{n} or _ALPHA_x\n\n\tto turn {n} round") for n in range(200)
        ),
        "beta.py": "".join(function(f"f{n}", f"Send number {n} over there") for n in range(160))
        + function("same", "Send NUMBER 7, over there!")
        + function("short", "Too few words")
        + function("shared", "What two packages say alike"),
        "gamma.py": function("shared", "What two packages say alike") + function("g", "One of a few texts"),
        "test/t.py": function("t", "Not read at all here"),
        "broken.py": 'def f(:\n    """Not read at all here"""\n',
    }
    for name, content in sources.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    return tmp_path


def test_texts_come_from_large_packages_without_their_names_and_once(library: Path) -> None:
    packages = docstring_task.choose_packages(library)
    assert list(packages) == ["alpha", "beta"]
    assert packages["alpha"][3] == "Use or to turn 3 round" and len(packages["alpha"]) == 200
    assert packages["beta"] == [f"Send number {n} over there" for n in range(160)]


def test_splits_share_no_text_and_follow_from_the_seed(library: Path) -> None:
    packages = docstring_task.choose_packages(library)
    splits = docstring_task.split_texts(packages, random.Random(1))
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 252, "dev": 54, "test": 54}
    texts = [text for rows in splits.values() for text, _ in rows]
    assert sorted(texts) == sorted(text for texts in packages.values() for text in texts)
    assert Counter(label for _, label in splits["dev"]) == {"alpha": 30, "beta": 24}
    assert splits == docstring_task.split_texts(packages, random.Random(1))
    assert splits != docstring_task.split_texts(packages, random.Random(2))


def test_the_files_are_read_as_labelled_texts(library: Path, capsys: pytest.CaptureFixture[str]) -> None:
    docstring_task.make_task(library / "out", library, 1)
    assert "dev.tsv: 54 docstrings, 55.6% of the largest class" in capsys.readouterr().out
    columns, texts = read_labelled(library / "out" / "test.tsv")
    assert columns.texts == ("sentence",) and Counter(text.label for text in texts) == {"alpha": 30, "beta": 24}


def test_a_library_of_too_few_packages_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has 0 packages with 150 docstrings: two are needed"):
        docstring_task.make_task(tmp_path / "out", tmp_path, 1)


def test_the_running_library_gives_a_set(tmp_path: Path) -> None:
    assert docstring_task.main(["--out", str(tmp_path)]) == 0
    texts = {name: read_labelled(tmp_path / f"{name}.tsv")[1] for name in ("train", "dev", "test")}
    labels = Counter(text.label for text in texts["train"])
    assert 8 <= len(labels) <= 12 and min(labels.values()) >= 100 and max(labels.values()) <= 280
    everything = [text.texts[0].casefold() for split in texts.values() for text in split]
    assert len(set(everything)) == len(everything)
    named = [text for text in everything if re.search("|".join(labels), text)]
    assert named == []
