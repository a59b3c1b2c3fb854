"""Every benchmark says how it is called."""

import importlib
import sys
from pathlib import Path

import pytest

import benchmarks

MODULES = [
    path.stem
    for path in sorted(Path(benchmarks.__path__[0]).glob("*.py"))
    if '\nif __name__ == "__main__":\n' in path.read_text()
]


@pytest.mark.parametrize("name", MODULES)
def test_it_says_how_it_is_called(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = importlib.import_module(f"benchmarks.{name}")
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as end:
        module.main()
    assert end.value.code == 0
    assert f" -m benchmarks.{name}" in capsys.readouterr().out
