"""Prints docs/config.md as generated from the config models; with --write it writes the file."""

import argparse
from pathlib import Path

from ssd_megatron.config.reference import reference

DOCS = Path(__file__).parent.parent / "docs" / "config.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"write {DOCS.name} instead of printing it")
    if parser.parse_args().write:
        DOCS.write_text(reference(), encoding="utf-8")
    else:
        print(reference(), end="")


if __name__ == "__main__":
    main()
