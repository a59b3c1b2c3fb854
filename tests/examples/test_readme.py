"""The command lines of README.md: those that train are dry-run, plans are made, the others' arguments are accepted."""

import importlib.util
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType

import pytest

import pretrain_ssd

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```sh\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
LINES = [line for block in BLOCKS for line in block.replace("\\\n", " ").splitlines()]
# Program and its arguments, whatever starts it.
COMMANDS = [
    (words[i], words[i + 1 :])
    for words in (shlex.split(line, comments=True) for line in LINES)
    for i, word in enumerate(words)
    if word.endswith(".py")
]
GPUS = "64"  # of the cluster that README speaks of


def arguments_of(program: str) -> list[list[str]]:
    return [arguments for name, arguments in COMMANDS if name == program]


def load(program: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location("program_of_readme", ROOT / program)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_program_of_readme_is_looked_at_here() -> None:
    assert {program for program, _ in COMMANDS} == {
        "pretrain_ssd.py",
        "tools/plan.py",
        "tools/checkpoint.py",
        "tools/generate.py",
        "tools/evaluate.py",
        "tools/convert_checkpoint.py",
        "tools/docstring_task.py",
        "tools/finetune.py",
        "examples/selfcheck/selfcheck.py",
        "tools/train_tokenizer.py",
        "tools/preprocess_data.py",
    }
    assert len(arguments_of("pretrain_ssd.py")) == 2


@pytest.mark.parametrize("arguments", arguments_of("pretrain_ssd.py"), ids=lambda words: words[1])
def test_runs_of_readme_can_start(
    arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    dry = [word for word in arguments if word != "--dry_run"] + ["--dry_run", "--world_size", GPUS]
    assert pretrain_ssd.main(dry) == 0
    output = capsys.readouterr()
    assert "tokens per step" in output.out and output.err == ""


def test_the_rank_that_readme_rehearses_is_one_of_its_job(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    (rank,) = re.findall(r"`(--dry_run --world_size .*?)`", README)
    assert (
        pretrain_ssd.main(["--ds_config", "examples/gpt/124m.json", *rank.split(), "--set", "train_batch_size=1024"])
        == 0
    )
    assert "rank 517 of 1024" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", arguments_of("tools/plan.py"), ids=" ".join)
def test_plans_of_readme_can_be_made(
    arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert arguments[arguments.index("--gpus") + 1] == GPUS
    assert load("tools/plan.py").main(arguments) == 0
    assert "memory of the fullest rank" in capsys.readouterr().out


TOOLS = (
    "tools/checkpoint.py",
    "tools/generate.py",
    "tools/evaluate.py",
    "tools/convert_checkpoint.py",
    "tools/finetune.py",
)


@pytest.mark.parametrize(("program", "arguments"), [command for command in COMMANDS if command[0] in TOOLS])
def test_models_of_readme_are_asked_for_as_the_tools_want(
    program: str,
    arguments: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load(program).main(arguments) == 2  # 2 of its own, where there is no run yet
    message = capsys.readouterr().err
    assert (
        "runs/gpt-13b is no folder" in message
        or "runs/quickstart is no folder" in message
        or "opt-125m has no" in message
        or "classifier is no folder" in message
    )


@pytest.mark.parametrize("program", ["tools/train_tokenizer.py", "tools/preprocess_data.py"])
def test_arguments_of_data_tools_are_theirs(program: str) -> None:
    (arguments,) = arguments_of(program)
    assert [str(path) for path in load(program)._parse(arguments).input] == ["my_text"]


def test_the_labelled_set_goes_where_fine_tuning_reads_it() -> None:
    program = "tools/docstring_task.py"
    (arguments,) = arguments_of(program)
    out = load(program)._parse(arguments).out
    assert all(f"{out}/" in words[words.index("--dev") + 1] for words in arguments_of("tools/finetune.py"))


def test_selfcheck_takes_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    program = "examples/selfcheck/selfcheck.py"
    (arguments,) = arguments_of(program)
    monkeypatch.setattr(sys, "argv", [program, *arguments])
    assert load(program)._arguments().bf16 is False
