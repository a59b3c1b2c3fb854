"""Turn documents into a Megatron IndexedDataset (.bin and .idx) that ds.json names in data.paths."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from ssd_megatron.data.documents import DocumentReader, find_inputs
from ssd_megatron.data.preprocess import preprocess
from ssd_megatron.training.exit_status import exit_status

EXAMPLE = """example:
  python tools/preprocess_data.py --input notes.jsonl --key text --tokenizer data/tokenizer.model --output data/notes
then in ds.json: "data": {"paths": ["data/notes"], "tokenizer": "data/tokenizer.model"}
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit status: 0 done, 1 not written, 2 the data cannot be used."""
    arguments = _parse(argv)
    return exit_status(lambda: _preprocess(arguments))


def _preprocess(arguments: argparse.Namespace) -> None:
    console = Console(stderr=True)
    reader = DocumentReader(
        find_inputs(arguments.input, arguments.format),
        key=arguments.key,
        on_error=arguments.on_error,
        report=lambda line: console.print(line, soft_wrap=True, highlight=False, markup=False),
    )
    preprocess(
        reader,
        tokenizer_path=arguments.tokenizer,
        prefix=arguments.output,
        total_bytes=reader.total_bytes,
        workers=arguments.workers,
        overwrite=arguments.overwrite,
        console=console,
    )
    if reader.broken:
        print(f"{reader.broken:,} broken records skipped", file=sys.stderr)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--input", type=Path, nargs="+", required=True, help="files, or folders of files, to read")
    parser.add_argument("--output", type=Path, required=True, help="prefix: PREFIX.bin, .idx and .json are written")
    parser.add_argument(
        "--tokenizer", type=Path, required=True, help="SentencePiece .model or Hugging Face tokenizer.json"
    )
    parser.add_argument(
        "--format",
        choices=("auto", "jsonl", "text", "parquet"),
        default="auto",
        help="auto goes by the suffix: .jsonl, .ndjson, .json; .parquet; anything else is text, a file one document",
    )
    parser.add_argument("--key", default="text", help="key (JSON) or column (parquet) of the text (default: text)")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="processes that tokenise (default: all cores)"
    )
    parser.add_argument(
        "--on_error", choices=("skip", "fail"), default="skip", help="what to do at a broken record (default: skip)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing output")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
