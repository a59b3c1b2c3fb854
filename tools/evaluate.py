"""Loss, perplexity and bits per byte of a trained model on texts, in one pass dense, sparse and with several top_k.

    python tools/evaluate.py --checkpoint DIR --text FILE [--mode dense,sparse] [--top_k 2,4,8] [--json FILE]
    python tools/evaluate.py --checkpoint DIR --data PREFIX

DIR is a run_dir, of which the newest checkpoint is taken, or the folder of one checkpoint. Texts are files or folders
as tools/preprocess_data.py reads them; PREFIX is what it has written. Intervals are of 95 %, with windows taken as
independent; one window alone has none. Of BERT and T5 the loss is that of masked tokens and of spans, in samples as in
training, the same ones each time; bits per byte are of a GPT alone. Several processes that a launcher starts use the
model together (tensor parallel).
"""

import argparse
import json
import math
import sys
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from megatron.core.datasets.indexed_dataset import IndexedDataset
from rich.console import Console
from rich.table import Table

from ssd_megatron.data.checks import check_ids, check_made_with
from ssd_megatron.data.corpus import open_corpus
from ssd_megatron.data.documents import DocumentReader, find_inputs
from ssd_megatron.data.tokenizers import Tokenizer
from ssd_megatron.errors import ConfigError, DataError
from ssd_megatron.files import write_atomically
from ssd_megatron.inference.evaluate import (
    Part,
    Score,
    Variant,
    Window,
    evaluate,
    masked_samples,
    objective_of,
    windows,
)
from ssd_megatron.inference.load import DTYPES, from_saved, variants
from ssd_megatron.inference.place import launched_group
from ssd_megatron.parallel.device import local_device
from ssd_megatron.training.exit_status import exit_status
from ssd_megatron.training.saved_model import SavedModel, Settings, open_model, open_tokenizer


class Task(NamedTuple):
    """What is to be predicted, the bytes of its texts (None if not all of them are predicted), and what it is like."""

    parts: Sequence[Part]
    bytes: int | None
    about: dict[str, int]


