"""The standard library of the running Python: real text that every machine has."""

from pathlib import Path

NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages"}


def find_sources(library: Path) -> list[Path]:
    """Python files of a library, sorted, without tests and installed packages."""
    return sorted(
        path for path in library.rglob("*.py") if NOT_LIBRARY.isdisjoint(path.relative_to(library).parent.parts)
    )
