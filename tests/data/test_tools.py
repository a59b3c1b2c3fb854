import json
import site
import sysconfig
from pathlib import Path
from types import ModuleType

import pyarrow
import pyarrow.parquet
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from ssd_megatron.data import library as texts
from ssd_megatron.data.preprocess import read_corpus_info
from ssd_megatron.data.tokenizers import load_tokenizer
from tests.data.conftest import TEXTS
from tools import embedded_corpus, preprocess_data, train_tokenizer

# A library whose tests and packages must not be read; files enough that a shuffle shows.
LIBRARY: dict[str, str | bytes] = {
    **{f"module_{i:02}.py": f"x_{i} = {i}\n" * 30 for i in range(40)},
    "package/a.py": "def a():\n    return 1\n",
    "package/empty.py": "",
    "package/latin.py": b"# \xff\n",
    "test/t.py": "not read",
    "package/tests/t.py": "not read",
    "site-packages/s.py": "not read",
    "testing.py": "# its name only begins like a folder of tests\n",
}


@pytest.fixture
def inputs(tmp_path: Path) -> list[str]:
    """The same 300 documents as JSON lines (with one broken line), parquet and a folder of texts: 100 in each."""
    lines = [json.dumps({"body": text}) for text in TEXTS[:100]]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines[:7], "{broken", *lines[7:]]))
    pyarrow.parquet.write_table(pyarrow.table({"body": TEXTS[100:200]}), tmp_path / "b.parquet")
    (tmp_path / "texts").mkdir()
    for i, text in enumerate(TEXTS[200:]):
        (tmp_path / "texts" / f"{i:03}.py").write_text(text)
    return [str(tmp_path / name) for name in ("a.jsonl", "b.parquet", "texts")]


