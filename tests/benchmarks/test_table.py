"""The table that benchmarks share, and its JSON."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.row import Missing, Row
from benchmarks.table import hardware, report
from benchmarks.timing import paired, take_turns
from tests.benchmarks.helpers import FIELDS

FIRST = Row("lower is better", 0.4, 0.5, 0.25, details={"ms": 12.5, "kind": "eager"})
ROWS: list[Row | Missing] = [
    FIRST,
    Row("too slow", 0.6, 0.5, 0.25),
    Row("higher is better", 0.9, 0.85, 1.0, at_least=True),
    Missing("elsewhere", "needs CUDA"),
]


def test_json_has_every_field_of_every_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.json"
    assert not report("title", iter(ROWS), path)
    written = json.loads(path.read_text())
    assert all(row.keys() >= FIELDS for row in written)
    assert [row["ok"] for row in written] == [True, False, True, None]
    assert written[0]["details"] == {"ms": 12.5, "kind": "eager"}
    assert written[3]["reason"] == "needs CUDA"
    assert {row["hardware"] for row in written} == {hardware()}
    assert "torch" in written[0]["versions"]
    shown = capsys.readouterr().out
    assert "2 of 3 goals met, 1 not measured here" in shown
    assert "missed" in shown and "not here" in shown and ">= 0.85" in shown


def test_a_stopped_benchmark_keeps_what_it_measured(tmp_path: Path) -> None:
    def stopped() -> Iterator[Row]:
        yield FIRST
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        report("title", stopped(), tmp_path / "rows.json")
    assert [row["name"] for row in json.loads((tmp_path / "rows.json").read_text())] == ["lower is better"]


def test_variants_take_turns() -> None:
    calls: list[tuple[str, int]] = []
    variants = {"a": lambda turn: calls.append(("a", turn)), "b": lambda turn: calls.append(("b", turn))}
    times = take_turns(variants, turns=2, warm_up=1)
    assert calls == [("a", -1), ("b", -1), ("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    assert [len(values) for values in times.values()] == [2, 2]
    assert paired([1.0, 2.0, 9.0], [2.0, 2.0, 3.0]) == 1.0
