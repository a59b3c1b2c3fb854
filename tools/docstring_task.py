"""Make a small labelled set out of real text that every machine has: which package of the running Python's standard
library does a docstring come from?

Writes train.tsv, dev.tsv and test.tsv as GLUE has them (sentence, label) into one folder. The names of the packages and
paths that begin with them are taken out of the texts; no text is there twice. The same Python gives the same files.
"""

import argparse
import ast
import random
import re
import sys
import sysconfig
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ssd_megatron.data.library import find_sources
from ssd_megatron.errors import DataError
from ssd_megatron.files import write_atomically

CLASSES = 10  # packages, those with most docstrings
LEAST, MOST = 150, 400  # docstrings of a package; of more, so many are drawn
LEAST_WORDS, MOST_WORDS = 4, 64  # of a docstring; more are cut
SHARES = {"dev": 0.15, "test": 0.15}  # of each package's docstrings; the rest is to train on
EXAMPLE = "example:\n  python tools/docstring_task.py --out data/docstrings\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit status: 0 done, 1 not written, 2 there is no library to read."""
    arguments = _parse(argv)
    # After the arguments: importing torch and DeepSpeed takes seconds.
    from ssd_megatron.training.exit_status import exit_status

    return exit_status(lambda: make_task(arguments.out, Path(sysconfig.get_path("stdlib")), arguments.seed))


def make_task(out: Path, library: Path, seed: int) -> None:
    """Write the three files and say what is in them.

    Args:
        library: the folder of Python sources; tests and installed packages in it are left out.
    Raises:
        DataError: fewer than two packages of the library have docstrings enough.
    """
    packages = choose_packages(library)
    if len(packages) < 2:
        raise DataError(f"{library} has {len(packages)} packages with {LEAST} docstrings: two are needed")
    generator = random.Random(seed)
    splits = split_texts(packages, generator)
    for name, rows in splits.items():
        generator.shuffle(rows)
        lines = ["sentence\tlabel", *(f"{text}\t{label}" for text, label in rows)]
        write_atomically(out / f"{name}.tsv", ("\n".join(lines) + "\n").encode())
        most = Counter(label for _, label in rows).most_common(1)[0][1]
        print(f"{out / name}.tsv: {len(rows):,} docstrings, {most / len(rows):.1%} of the largest class")
    print(f"{len(packages)} packages of Python {sys.version.split()[0]}: {', '.join(sorted(packages))}")


def choose_packages(library: Path) -> dict[str, list[str]]:
    """Cleaned docstrings by package, in the order of the sources; each text once, and of one package."""
    found: dict[str, list[str]] = {}
    for path in find_sources(library):
        package = path.relative_to(library).parts[0].removesuffix(".py")
        found.setdefault(package, []).extend(docstrings(path))
    largest = sorted(found, key=lambda package: (-len(found[package]), package))[:CLASSES]
    names = "|".join(map(re.escape, largest))
    pattern = re.compile(rf"\w*(?:{names})\w*(?:\.\w+)*", re.IGNORECASE)
    cleaned = {package: [clean(text, pattern) for text in found[package]] for package in largest}
    cleaned = {package: [t for t in texts if len(t.split()) >= LEAST_WORDS] for package, texts in cleaned.items()}
    unique = _unique(cleaned)
    return {package: texts for package, texts in unique.items() if len(texts) >= LEAST}


def split_texts(packages: Mapping[str, Sequence[str]], generator: random.Random) -> dict[str, list[tuple[str, str]]]:
    """Texts and labels by split, package after package."""
    splits: dict[str, list[tuple[str, str]]] = {"train": [], "dev": [], "test": []}
    for package, texts in packages.items():
        rows = [(text, package) for text in generator.sample(texts, min(len(texts), MOST))]
        for name, share in SHARES.items():
            taken = round(share * min(len(texts), MOST))
            splits[name] += rows[:taken]
            rows = rows[taken:]
        splits["train"] += rows
    return splits


def docstrings(path: Path) -> Iterator[str]:
    """Docstrings of a source file's module, classes and functions; none of one that cannot be parsed."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield text


def clean(text: str, names: re.Pattern[str]) -> str:
    """One line without names, of MOST_WORDS words at most."""
    return " ".join(names.sub(" ", text).split()[:MOST_WORDS])


def _unique(packages: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Texts, by their letters and digits, that only one package has, each once."""
    known: dict[str, dict[str, str]] = {package: {} for package in packages}
    for package, texts in packages.items():
        for text in texts:
            known[package].setdefault(_letters(text), text)
    owners = Counter(key for texts in known.values() for key in texts)
    return {package: [t for key, t in texts.items() if owners[key] == 1] for package, texts in known.items()}


def _letters(text: str) -> str:
    return re.sub(r"\W+", " ", text).strip().casefold()


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("data/docstrings"), help="folder (default: data/docstrings)")
    parser.add_argument("--seed", type=int, default=1, help="of the draw and the splits (default: 1)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