def test_from_files_to_a_corpus(tmp_path: Path, inputs: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    model, prefix = str(tmp_path / "t.model"), str(tmp_path / "out" / "c")
    common = ["--input", *inputs, "--key", "body"]
    assert train_tokenizer.main([*common, "--output", model, "--vocab_size", "330"]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{model}: 330 tokens, 1 broken records skipped\n"
    assert captured.err.startswith(f"{inputs[0]}:8: broken JSON: ")

    assert preprocess_data.main([*common, "--output", prefix, "--tokenizer", model, "--workers", "2"]) == 0
    captured = capsys.readouterr()
    assert f"{inputs[0]}:8: broken JSON: " in captured.err
    assert f"{prefix}: 300 documents, " in captured.err
    assert captured.err.endswith("1 broken records skipped\n")
    tokenizer, dataset = load_tokenizer(Path(model)), IndexedDataset(prefix)
    assert [tokenizer.decode(ids[:-1].tolist()) for ids in dataset[:]] == TEXTS


@pytest.mark.parametrize("tool", ["train", "preprocess"])
def test_a_broken_line_ends_with_status_2(
    tool: str, tmp_path: Path, inputs: list[str], sentencepiece_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--input", *inputs, "--key", "body", "--on_error", "fail"]
    if tool == "train":
        status = train_tokenizer.main([*common, "--output", str(tmp_path / "t.model"), "--vocab_size", "330"])
    else:
        tokenizer = ["--tokenizer", str(sentencepiece_model), "--workers", "1"]
        status = preprocess_data.main([*common, "--output", str(tmp_path / "out"), *tokenizer])
    assert status == 2
    assert capsys.readouterr().err == (
        f"error: {inputs[0]}:8: broken JSON: Expecting property name enclosed in double quotes at column 2\n"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "b.parquet", "texts"]


def test_outputs_are_not_overwritten_unasked(
    tmp_path: Path, inputs: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    model, prefix = str(tmp_path / "t.model"), str(tmp_path / "c")
    train = ["--input", inputs[2], "--output", model, "--vocab_size", "330"]
    preprocess = ["--input", inputs[2], "--output", prefix, "--tokenizer", model, "--workers", "1"]
    for tool, arguments, named in ((train_tokenizer, train, model), (preprocess_data, preprocess, f"{prefix}.bin")):
        assert tool.main(arguments) == 0
        assert tool.main(arguments) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith(f"error: {named}")
        assert error.endswith("exists already: choose another output, or overwrite it (--overwrite)")
        assert tool.main([*arguments, "--overwrite"]) == 0


def test_where_nothing_can_be_written_is_told(
    tmp_path: Path, inputs: list[str], sentencepiece_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.touch()
    common = ["--input", inputs[2], "--output", str(file / "c.model")]
    assert train_tokenizer.main([*common, "--vocab_size", "330"]) == 1
    assert preprocess_data.main([*common, "--tokenizer", str(sentencepiece_model), "--workers", "1"]) == 1
    assert embedded_corpus.main(["--out", str(file / "c")]) == 1
    messages = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: [Errno ")]
    assert len(messages) == 3


@pytest.mark.parametrize("tool", [train_tokenizer, preprocess_data, embedded_corpus])
def test_help_has_an_example(tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        tool.main(["--help"])
    assert exit.value.code == 0
    assert f"example:\n  python tools/{tool.__name__.split('.')[-1]}.py --" in capsys.readouterr().out


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small library that the tool takes for the running Python's."""
    folder = tmp_path / "library"
    for name, content in LIBRARY.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    monkeypatch.setattr(embedded_corpus, "VOCAB_SIZE", 300)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(folder))
    return folder


def test_embedded_corpus(tmp_path: Path, library: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert embedded_corpus.main(["--out", str(out), "--workers", "2"]) == 0
    assert f"{library}/package/latin.py is not UTF-8; left out" in capsys.readouterr().err
    names = {path.name for path in out.iterdir()}
    assert names == {"documents.jsonl", "tokenizer.model", "corpus.bin", "corpus.idx", "corpus.json"}
    sources = [json.loads(line)["source"] for line in (out / "documents.jsonl").read_text().splitlines()]
    assert sorted(sources) == sorted(
        name for name in LIBRARY if name != "package/latin.py" and LIBRARY[name] != "not read"
    )
    assert sources != sorted(sources)
    info = read_corpus_info(out / "corpus")
    assert info is not None
    assert (info.documents, info.vocab_size, info.dtype) == (42, 300, "uint16")


def test_embedded_corpus_is_the_same_each_time(tmp_path: Path, library: Path) -> None:
    for out in ("a", "b"):
        assert embedded_corpus.main(["--out", str(tmp_path / out), "--workers", "1"]) == 0
    for name in ("documents.jsonl", "tokenizer.model", "corpus.bin", "corpus.idx"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_embedded_corpus_is_made_once(tmp_path: Path, library: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    embedded_corpus.main(["--out", str(out), "--workers", "1"])
    times = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    capsys.readouterr()
    assert embedded_corpus.main(["--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out} is finished: nothing to do\n"
    assert embedded_corpus.main(["--out", str(out), "--machine"]) == 2
    assert f"{out} has a corpus of 300 tokens, not 32,768: give another --out" in capsys.readouterr().err
    assert embedded_corpus.main(["--out", str(out), "--reserve", "bert"]) == 2
    message = f"{out}/tokenizer.model has no [MASK], which --reserve bert asks for: give another --out"
    assert message in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == times


def test_an_embedded_corpus_with_markers_is_finished_for_those_who_want_none(
    tmp_path: Path, library: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--out", str(tmp_path / "out"), "--workers", "1"]
    assert embedded_corpus.main([*command, "--reserve", "bert"]) == 0
    for reserve in (["--reserve", "bert"], []):
        capsys.readouterr()
        assert embedded_corpus.main([*command, *reserve]) == 0
        assert "is finished: nothing to do" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["no index", "other tokenizer", "partial"])
def test_an_interrupted_embedded_corpus_starts_over(
    damage: str, tmp_path: Path, library: Path, sentencepiece_model: Path
) -> None:
    out = tmp_path / "out"
    embedded_corpus.main(["--out", str(out), "--workers", "1"])
    whole = {path.name: path.read_bytes() for path in out.iterdir()}
    if damage == "other tokenizer":
        (out / "tokenizer.model").write_bytes(sentencepiece_model.read_bytes())
    else:
        (out / "corpus.idx").unlink()
    if damage == "partial":
        (out / "corpus.bin").rename(out / "corpus.partial.bin")
    assert not embedded_corpus.is_finished(out, 300, ())
    assert embedded_corpus.main(["--out", str(out), "--workers", "1"]) == 0
    assert {path.name: path.read_bytes() for path in out.iterdir()} == whole


def test_all_text_of_the_machine(tmp_path: Path, library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = tmp_path / "documents"
    documents.mkdir()
    for name, content in {
        "a.md": "words\n" * 50,
        "b.rst": "words\n" * 50,
        "c.txt": "others\n",
        "d.gz": "no text",
    }.items():
        (documents / name).write_text(content)
    monkeypatch.setattr(texts, "SYSTEM_FOLDERS", (documents, tmp_path / "missing"))
    monkeypatch.setattr(site, "getsitepackages", lambda: [])
    monkeypatch.setattr(embedded_corpus, "MACHINE_VOCAB_SIZE", 300)
    out = tmp_path / "out"
    assert embedded_corpus.main(["--out", str(out), "--machine", "--workers", "1"]) == 0
    sources = [json.loads(line)["source"] for line in (out / "documents.jsonl").read_text().splitlines()]
    expected = {name for name in LIBRARY if name not in ("package/latin.py", "site-packages/s.py", "test/t.py")}
    assert len(sources) == len(set(sources)) and set(sources) == expected | {f"{documents}/a.md", f"{documents}/c.txt"}


def test_no_library_is_status_2(tmp_path: Path, library: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in library.rglob("*.py"):
        path.unlink()
    assert embedded_corpus.main(["--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith(f"error: {library} has no Python sources")
