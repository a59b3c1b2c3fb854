from pathlib import Path

from ssd_megatron.config.deepspeed_keys import DsJson
from ssd_megatron.config.reference import reference
from ssd_megatron.config.refused import REFUSED
from ssd_megatron.config.report import known_fields

ROOT = Path(__file__).parents[2]


def test_docs_are_those_of_the_models() -> None:
    written = (ROOT / "docs/config.md").read_text(encoding="utf-8")
    assert written == reference(), "run: python tools/config_reference.py --write"


def test_every_field_has_one_line_of_documentation() -> None:
    fields = known_fields(DsJson)
    assert len(fields) > 100
    for path, field in fields.items():
        assert field.description and field.description.endswith(".") and "\n" not in field.description, path


def test_every_field_and_refusal_is_in_the_docs() -> None:
    text = reference()
    for path in known_fields(DsJson):
        assert f"| `{path.rpartition('.')[2]}` |" in text or path.startswith("scheduler."), path
    assert all(f"`{path}`" in text for path in REFUSED)
