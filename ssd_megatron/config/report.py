"""From a dictionary to checked values, with every problem found on the way in one list.

A value that cannot be used is put aside and the others are still checked against each other, so that one mistake does
not hide the next.
"""

import copy
import difflib
import json
from collections.abc import Iterator, Mapping
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from ssd_megatron.config.deepspeed_keys import DsJson
from ssd_megatron.config.fields import Section
from ssd_megatron.config.refused import asks_for_nothing, reason_for

SECTION = "ssd_megatron"

# Stands in for required values that are missing or unusable while the others are checked.
_FILLER: dict[str, Any] = {
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
    SECTION: {
        "run_dir": "run",
        "model": {"num_layers": 1, "hidden_size": 1, "num_attention_heads": 1, "seq_length": 1, "vocab_size": 1},
        "data": {"tokenizer": "tokenizer.model"},
        "training": {"train_steps": 1},
    },
}


def shown(path: str) -> str:
    """How reports name a field: inside our sections without the leading "ssd_megatron"."""
    inside = path.removeprefix(f"{SECTION}.")
    return inside if "." in inside else path


def problem(path: str, value: Any, predicate: str) -> str:
    """One line of a report: field, value, what would work."""
    text = json.dumps(value, default=str)
    return f"{shown(path)} ({text if len(text) <= 60 else text[:57] + '...'}) {predicate}"


def sections_in(annotation: Any) -> Iterator[type[Section]]:
    """The section models that a field's type may be: itself, or the members of a union; none for lists."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    elif get_origin(annotation) in (Union, UnionType, Annotated):
        for member in get_args(annotation):
            yield from sections_in(member)


def known_fields(model: type[Section] = DsJson, prefix: str = "") -> dict[str, FieldInfo]:
    """Every field by its dotted path in the file, sections included."""
    fields: dict[str, FieldInfo] = {}
    for name, field in model.model_fields.items():
        fields[prefix + name] = field
        for section in sections_in(field.annotation):
            fields |= known_fields(section, f"{prefix}{name}.")
    return fields


def without_switched_off(raw: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The file without keys of refused features that ask for nothing."""
    kept = {}
    for name, value in raw.items():
        path = shown(prefix + name)
        if not (reason_for(path) and asks_for_nothing(path, value)):
            kept[name] = without_switched_off(value, f"{prefix}{name}.") if isinstance(value, dict) else value
    return kept


