"""What the tests of the documents read from them: fenced blocks, links, headings, inline code."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]

_BLOCK = re.compile(r"(?:^<!-- (?P<remark>[^\n]*) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_CODE = re.compile(r"`((?:[^`\n]|\n(?!\n))+)`")  # may go over a line's end, not over a paragraph's
_HEADING = re.compile(r"^#{1,6} (.+)$", re.M)


@dataclass(frozen=True)
class Block:
    """A fenced block; `remark` is the comment in the line before it, `line` that of its fence."""

    language: str
    text: str
    remark: str | None
    line: int

    @property
    def commands(self) -> list[str]:
        """Lines of a shell, continued ones joined."""
        return self.text.replace("\\\n", " ").splitlines()


def blocks(text: str) -> list[Block]:
    """All fenced blocks of a document, in order."""
    return [
        Block(m["language"], m["text"], m["remark"], text.count("\n", 0, m.start("language")) + 1)
        for m in _BLOCK.finditer(text)
    ]


def prose(text: str) -> str:
    """The document without its fenced blocks."""
    return _BLOCK.sub("", text)


def links(text: str) -> list[str]:
    """Targets of links and pictures."""
    return _LINK.findall(_CODE.sub("", prose(text)))


def inline_code(text: str) -> list[str]:
    return _CODE.findall(prose(text))


def anchors(text: str) -> set[str]:
    """What a link may have after `#`, as GitHub makes it of headings."""
    found: set[str] = set()
    for heading in _HEADING.findall(prose(text)):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        name = re.sub(r"[^\w\- ]", "", plain).strip().replace(" ", "-")
        number = 0
        while (anchor := f"{name}-{number}" if number else name) in found:
            number += 1
        found.add(anchor)
    return found
