"""Make the embedded corpus: real text that every machine has, the sources of the running Python's standard library.

Writes documents.jsonl, tokenizer.model (SentencePiece, trained on it) and corpus.bin/.idx into one folder. The same
Python gives the same corpus. With --machine it is all Python and documentation text of the machine, for larger models.
"""

import argparse
import json
import os
import random
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from ssd_megatron.data.documents import DocumentReader, find_inputs
from ssd_megatron.data.library import find_sources, find_texts
from ssd_megatron.data.preprocess import corpus_files, preprocess, read_corpus_info
from ssd_megatron.data.tokenizers import MARKERS, load_tokenizer, train_sentencepiece
from ssd_megatron.errors import DataError
from ssd_megatron.files import sha256_of, write_atomically
from ssd_megatron.training.exit_status import exit_status

VOCAB_SIZE, MACHINE_VOCAB_SIZE = 4096, 32_768
SEED = 1  # of the order of the documents, so that the validation split is not one corner of the alphabet
MAX_LINES = 100_000  # that the tokenizer is trained on
EXAMPLE = "example:\n  python tools/embedded_corpus.py --out data/embedded\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit status: 0 done (now or before), 1 not written, 2 there is no library to read."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="folder (default: data/embedded, with --machine data/machine)")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that tokenise")
    parser.add_argument("--machine", action="store_true", help="all Python and documentation text of the machine")
    parser.add_argument("--reserve", nargs="*", choices=tuple(MARKERS), default=(), help="as of train_tokenizer.py")
    arguments = parser.parse_args(argv)
    return exit_status(lambda: _embed(arguments))


def _embed(arguments: argparse.Namespace) -> None:
    machine, library = arguments.machine, Path(sysconfig.get_path("stdlib"))
    out = arguments.out or Path("data/machine" if machine else "data/embedded")
    vocab_size = MACHINE_VOCAB_SIZE if machine else VOCAB_SIZE
    if is_finished(out, vocab_size, arguments.reserve):
        print(f"{out} is finished: nothing to do")
        return
    sources = find_texts() if machine else find_sources(library)
    if not sources:
        raise DataError(f"{library} has no Python sources: use data of your own with tools/preprocess_data.py")
    make_corpus(out, sources, library, arguments.reserve, vocab_size, workers=arguments.workers)


def is_finished(out: Path, vocab_size: int, reserve: Sequence[str]) -> bool:
    """True if the folder holds a complete corpus made with the tokenizer beside it.

    Raises:
        DataError: it is one of another vocabulary, or its tokenizer lacks a marker of the families in `reserve`.
    """
    tokenizer, prefix = out / "tokenizer.model", out / "corpus"
    if not tokenizer.exists() or not all(path.exists() for path in corpus_files(prefix)):
        return False
    info = read_corpus_info(prefix)
    if info is None or info.tokenizer_sha256 != sha256_of(tokenizer):
        return False
    if info.vocab_size != vocab_size:
        raise DataError(f"{out} has a corpus of {info.vocab_size:,} tokens, not {vocab_size:,}: give another --out")
    known = load_tokenizer(tokenizer)
    for family in reserve:
        lacking = [marker for marker in MARKERS[family] if known.find(marker) is None]
        if lacking:
            raise DataError(f"{tokenizer} has no {lacking[0]}, which --reserve {family} asks for: give another --out")
    return True


def make_corpus(
    out: Path, sources: Sequence[Path], library: Path, reserve: Sequence[str], vocab_size: int, *, workers: int
) -> None:
    """Write documents.jsonl, tokenizer.model and corpus.bin/.idx into a folder, over whatever was left there.

    Args:
        out: the folder, made if missing.
        sources: text files; those that are not UTF-8 are left out.
        library: sources below it are named without it.
        reserve: families whose markers the tokenizer has.
        vocab_size: of the tokenizer.
        workers: processes that tokenise.
    """
    sources = list(sources)
    random.Random(SEED).shuffle(sources)
    records = []
    for path in sources:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            print(f"{path} is not UTF-8; left out", file=sys.stderr)
            continue
        name = path.relative_to(library) if path.is_relative_to(library) else path
        records.append(json.dumps({"text": text, "source": str(name)}) + "\n")
    documents = out / "documents.jsonl"
    write_atomically(documents, "".join(records).encode())
    print(f"{documents}: {len(records):,} files, Python {sys.version.split()[0]}")

    reader = DocumentReader(find_inputs([documents]), on_error="fail")
    tokenizer = out / "tokenizer.model"
    train_sentencepiece(
        (document.text for document in reader),
        tokenizer,
        vocab_size,
        reserve=reserve,
        seed=SEED,
        max_lines=MAX_LINES,
    )
    print(f"{tokenizer}: {vocab_size:,} tokens")
    preprocess(
        reader,
        tokenizer_path=tokenizer,
        prefix=out / "corpus",
        total_bytes=reader.total_bytes,
        workers=workers,
        overwrite=True,
        console=Console(),
    )


if __name__ == "__main__":
    sys.exit(main())
