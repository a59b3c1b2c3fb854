"""Continue texts with a trained GPT; fill in the masks of texts with a BERT; get T5's answer to texts, which of a text
with sentinels is what they stand for.

    python tools/generate.py --checkpoint DIR --prompt TEXT --max_new_tokens N [--greedy] [--mode dense|sparse|auto]
    python tools/generate.py --checkpoint DIR --prompts FILE --max_new_tokens N --json FILE
    python tools/generate.py --checkpoint DIR --max_new_tokens N          asks for prompts, one a line
    python tools/generate.py --checkpoint DIR --prompt "A [MASK] text"    of a BERT, with the likeliest tokens
    python tools/generate.py --checkpoint DIR --prompt "A <extra_id_0> text" --greedy     of a T5

DIR is a run_dir, of which the newest checkpoint is taken, or the folder of one checkpoint. FILE has a prompt a line.
A model that is too large for one device, or should be faster, is used by several processes together (tensor parallel):

    torchrun --nproc_per_node 2 tools/generate.py --checkpoint DIR --prompt TEXT
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from ssd_megatron.data.documents import not_utf8
from ssd_megatron.data.tokenizers import Tokenizer
from ssd_megatron.errors import ConfigError, DataError
from ssd_megatron.files import write_atomically
from ssd_megatron.inference.bert import MaskedModel, check_guesses, fill, masked_prompts
from ssd_megatron.inference.ffn import MODES
from ssd_megatron.inference.generate import check_lengths, room_after
from ssd_megatron.inference.load import DTYPES, from_saved, refuse_in_dense
from ssd_megatron.inference.marks import MarkedTokenizer, bert_tokenizer, t5_tokenizer
from ssd_megatron.inference.model import CausalModel, Model
from ssd_megatron.inference.place import launched_group
from ssd_megatron.inference.sampling import Sampling
from ssd_megatron.inference.t5 import EncoderDecoder
from ssd_megatron.inference.text import Piece, answer, complete_tokens, prompt_ids
from ssd_megatron.parallel.device import detect_hardware, local_device
from ssd_megatron.training.exit_status import exit_status
from ssd_megatron.training.saved_model import open_model, open_tokenizer

Work = Callable[[], dict[str, Any]]  # shows the results of a batch of prompts, and returns them for the JSON file

GUESSES = 5
NEW_TOKENS = 128  # at most, by default
# What says how a text goes on, with its defaults; a BERT has no use for it.
GENERATION: dict[str, Any] = {
    "max_new_tokens": None,
    "greedy": False,
    "temperature": 1.0,
    "sampling_top_k": None,
    "top_p": 1.0,
    "repetition_penalty": 1.0,
    "seed": 0,
    "stop": [],
    "no_graphs": False,
}


class _Options(NamedTuple):
    """How texts go on; max_new_tokens None: as many as by default, if there is room for them."""

    sampling: Sampling
    max_new_tokens: int | None
    stop: list[str]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit status: 0 done, 1 the checkpoint is damaged, 2 it cannot be used so."""
    arguments = _parse(argv)
    return exit_status(lambda: _generate(arguments))


