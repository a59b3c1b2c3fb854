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
from pathlib import Path
from typing import Any

from ssd_megatron.data.tokenizers import Tokenizer, load_tokenizer
from ssd_megatron.errors import ConfigError
from ssd_megatron.files import write_atomically
from ssd_megatron.inference.bert import MaskedModel, fill
from ssd_megatron.inference.ffn import MODES
from ssd_megatron.inference.load import DTYPES, from_saved
from ssd_megatron.inference.marks import MarkedTokenizer, bert_tokenizer, t5_tokenizer
from ssd_megatron.inference.model import CausalModel, Model
from ssd_megatron.inference.place import launched_group
from ssd_megatron.inference.sampling import Sampling
from ssd_megatron.inference.t5 import EncoderDecoder
from ssd_megatron.inference.text import Piece, answer, complete
from ssd_megatron.parallel.device import detect_hardware, local_device
from ssd_megatron.training.exit_status import exit_status
from ssd_megatron.training.saved_model import open_model, tokenizer_path

GUESSES = 5
# What says how a text goes on, with its defaults; a BERT has no use for it.
GENERATION: dict[str, Any] = {
    "max_new_tokens": 128,
    "greedy": False,
    "temperature": 1.0,
    "sampling_top_k": None,
    "top_p": 1.0,
    "repetition_penalty": 1.0,
    "seed": 0,
    "stop": [],
    "no_graphs": False,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit status: 0 done, 1 the checkpoint is damaged, 2 it cannot be used so."""
    arguments = _parse(argv)
    return exit_status(lambda: _generate(arguments))


def _generate(arguments: argparse.Namespace) -> None:
    if arguments.batch_size < 1:
        raise ConfigError(f"batch_size ({arguments.batch_size}) must be at least 1")
    saved = open_model(arguments.checkpoint)
    path = tokenizer_path(saved, arguments.tokenizer)
    tokenizer = load_tokenizer(path)
    dtype = DTYPES[arguments.dtype or ("bf16" if detect_hardware().bf16 else "fp32")]
    common = {"checkpoint": str(saved.folder), "mode": arguments.mode}
    with launched_group() as group:
        if group is not None and arguments.prompt is None and arguments.prompts is None:
            raise ConfigError(f"{group.size} processes cannot ask for prompts: give --prompt or --prompts")
        model = from_saved(saved, local_device(), dtype, arguments.mode, arguments.top_k, group)
        if arguments.no_graphs and model.device.type == "cpu":
            raise ConfigError("no_graphs (True) has no effect on a CPU")
        model.graphs = not arguments.no_graphs
        run = _runner(model, tokenizer, path, arguments)
        records = []
        for prompts in _prompts(arguments):
            records.append(common | run(prompts))
            if model.place.rank == 0:
                _report_speed(records[-1])
    if arguments.json is not None and model.place.rank == 0:
        write_atomically(arguments.json, (json.dumps(records, indent=1, ensure_ascii=False) + "\n").encode())


def _runner(
    model: Model, tokenizer: Tokenizer, path: Path, arguments: argparse.Namespace
) -> Callable[[list[str]], dict[str, Any]]:
    """What the model's family does with a batch of prompts: shows the result, and returns it for the JSON file."""
    if isinstance(model, MaskedModel):
        given = [name for name, default in GENERATION.items() if getattr(arguments, name) != default]
        if given:
            raise ConfigError(f"{given[0]} ({getattr(arguments, given[0])}) has no effect with model.family (bert)")
        marked = bert_tokenizer(tokenizer, path)
        guesses = GUESSES if arguments.guesses is None else arguments.guesses
        return lambda prompts: _fill(model, marked, prompts, guesses)
    if arguments.guesses is not None:
        raise ConfigError(f"guesses ({arguments.guesses}) has no effect with model.family ({model.config.family})")
    options = (_sampling(arguments), arguments.max_new_tokens, arguments.stop)
    if isinstance(model, EncoderDecoder):
        sentinels = t5_tokenizer(tokenizer, path, model.config)
        return lambda prompts: _show(prompts, answer(model, sentinels, prompts, *options), continues=False)
    assert isinstance(model, CausalModel)
    return lambda prompts: _show(prompts, complete(model, tokenizer, prompts, *options), continues=True)


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


def _prompts(arguments: argparse.Namespace) -> Iterator[list[str]]:
    """Batches of prompts: the one of the command line, those of a file, or what the user types."""
    if arguments.prompt is not None:
        yield [arguments.prompt]
    elif arguments.prompts is not None:
        lines = arguments.prompts.read_text(encoding="utf-8").splitlines()
        for start in range(0, len(lines), arguments.batch_size):
            yield lines[start : start + arguments.batch_size]
    else:
        while True:
            try:
                yield [input("prompt> ")]
            except EOFError:
                return


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
    parser.add_argument("--max_new_tokens", type=int, default=GENERATION["max_new_tokens"])
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
