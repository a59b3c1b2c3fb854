from pathlib import Path

import pytest

from ssd_megatron.config.source import REMOVE, assign, parse_assignment, read_json
from ssd_megatron.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{\n  "a": 1,\n  "b": }\n', "line 3, column 8: not JSON: Expecting value"),
        ('{"a": 1, "a": 2}', "given twice in one object: a; keep one of each"),
        ('{"x": {"a": 1, "a": 2}}', "given twice in one object: a"),
        ('{"a": NaN}', "NaN is not JSON: use a number, or null"),
        ("[1]", "must be a JSON object"),
        ("", "line 1, column 1: not JSON"),
    ],
)
def test_unusable_file_is_named_with_the_place(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "ds.json"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_json(path)
    assert str(path) in str(caught.value)
    assert message in str(caught.value)


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.json cannot be read: .*No such file"):
        read_json(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("assignment", "path", "value"),
    [
        ("train_batch_size=64", "train_batch_size", 64),
        ("optimizer.params.lr=3e-4", "optimizer.params.lr", 3e-4),
        ("a.b=true", "a.b", True),
        ("a.b=null", "a.b", None),
        ("a.b=runs/x=1", "a.b", "runs/x=1"),
        ('a.b=["x", 2]', "a.b", ["x", 2]),
        ("a.b=", "a.b", REMOVE),
    ],
)
def test_assignment_is_json_or_text(assignment: str, path: str, value: object) -> None:
    assert parse_assignment(assignment) == (path, value)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("train_batch_size", "must be path=value: try --set train_batch_size=64"),
        ("=4", "must be path=value"),
        ("a=[1, 2", "--set a=[1, 2: not JSON: Expecting ',' delimiter at character 6"),
        ("a=Infinity", "--set a=Infinity: Infinity is not JSON"),
    ],
)
def test_broken_assignment_is_quoted(assignment: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_assignment(assignment)
    assert message in str(caught.value)


def test_assign_makes_sections_and_removes_fields() -> None:
    config: dict[str, object] = {"a": {"b": 1, "c": 2}}
    assign(config, "a.b", REMOVE)
    assign(config, "x.y", 3)
    assert config == {"a": {"c": 2}, "x": {"y": 3}}
    with pytest.raises(ConfigError, match="c is not a section in the file"):
        assign(config, "a.c.d", 1)