def _generate(arguments: argparse.Namespace) -> None:
    for name in ("batch_size", "max_new_tokens"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ConfigError(f"{name} ({value}) must be at least 1")
    refuse_in_dense([arguments.mode], {"top_k": arguments.top_k})
    saved = open_model(arguments.checkpoint)
    tokenizer, path = open_tokenizer(saved, arguments.tokenizer)
    dtype = DTYPES[arguments.dtype or ("bf16" if detect_hardware().bf16 else "fp32")]
    common = {"checkpoint": str(saved.folder), "mode": arguments.mode}
    with launched_group() as group:
        if group is not None and arguments.prompt is None and arguments.prompts is None:
            raise ConfigError(f"{group.size} processes cannot ask for prompts: give --prompt or --prompts")
        model = from_saved(saved, local_device(), dtype, arguments.mode, arguments.top_k, group)
        if arguments.no_graphs and model.device.type == "cpu":
            raise ConfigError("no_graphs (True) has no effect on a CPU")
        model.graphs = not arguments.no_graphs
        records = []
        for work in _works(_preparer(model, tokenizer, path, arguments), arguments):
            records.append(common | work())
            if model.place.rank == 0:
                _report_speed(records[-1])
    if arguments.json is not None and model.place.rank == 0:
        write_atomically(arguments.json, (json.dumps(records, indent=1, ensure_ascii=False) + "\n").encode())


def _preparer(
    model: Model, tokenizer: Tokenizer, path: Path, arguments: argparse.Namespace
) -> Callable[[list[str]], Work]:
    """What refuses a batch with a prompt that the model's family cannot take, and else returns the work on it."""
    if isinstance(model, MaskedModel):
        given = [name for name, default in GENERATION.items() if getattr(arguments, name) != default]
        if given:
            raise ConfigError(f"{given[0]} ({getattr(arguments, given[0])}) has no effect with model.family (bert)")
        marked = bert_tokenizer(tokenizer, path)
        guesses = GUESSES if arguments.guesses is None else arguments.guesses
        check_guesses(model.config, marked, guesses)
        return partial(_filled, model, marked, guesses)
    if arguments.guesses is not None:
        raise ConfigError(f"guesses ({arguments.guesses}) has no effect with model.family ({model.config.family})")
    options = _Options(_sampling(arguments), arguments.max_new_tokens, arguments.stop)
    if isinstance(model, EncoderDecoder):
        return partial(_answered, model, t5_tokenizer(tokenizer, path, model.config), options)
    assert isinstance(model, CausalModel)
    return partial(_continued, model, tokenizer, options)


def _filled(model: MaskedModel, tokenizer: MarkedTokenizer, guesses: int, prompts: list[str]) -> Work:
    masked_prompts(model.config, tokenizer, prompts)
    return lambda: _fill(model, tokenizer, prompts, guesses)


def _answered(model: EncoderDecoder, tokenizer: MarkedTokenizer, options: _Options, prompts: list[str]) -> Work:
    most = options.max_new_tokens or NEW_TOKENS
    return lambda: _show(
        prompts, answer(model, tokenizer, prompts, options.sampling, most, options.stop), continues=False
    )


def _continued(model: CausalModel, tokenizer: Tokenizer, options: _Options, prompts: list[str]) -> Work:
    ids = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    lengths = [len(prompt) for prompt in ids]
    room = room_after(model.config, max(lengths))
    most = options.max_new_tokens or (NEW_TOKENS if room is None else max(1, min(NEW_TOKENS, room)))
    check_lengths(model.config, lengths, most)
    return lambda: _show(
        prompts, complete_tokens(model, tokenizer, ids, options.sampling, most, options.stop), continues=True
    )


def _fill(model: MaskedModel, tokenizer: MarkedTokenizer, prompts: list[str], guesses: int) -> dict[str, Any]:
    """Fill in the masks of some prompts as one batch, and show the likeliest tokens for each."""
    started = time.perf_counter()
    filled = fill(model, tokenizer, prompts, guesses)
    seconds = time.perf_counter() - started
    for text in filled:
        print(text.text)
        for mask in text.guesses:
            print("  " + ", ".join(f"{guess.text!r} {guess.probability:.3f}" for guess in mask))
    return {"prompts": prompts, "seconds": seconds, "filled": [asdict(text) for text in filled]}


def _show(prompts: list[str], pieces: Iterator[Piece], *, continues: bool) -> dict[str, Any]:
    """Show what comes after some prompts, with them if it `continues` them."""
    started = time.perf_counter()
    first = None
    texts, counts = [""] * len(prompts), [0] * len(prompts)
    streams = len(prompts) == 1
    shown = prompts if continues else [""] * len(prompts)
    if streams:
        print(shown[0], end="", flush=True)
    for piece in pieces:
        first = first or time.perf_counter()
        texts[piece.number] += piece.text
        counts[piece.number] = piece.tokens
        if streams:
            print(piece.text, end="", flush=True)
    seconds = time.perf_counter() - started
    if streams:
        print()
    else:
        for prompt, text in zip(shown, texts, strict=True):
            print(f"{prompt}{text}\n")
    return {
        "prompts": prompts,
        "texts": texts,
        "tokens": counts,
        "seconds": seconds,
        "seconds_to_first_text": (first or started) - started,
        "tokens_per_second": sum(counts) / seconds,
    }


def _report_speed(record: dict[str, Any]) -> None:
    if "tokens_per_second" in record:
        speed, wait = record["tokens_per_second"], record["seconds_to_first_text"]
        line = f"[{sum(record['tokens'])} tokens, {speed:.1f} tokens/s, first text after {wait:.3f} s]"
        print(line, file=sys.stderr)


def _works(prepare: Callable[[list[str]], Work], arguments: argparse.Namespace) -> Iterator[Work]:
    """On the prompt of the command line, on those of a file, which are all checked before the first work, or on what
    the user types, who may type something else after a prompt that is refused."""
    if arguments.prompt is not None:
        yield prepare([arguments.prompt])
    elif arguments.prompts is not None:
        lines, size = _lines(arguments.prompts), arguments.batch_size
        yield from [prepare(lines[start : start + size]) for start in range(0, len(lines), size)]
    else:
        while True:
            try:
                work = prepare([input("prompt> ")])
            except EOFError:
                return
            except ConfigError as error:
                print(f"error: {error}", file=sys.stderr)
            else:
                yield work


def _lines(path: Path) -> list[str]:
    try:
        with path.open(encoding="utf-8-sig", newline="\n") as stream:
            return [line.rstrip("\r\n") for line in stream]
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is {not_utf8(error)}") from error


def _sampling(arguments: argparse.Namespace) -> Sampling:
    return Sampling(
        greedy=arguments.greedy,
        temperature=arguments.temperature,
        top_k=arguments.sampling_top_k,
        top_p=arguments.top_p,
        repetition_penalty=arguments.repetition_penalty,
        seed=arguments.seed,
    )


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="DIR")
    prompts = parser.add_mutually_exclusive_group()
    prompts.add_argument("--prompt", help="text to continue")
    prompts.add_argument("--prompts", type=Path, metavar="FILE", help="texts to continue, one a line")
    parser.add_argument("--guesses", type=int, help=f"tokens to show for each mask of a BERT (default {GUESSES})")
    parser.add_argument("--batch_size", type=int, default=8, help="prompts of a file continued together (default 8)")
    parser.add_argument(
        "--max_new_tokens",
        type=int,
        metavar="N",
        help=f"default: {NEW_TOKENS}, or what learned positions leave after the longest prompt of a batch",
    )
    parser.add_argument("--mode", choices=MODES, default="auto", help="auto: sparse where it is faster (default)")
    parser.add_argument("--top_k", type=float, help="experts per token, mean over layers (default: as trained)")
    parser.add_argument("--greedy", action="store_true", help="always the likeliest token")
    parser.add_argument("--temperature", type=float, default=GENERATION["temperature"])
    parser.add_argument("--sampling_top_k", type=int, metavar="N", help="choose among the N likeliest tokens")
    parser.add_argument(
        "--top_p", type=float, default=GENERATION["top_p"], help="choose among the likeliest with this probability"
    )
    parser.add_argument("--repetition_penalty", type=float, default=GENERATION["repetition_penalty"])
    parser.add_argument("--seed", type=int, default=GENERATION["seed"])
    parser.add_argument("--no_graphs", action="store_true", help="launch every step of a GPU: no CUDA graphs")
    parser.add_argument("--stop", action="append", default=[], help="end the text before this string; may be repeated")
    parser.add_argument("--tokenizer", type=Path, help="default: the one the model was trained with")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bf16 where the device computes it fast, else fp32")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write texts and times to this file as well")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
