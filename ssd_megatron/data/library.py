"""Real text that every machine has: the standard library of the running Python, and what is installed beside it."""

import site
import sysconfig
from pathlib import Path

from ssd_megatron.files import sha256_of

NOT_LIBRARY = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
TEXT_SUFFIXES = {".py", ".pyi", ".md", ".rst", ".txt"}
MOST_BYTES = 1 << 20  # larger files are tables
SYSTEM_FOLDERS = (Path("/usr/lib/python3"), Path("/usr/share/doc"))


def find_sources(library: Path) -> list[Path]:
    """Python files of a library, sorted, without tests and installed packages."""
    return sorted(
        path for path in library.rglob("*.py") if NOT_LIBRARY.isdisjoint(path.relative_to(library).parent.parts)
    )


def find_texts() -> list[Path]:
    """Python and documentation files of the machine: the library, installed packages, the system's documents. Sorted;
    of files with the same content one."""
    folders = [sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), *site.getsitepackages()]
    below = {path for folder in (*map(Path, folders), *SYSTEM_FOLDERS) for path in folder.rglob("*")}
    texts = {
        sha256_of(path): path
        for path in sorted(below, reverse=True)
        if path.suffix in TEXT_SUFFIXES and path.is_file() and path.stat().st_size <= MOST_BYTES
    }
    return sorted(texts.values())
