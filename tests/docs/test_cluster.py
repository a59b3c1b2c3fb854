"""The commands of docs/tutorial.md that need several hosts: runs are dry-run, others' arguments accepted."""

import importlib.util
import shlex
import sys

import pytest

import pretrain_ssd
from tests.docs.markdown import ROOT, blocks

TUTORIAL = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
ON_HOSTS = [b for b in blocks(TUTORIAL) if b.remark is not None and "needs several hosts" in b.remark]
COMMANDS = [shlex.split(line) for block in ON_HOSTS for line in block.commands]
RANKS = "64"


def arguments_of(program: str) -> list[str]:
    (arguments,) = [words[words.index(program) + 1 :] for words in COMMANDS if program in words]
    return arguments


def test_a_run_on_many_hosts_can_start(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert pretrain_ssd.main([*arguments_of("pretrain_ssd.py"), "--dry_run", "--world_size", RANKS]) == 0
    output = capsys.readouterr()
    assert "tokens per step" in output.out and output.err == ""


def test_selfcheck_takes_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    program = "examples/selfcheck/selfcheck.py"
    monkeypatch.setattr(sys, "argv", [program, *arguments_of(program)])
    spec = importlib.util.spec_from_file_location("selfcheck", ROOT / program)
    assert spec is not None and spec.loader is not None
    selfcheck = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(selfcheck)
    assert selfcheck._arguments().bf16 is False
