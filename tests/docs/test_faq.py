"""The messages in docs/faq.md are those of the code."""

import re

import pytest

from tests.docs.markdown import ROOT

SOURCES = [ROOT / "pretrain_ssd.py", *sorted((ROOT / "ssd_megatron").rglob("*.py"))]
# Strings that Python joins, over a line's end or not.
JOINT = re.compile(r"""(["'])\s*f?\1""")
CODE = "\n".join(JOINT.sub("", path.read_text(encoding="utf-8")) for path in SOURCES)
MESSAGES = re.findall(r"^### `(.+)`$", (ROOT / "docs" / "faq.md").read_text(encoding="utf-8"), re.M)


@pytest.mark.parametrize("message", MESSAGES)
def test_messages_are_those_of_the_code(message: str) -> None:
    fragments = [fragment.strip() for fragment in message.split("…")]
    assert any(len(fragment) > 8 for fragment in fragments)
    assert [fragment for fragment in fragments if fragment not in CODE] == []
