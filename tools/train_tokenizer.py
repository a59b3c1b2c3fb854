"""Train a SentencePiece tokenizer on documents of your own."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ssd_megatron.data.documents import DocumentReader, find_inputs
from ssd_megatron.data.tokenizers import MARKERS, load_tokenizer, train_sentencepiece
from ssd_megatron.errors import DataError

EXAMPLE = """example:
  python tools/train_tokenizer.py --input data/my_text/ notes.jsonl --output data/tokenizer.model --vocab_size 32000
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit status: 0 done, 1 not written, 2 the data cannot be used."""
    arguments = _parse(argv)
    # After the arguments: importing torch and DeepSpeed takes seconds.
    from ssd_megatron.training.exit_status import exit_status

    return exit_status(lambda: _train(arguments))


def _train(arguments: argparse.Namespace) -> None:
    if arguments.output.exists() and not arguments.overwrite:
        raise DataError(f"{arguments.output} exists already: choose another output, or overwrite it (--overwrite)")
    reader = DocumentReader(
        find_inputs(arguments.input, arguments.format),
        key=arguments.key,
        on_error=arguments.on_error,
        report=lambda line: print(line, file=sys.stderr),
    )
    train_sentencepiece(
        (document.text for document in reader),
        arguments.output,
        arguments.vocab_size,
        reserve=arguments.reserve,
        seed=arguments.seed,
    )
    vocab_size = load_tokenizer(arguments.output).vocab_size
    print(f"{arguments.output}: {vocab_size:,} tokens, {reader.broken:,} broken records skipped")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--input", type=Path, nargs="+", required=True, help="files, or folders of files, to read")
    parser.add_argument("--output", type=Path, required=True, help="the tokenizer to write, named .model")
    parser.add_argument("--vocab_size", type=int, required=True, help="number of tokens, at least 262")
    parser.add_argument(
        "--format",
        choices=("auto", "jsonl", "text", "parquet"),
        default="auto",
        help="auto goes by the suffix: .jsonl, .ndjson, .json; .parquet; anything else is text, a file one document",
    )
    parser.add_argument("--key", default="text", help="key (JSON) or column (parquet) of the text (default: text)")
    parser.add_argument(
        "--on_error", choices=("skip", "fail"), default="skip", help="what to do at a broken record (default: skip)"
    )
    parser.add_argument(
        "--reserve",
        nargs="+",
        choices=tuple(MARKERS),
        default=(),
        help="families whose objectives need tokens that no text contains: "
        + "; ".join(f"{family} {markers[0]} ... {markers[-1]}" for family, markers in MARKERS.items()),
    )
    parser.add_argument("--seed", type=int, default=1, help="of the choice of lines when there are very many")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing tokenizer")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
