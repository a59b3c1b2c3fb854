"""Writes docs/config.md from the models: what a field is called, may be, is by default and means."""

import json
from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from ssd_megatron.config.deepspeed_keys import WSD, DsJson, WarmupCosineLR, WarmupDecayLR, WarmupLR
from ssd_megatron.config.fields import Section
from ssd_megatron.config.refused import REFUSED
from ssd_megatron.config.report import sections_in
from ssd_megatron.config.schema import PhaseConfig, SsdMegatronConfig

_INTRODUCTION = """# Configuration

A run is described by one JSON file: DeepSpeed's own keys and one more section, `"ssd_megatron"`. The file is checked as
a whole before anything is built, and all problems are reported together. Unknown keys are refused, as are settings that
have no effect with the others chosen. Numbers that DeepSpeed owns (batch sizes, optimizer, schedule of the learning
rate, precision, ZeRO, clipping, monitors) are said there and nowhere else.

`--set path=value` changes one field from the command line. The path is the one in the file, the value is JSON, or text
if it is not; without a value the field goes back to its default:

    deepspeed pretrain_ssd.py --ds_config ds.json --set ssd_megatron.ssd.top_k=8 --set train_batch_size=64
    deepspeed pretrain_ssd.py --ds_config ds.json --set ssd_megatron.ssd.sparse_fraction=

`"auto"` is resolved for the machine and the number of processes, said once at the start, and written with all defaults
to `<run_dir>/config.json`. Paths are relative to the folder in which the run is started.

This page is generated from the models in `ssd_megatron/config` by `tools/config_reference.py`.
"""

_BATCHES = """Of the three batch sizes, give `train_batch_size`, or the other two. They must satisfy

    train_batch_size = train_micro_batch_size_per_gpu * gradient_accumulation_steps * data parallel size

An automatic micro batch is the largest that divides the samples of a rank and has at most 8,192 tokens on a CPU and
16,384 on CUDA.
"""

_TYPES = {int: "integer", float: "number", bool: "true, false", str: "text", NoneType: "null"}


def reference() -> str:
    """The text of docs/config.md."""
    parts = [_INTRODUCTION, '## The section "ssd_megatron"\n', _table(SsdMegatronConfig)]
    for name, section in _subsections(SsdMegatronConfig):
        parts += [f"### {name}\n", f"{section.__doc__}\n", _table(section)]
        if name == "ssd":
            parts += ["#### ssd.phases\n", f"{PhaseConfig.__doc__}\n", _table(PhaseConfig)]
    parts += ["## DeepSpeed's keys\n", _BATCHES, _table(DsJson)]
    for name, section in _subsections(DsJson):
        if section is not SsdMegatronConfig:
            parts += [f"### {name}\n", _table(section)]
            parts += [_table_named(f"{name}.{inner}", model) for inner, model in _subsections(section)]
    for schedule in (WarmupLR, WarmupDecayLR, WarmupCosineLR, WSD):
        (params,) = sections_in(schedule.model_fields["params"].annotation)
        parts += [f"### scheduler: {schedule.__name__}\n", f"{schedule.__doc__}\n", _table(params)]
    parts += [
        "## Refused by name\n",
        'A block with `"enabled": false` asks for nothing and is left out.\n',
        _refusals(),
    ]
    return "\n".join(parts)


def _subsections(model: type[Section]) -> Iterator[tuple[str, type[Section]]]:
    for name, field in model.model_fields.items():
        sections = list(sections_in(field.annotation))
        if len(sections) == 1:
            yield name, sections[0]


def _table_named(name: str, model: type[Section]) -> str:
    return f"#### {name}\n\n{_table(model)}"


def _table(model: type[Section]) -> str:
    rows = [
        f"| `{name}` | {_type(field.annotation)} | {_default(field)} | {field.description} |"
        for name, field in model.model_fields.items()
    ]
    return "\n".join(["| field | type | default | meaning |", "|---|---|---|---|", *rows, ""])


def _refusals() -> str:
    keys: dict[str, list[str]] = {}
    for path, reason in REFUSED.items():
        keys.setdefault(reason, []).append(f"`{path}`")
    rows = [f"| {', '.join(paths)} | {reason} |" for reason, paths in keys.items()]
    return "\n".join(["| keys | why, and what to use |", "|---|---|", *rows, ""])


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if isinstance(field.json_schema_extra, dict):
        return f"`{field.json_schema_extra['shown_default']}`"
    if isinstance(field.default, Section):
        return ""
    return f"`{json.dumps(field.default)}`"


def _type(annotation: Any) -> str:
    origin, members = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return ", ".join(f"`{member}`" for member in members)
    if origin is Annotated:
        return _type(members[0])
    if origin in (Union, UnionType):
        sections = list(sections_in(annotation))
        return "object" if sections else ", ".join(dict.fromkeys(_type(member) for member in members))
    if origin is tuple:
        return "list"
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return "object"
    return _TYPES.get(annotation, "path")
