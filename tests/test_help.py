"""Every tool and every benchmark says how it is called."""

import importlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAMS = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for folder in ("tools", "benchmarks")
    for path in sorted((ROOT / folder).glob("*.py"))
    if '\nif __name__ == "__main__":\n' in path.read_text()
]


@pytest.mark.parametrize("name", ["pretrain_ssd", *PROGRAMS])
def test_it_says_how_it_is_called(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [f"{name.replace('.', '/')}.py", "--help"])
    with pytest.raises(SystemExit) as end:
        importlib.import_module(name).main()
    assert end.value.code == 0
    call = f" -m {name}" if name.startswith("benchmarks.") else f"usage: {name.split('.')[-1]}.py"
    assert call in capsys.readouterr().out