class Text(NamedTuple):
    """Token ids of one document, and the bytes that they stand for."""

    ids: list[int]
    bytes: int


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit status: 0 done, 1 the checkpoint is damaged, 2 it cannot be used so."""
    arguments = _parse(argv)
    return exit_status(lambda: _evaluate(arguments))


def _evaluate(arguments: argparse.Namespace) -> None:
    for name in ("window", "stride", "max_tokens"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ConfigError(f"{name} ({value}) must be at least 1")
    saved = open_model(arguments.checkpoint)
    tokenizer, path = open_tokenizer(saved, arguments.tokenizer)
    wanted = _variants(saved.settings, arguments)
    make_task = _windows if saved.settings.model.family == "gpt" else _samples
    task = make_task(saved, tokenizer, path, arguments)
    with launched_group() as group:
        model = from_saved(saved, local_device(), DTYPES[arguments.dtype], wanted[0].mode, group=group)
        scores = evaluate(model, task.parts, wanted)
        records = [_record(score, scores[0], task.bytes) for score in scores]
        Console().print(_table(records, scores[0].variant.label))
    if arguments.json is not None and model.place.rank == 0:
        about = {"checkpoint": str(saved.folder), "step": saved.index.step, "bytes": task.bytes}
        about |= {"tokens": int(scores[0].counts.sum())} | task.about
        content = json.dumps(about | {"results": records}, indent=1) + "\n"
        write_atomically(arguments.json, content.encode())


def _windows(saved: SavedModel, tokenizer: Tokenizer, path: Path, arguments: argparse.Namespace) -> Task:
    model = saved.settings.model
    window = arguments.window or model.seq_length
    if model.position_embedding == "learned" and window > model.seq_length:
        raise ConfigError(
            f"window ({window}) exceeds the model's learned positions: use at most model.seq_length "
            f"({model.seq_length})"
        )
    length = window + 1
    stride = arguments.stride or max(1, (length - 1) // 2)
    if not 1 <= stride < length:
        raise ConfigError(f"stride ({stride}) must be at least 1 and at most the window's {length - 1} tokens")
    size, parts = 0, list[Window]()
    for text in _texts(arguments, tokenizer, path):
        # A document begins after the end of another.
        parts += windows([tokenizer.eod, *text.ids], length, stride)
        size += text.bytes
    if not parts:
        raise DataError("there is no text to evaluate on")
    return Task(parts, size, {"windows": len(parts), "window": length - 1, "stride": stride})


def _samples(saved: SavedModel, tokenizer: Tokenizer, path: Path, arguments: argparse.Namespace) -> Task:
    for name in ("window", "stride"):
        if getattr(arguments, name) is not None:
            family = saved.settings.model.family
            raise ConfigError(f"{name} ({getattr(arguments, name)}) has no effect with model.family ({family})")
    objective = objective_of(saved, tokenizer, path)
    tokens = [token for text in _texts(arguments, tokenizer, path) for token in (*text.ids, tokenizer.eod)]
    parts = list(masked_samples(tokens, objective))
    if not parts:
        raise DataError(f"there are {len(tokens)} tokens to evaluate on, but a sample has {objective.text_length}")
    return Task(parts, None, {"samples": len(parts)})


def _variants(settings: Settings, arguments: argparse.Namespace) -> list[Variant]:
    try:
        means = [None] if arguments.top_k is None else [float(mean) for mean in arguments.top_k.split(",")]
    except ValueError as error:
        raise ConfigError(f"top_k ({arguments.top_k}) must be numbers with commas between them") from error
    found = variants(settings, arguments.mode, means, {"top_k": arguments.top_k}, lacking=settings.only_in_training)
    return [Variant("sparse" if top_k else "dense", top_k or [], label) for label, top_k in found]


def _texts(arguments: argparse.Namespace, tokenizer: Tokenizer, path: Path) -> Iterator[Text]:
    """Documents, until they have the tokens that were asked for."""
    left = arguments.max_tokens or sys.maxsize
    documents = _corpus(arguments.data, tokenizer, path) if arguments.data else _documents(arguments.text, tokenizer)
    for ids in documents:
        kept = list(islice(ids, left))
        left -= len(kept)
        if kept:
            yield Text(kept, len(tokenizer.decode(kept).encode()))
        if left == 0:
            return


def _documents(paths: list[Path], tokenizer: Tokenizer) -> Iterator[list[int]]:
    for document in DocumentReader(find_inputs(paths)):
        yield tokenizer.encode(document.text)


def _corpus(prefix: str, tokenizer: Tokenizer, path: Path) -> Iterator[list[int]]:
    corpus = open_corpus(prefix)
    check_made_with(corpus, path)
    dataset = IndexedDataset(prefix)
    for number in range(len(dataset)):
        ids = dataset[number].tolist()
        check_ids(corpus, ids, tokenizer)
        yield ids[:-1] if ids and ids[-1] == tokenizer.eod else ids


def _record(score: Score, first: Score, size: int | None) -> dict[str, Any]:
    """A variant's line of the JSON file; errors are half of an interval, null where there is none."""
    # A nat per token in bits per byte.
    bits = None if size is None else float(score.counts.sum()) / size / math.log(2)
    above, above_error = score.difference(first)
    known = not math.isnan(score.error)
    return {
        "mode": score.variant.mode,
        "name": score.variant.label,
        "top_k": list(score.variant.top_k),
        "loss": score.loss,
        "loss_error": score.error if known else None,
        "perplexity": math.exp(score.loss),
        "perplexity_interval": [math.exp(score.loss + sign * score.error) for sign in (-1, 1)] if known else None,
        "bits_per_byte": None if bits is None else score.loss * bits,
        "bits_per_byte_error": score.error * bits if known and bits is not None else None,
        "loss_above_first": above,
        "loss_above_first_error": above_error if known else None,
    }


def _table(records: list[dict[str, Any]], first: str) -> Table:
    table = Table("variant", "loss", "perplexity", "bits per byte", f"loss above {first}")
    for r in records:
        interval = r["perplexity_interval"]
        table.add_row(
            r["name"],
            _with_error(r, "loss", ".4f"),
            f"{r['perplexity']:.3f}" + (f" ({interval[0]:.3f} - {interval[1]:.3f})" if interval else ""),
            "" if r["bits_per_byte"] is None else _with_error(r, "bits_per_byte", ".4f"),
            "" if r["name"] == first else _with_error(r, "loss_above_first", "+.4f"),
        )
    return table


def _with_error(record: dict[str, Any], name: str, form: str) -> str:
    error = record[f"{name}_error"]
    return format(record[name], form) + ("" if error is None else f" ± {error:.4f}")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="DIR")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", type=Path, nargs="+", metavar="FILE", help="files or folders of text")
    source.add_argument("--data", metavar="PREFIX", help="a corpus, by its path without .bin and .idx")
    parser.add_argument("--mode", help="dense, sparse, or both with a comma (default: what the model can)")
    parser.add_argument("--top_k", help="experts per token, means over layers with commas (default: as trained)")
    parser.add_argument("--window", type=int, help="tokens of a window (default: the model's seq_length)")
    parser.add_argument("--stride", type=int, help="tokens between windows (default: half a window)")
    parser.add_argument("--max_tokens", type=int, help="stop after so many tokens")
    parser.add_argument("--tokenizer", type=Path, help="default: the one the model was trained with")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to this file as well")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
