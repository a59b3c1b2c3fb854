"""Reads ds.json and applies `--set path=value`: from text to plain dictionaries, before anything is checked."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from ssd_megatron.errors import ConfigError


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ConfigError: the file is missing or unreadable, is not JSON (with line and column), or has a key twice.
    """
    duplicates: list[str] = []

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        duplicates.extend(sorted({name for name in names if names.count(name) > 1}))
        return dict(pairs)

    try:
        content = json.loads(
            path.read_text(encoding="utf-8"), object_pairs_hook=unique, parse_constant=_no_constants(str(path))
        )
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}, line {error.lineno}, column {error.colno}: not JSON: {error.msg}") from error
    if duplicates:
        raise ConfigError(f"{path}: given twice in one object: {', '.join(duplicates)}; keep one of each")
    if not isinstance(content, dict):
        raise ConfigError(f'{path} must be a JSON object: {{"train_batch_size": 32, ..., "ssd_megatron": {{...}}}}')
    return content


def _no_constants(where: str) -> Callable[[str], NoReturn]:
    """Python's parser takes NaN and Infinity, which are not JSON and no setting."""

    def refuse(word: str) -> NoReturn:
        raise ConfigError(f"{where}: {word} is not JSON: use a number, or null")

    return refuse


REMOVE = object()


def parse_assignment(assignment: str) -> tuple[str, Any]:
    """Path and value of `path=value`. The value is JSON, else text; none at all is REMOVE.

    Raises:
        ConfigError: it is not `path=value`, or the value starts like JSON and is not.
    """
    path, equals, text = assignment.partition("=")
    if not equals or not path.strip():
        raise ConfigError(f"--set {assignment}: must be path=value: try --set train_batch_size=64")
    if text == "":
        return path.strip(), REMOVE
    try:
        return path.strip(), json.loads(text, parse_constant=_no_constants(f"--set {assignment}"))
    except json.JSONDecodeError as error:
        if text[0] in '{["':
            position = f"{error.msg} at character {error.pos + 1} of the value"
            raise ConfigError(f"--set {assignment}: not JSON: {position}") from error
        return path.strip(), text


def assign(config: dict[str, Any], path: str, value: Any) -> None:
    """Set or remove one field in place, making the sections on the way to it.

    Raises:
        ConfigError: something on the way is no section.
    """
    *parents, name = path.split(".")
    for step in parents:
        config = config.setdefault(step, {})
        if not isinstance(config, dict):
            raise ConfigError(f"--set {path}: {step} is not a section in the file")
    config.pop(name, None)
    if value is not REMOVE:
        config[name] = value