def validate(raw: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Check every field by itself.

    Returns:
        usable values by shown path (sections too, where all is well in them), and the problems found.
    """
    try:
        return _flatten(DsJson.model_validate(raw), ""), []
    except ValidationError as error:
        # A default that is derived from other fields is not a problem of its own.
        details = [detail for detail in error.errors() if detail["type"] != "default_factory_not_called"]
    by_path: dict[str, list[ErrorDetails]] = {}
    for detail in details:
        by_path.setdefault(_path(raw, detail), []).append(detail)
    problems = [_describe(path, details) for path, details in by_path.items()]

    patched = copy.deepcopy(raw)
    broken = {_replaceable(path) for path in by_path}
    for path in broken:
        _replace(patched, path)
    values = _flatten(DsJson.model_validate(patched), "")
    broken |= {path for path, field in known_fields().items() if _derived_from(path, field, raw) in broken}
    unusable = {shown(path) for path in known_fields() if _touches(path, broken)}
    return {path: value for path, value in values.items() if path not in unusable}, problems


def _derived_from(path: str, field: FieldInfo, raw: Any) -> str | None:
    """The path of the field that a value comes from, if it is not given itself."""
    *parents, name = path.split(".")
    for step in parents:
        raw = raw.get(step) if isinstance(raw, dict) else None
    if not isinstance(field.json_schema_extra, dict) or (isinstance(raw, dict) and name in raw):
        return None
    return ".".join([*parents, str(field.json_schema_extra["source"])])


def _touches(path: str, broken: set[str]) -> bool:
    return any(path == b or b.startswith(f"{path}.") or path.startswith(f"{b}.") for b in broken)


def _flatten(section: Section, prefix: str) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name in type(section).model_fields:
        value = getattr(section, name)
        values[shown(prefix + name)] = value
        if isinstance(value, Section):
            values |= _flatten(value, f"{prefix}{name}.")
    return values


def _path(raw: Any, detail: ErrorDetails) -> str:
    """The dotted path of an error, without the names of union members that pydantic puts between."""
    path = ""
    for i, part in enumerate(detail["loc"]):
        last = i == len(detail["loc"]) - 1
        if isinstance(part, int) and isinstance(raw, list):
            path, raw = f"{path}[{part}]", raw[part] if part < len(raw) else None
        elif isinstance(part, str) and isinstance(raw, dict) and part in raw:
            path, raw = f"{path}.{part}", raw[part]
        elif last and detail["type"] == "missing":
            path = f"{path}.{part}"
    return path.removeprefix(".")


def _replaceable(path: str) -> str:
    """The field to put aside for an error: not a list's entry, and a scheduler only as a whole."""
    field = path.partition("[")[0]
    return "scheduler" if field.startswith("scheduler.") else field


def _replace(raw: dict[str, Any], path: str) -> None:
    filler: Any = _FILLER
    *parents, name = path.split(".")
    for step in parents:
        raw = raw.setdefault(step, {})
        filler = filler.get(step, {})
    raw.pop(name, None)
    if name in filler:
        raw[name] = copy.deepcopy(filler[name])


_PREDICATES: dict[str, str] = {
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "int_parsing": "must be a whole number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "path_type": "must be a path",
    "none_required": "must be null",
    "tuple_type": "must be a list",
    "model_type": "must be an object in braces",
    "literal_error": "must be {expected}",
    "greater_than_equal": "must be at least {ge}",
    "greater_than": "must be above {gt}",
    "less_than": "must be below {lt}",
    "less_than_equal": "must be at most {le}",
    "too_long": "must have {max_length} entries",
    "union_tag_invalid": "must have one of the types {expected_tags}",
    "union_tag_not_found": "must have a type",
}


def _describe(path: str, details: list[ErrorDetails]) -> str:
    detail = details[0]
    if detail["type"] == "missing":
        field = known_fields().get(path)
        return f"{shown(path)} is missing" + (f": {field.description}" if field and field.description else "")
    if detail["type"] == "extra_forbidden":
        return problem(path, detail["input"], _unknown(path))
    own = [str(d["ctx"]["error"]) for d in details if d["type"] == "value_error" and "ctx" in d]
    first, *others = own[:1] or list(dict.fromkeys(_predicate(d) for d in details))
    return problem(path, detail["input"], ", or ".join([first, *(other.removeprefix("must be ") for other in others)]))


def _predicate(detail: ErrorDetails) -> str:
    context: Mapping[str, Any] = detail.get("ctx", {})
    text = _PREDICATES.get(detail["type"], detail["msg"]).format(**context).replace("'", '"')
    words = [word.strip("'") for word in str(context.get("expected", "")).replace(" or ", ", ").split(", ")]
    nearest = difflib.get_close_matches(str(detail["input"]), words, n=1)
    return f'{text}: did you mean "{nearest[0]}"?' if nearest else text


def _unknown(path: str) -> str:
    """What to say of a key that the schema does not have."""
    reason = reason_for(shown(path))
    if reason:
        return f"is not accepted: {reason}"
    return f"is not a known key: {suggestion(path)}"


def nearest_path(path: str) -> str:
    """The known path that was probably meant by an unknown one on the command line."""
    known = list(known_fields())
    nearest = [other for other in known if other.endswith(f".{path}")] or difflib.get_close_matches(path, known, n=1)
    return f"did you mean {nearest[0]}?" if nearest else "paths are those of the file, see docs/config.md"


def suggestion(path: str) -> str:
    """The key that was probably meant by an unknown one."""
    parent, _, name = path.rpartition(".")
    known = known_fields()
    here = [other.rpartition(".")[2] for other in known if other.rpartition(".")[0] == parent]
    nearest = difflib.get_close_matches(name, here, n=1)
    if nearest:
        return f"did you mean {nearest[0]}?"
    elsewhere = [other for other in known if other.rpartition(".")[2] == name]
    if elsewhere:
        return f"it belongs to {' or '.join(elsewhere)}"
    return f"the keys here are {', '.join(here)}"
