"""Links, paths, make targets and modules that the documents name are there."""

import importlib.util
import re
from pathlib import Path

import pytest

from tests.docs.markdown import DOCUMENTS, ROOT, anchors, blocks, inline_code, links

OUTSIDE = re.compile(r"[a-z]+:")
# Inside the repository; of others (my_text/, data/...) documents may say what they like.
PATH = re.compile(r"\b(?:ssd_megatron|tests|tools|benchmarks|examples|docs)/[\w./-]*\w")
MODULE = re.compile(r"python -m ((?:benchmarks|tests)[\w.]*)")
TARGET = re.compile(r"\bmake ((?:[a-z]+-)*[a-z]+)")
HISTORY = {"log.md"}  # may name what is no longer there


def names(document: Path) -> str:
    return str(document.relative_to(ROOT))


@pytest.mark.parametrize("document", DOCUMENTS, ids=names)
def test_links_lead_somewhere(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    broken = []
    for link in links(text):
        if OUTSIDE.match(link):
            continue
        path, _, anchor = link.partition("#")
        target = (document.parent / path) if path else document
        if not target.exists() or (anchor and anchor not in anchors(target.read_text(encoding="utf-8"))):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if d.name not in HISTORY], ids=names)
def test_what_documents_name_is_there(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    code = "\n".join(inline_code(text) + [block.text for block in blocks(text)])
    targets = re.findall(r"^([a-z][a-z -]*):", (ROOT / "Makefile").read_text(), re.M)
    known = {name for line in targets for name in line.split()}
    missing = [path for path in PATH.findall(code) if not (ROOT / path).exists()]
    missing += [module for module in MODULE.findall(code) if importlib.util.find_spec(module) is None]
    missing += [f"make {target}" for target in TARGET.findall(code) if target not in known]
    assert missing == []


def test_pictures_are_shown_somewhere_and_small() -> None:
    shown = {(d.parent / link).resolve() for d in DOCUMENTS for link in links(d.read_text(encoding="utf-8"))}
    for picture in (ROOT / "docs" / "images").iterdir():
        assert picture in shown, f"{picture} is shown nowhere"
        assert picture.stat().st_size < 200_000, picture
