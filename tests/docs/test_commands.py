"""The commands of the documents run: those of one document are one session, from its first block to its last.

A comment before a block says why it is not run, or which test does that instead:

    <!-- not run: needs two hosts -->
    <!-- run by tests/planning/test_tool.py -->
"""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from functools import partial
from itertools import groupby
from pathlib import Path

import pytest

from tests.docs.markdown import DOCUMENTS, ROOT, Block, blocks
from tests.launched import ENVIRONMENT
from tests.small_run import PHASES, Corpus, Ranks

COMMANDS = {"sh": ["bash", "-euo", "pipefail"], "python": [sys.executable]}
REMARK = re.compile(r"not run: \w.+|run by (tests/\S+\.py)")
PROGRAM = re.compile(r"(\w+)\.py\b|-m [\w.]*?(\w+)(?= |$)")
STARTS_OF_COMMANDS = re.compile(r"^(\$|python|deepspeed|torchrun|srun|mpirun|sbatch|make|pip|pytest|git) ", re.M)
# Of the quickstart, which runs here with smaller networks and few steps.
TINY = {"num_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "ffn_hidden_size": 64}
BLOCKS = {document: blocks(document.read_text(encoding="utf-8")) for document in DOCUMENTS}
RUN = {document: [b for b in found if b.language in COMMANDS and not b.remark] for document, found in BLOCKS.items()}
QUICK = {"README.md", "api.md"}  # the others with make test-docs


def cases(documents: dict[Path, list[Block]]) -> list[object]:
    return [
        pytest.param(d, id=d.name, marks=() if d.name in QUICK else pytest.mark.docs) for d, b in documents.items() if b
    ]


@pytest.fixture(scope="session")
def scratch(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as after `make quickstart`, beside it texts of one's own in my_text/."""
    folder = tmp_path_factory.mktemp("documents") / "scratch"
    shutil.copytree(ROOT / "examples", folder / "examples")
    for name in ("tools", "pretrain_ssd.py", "README.md", "docs"):
        (folder / name).symlink_to(ROOT / name)
    embedded = folder / "data" / "embedded"
    embedded.mkdir(parents=True)
    for path in (corpus.tokenizer, *corpus.prefix.parent.glob(f"{corpus.prefix.name}.*")):
        shutil.copy(path, embedded)
    (folder / "my_text").mkdir()
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:80]:
        shutil.copy(path, folder / "my_text")
    quickstart = folder / "examples" / "quickstart" / "ds.json"
    quickstart.write_text(json.dumps(tiny(json.loads(quickstart.read_text()))))
    ranks = Ranks(quickstart, prepare=partial(enter, folder))
    assert ranks.wait() == [0], ranks.output()
    return folder


def enter(folder: Path, _rank: int) -> None:
    os.chdir(folder)


def tiny(config: dict[str, dict[str, object]]) -> dict[str, object]:
    section = {name: dict(part) if isinstance(part, dict) else part for name, part in config["ssd_megatron"].items()}
    section["model"] |= TINY
    section["ssd"] = {"schedule": "fixed", "phases": PHASES, "num_experts": 16, "top_k": 4, "check_interval": 3}
    section["training"] = {"train_steps": 24, "eval_interval": 12, "eval_steps": 1}
    return config | {"train_batch_size": 8, "ssd_megatron": section}


def run(folder: Path, command: list[str], where: str) -> None:
    settings = {"HF_HOME": str(folder / ".huggingface"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        command, cwd=folder, env=os.environ | ENVIRONMENT | settings, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{where} ends with {done.returncode}: {done.stdout}{done.stderr}"


@pytest.mark.parametrize("document", cases(RUN))
def test_a_document_runs_as_written(document: Path, scratch: Path, tmp_path: Path) -> None:
    folder = tmp_path / "scratch"
    shutil.copytree(scratch, folder, symlinks=True)
    for language, group in groupby(RUN[document], key=lambda block: block.language):
        found = list(group)
        script = folder / f"line_{found[0].line}"
        script.write_text("\n".join(block.text for block in found))
        lines = ", ".join(str(block.line) for block in found)
        run(folder, [*COMMANDS[language], script.name], where=f"{document.name}, line {lines}")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.name)
def test_blocks_that_are_not_run_say_why(document: Path) -> None:
    for block in BLOCKS[document]:
        where = f"{document.name}, line {block.line}"
        if block.language not in COMMANDS:
            assert not STARTS_OF_COMMANDS.search(block.text), f"{where}: commands belong into a block of sh"
        elif block.remark is not None:
            remark = REMARK.fullmatch(block.remark)
            assert remark, f"{where}: {block.remark}"
            if remark[1] is not None:
                instead = (ROOT / remark[1]).read_text(encoding="utf-8")
                for names in PROGRAM.findall(" \n".join(block.commands)):
                    assert "".join(names) in instead, f"{where}: {remark[1]} does not name {''.join(names)}"
