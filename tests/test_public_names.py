"""The names that the package has for users, as docs/api.md lists them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import ssd_megatron

API = (Path(__file__).parents[1] / "docs" / "api.md").read_text(encoding="utf-8")
NAMES = [name for row in re.findall(r"^\| (`.*?) \|", API, re.M) for name in re.findall(r"`(\w+)`", row)]


@pytest.mark.parametrize("name", NAMES)
def test_names_of_the_documents_are_there_and_say_what_they_do(name: str) -> None:
    assert getattr(ssd_megatron, name).__doc__


def test_the_documents_have_every_name() -> None:
    assert sorted(NAMES) == sorted(ssd_megatron._HOMES)


def test_other_names_are_not_there() -> None:
    with pytest.raises(AttributeError, match="module 'ssd_megatron' has no attribute 'laod'"):
        ssd_megatron.laod  # noqa: B018


def test_importing_the_package_takes_no_torch() -> None:
    code = "import sys, ssd_megatron; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
