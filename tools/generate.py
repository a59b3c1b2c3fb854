"""Continue texts with a trained model.

    python tools/generate.py --checkpoint DIR --prompt TEXT --max_new_tokens N [--greedy] [--mode dense|sparse|auto]
    python tools/generate.py --checkpoint DIR --prompts FILE --max_new_tokens N --json FILE
    python tools/generate.py --checkpoint DIR --max_new_tokens N          asks for prompts, one a line

DIR is a run_dir, of which the newest checkpoint is taken, or the folder of one checkpoint. FILE has a prompt a line.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ssd_megatron.data.tokenizers import Tokenizer, load_tokenizer
from ssd_megatron.errors import ConfigError, DataError
from ssd_megatron.files import write_atomically
from ssd_megatron.inference.ffn import MODES
from ssd_megatron.inference.load import DTYPES, from_saved
from ssd_megatron.inference.model import CausalModel
from ssd_megatron.inference.sampling import Sampling
from ssd_megatron.inference.text import complete
from ssd_megatron.parallel.device import detect_hardware, local_device
from ssd_megatron.training.checkpoint_files import CheckpointError
from ssd_megatron.training.saved_model import open_model, tokenizer_path


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit status: 0 done, 1 the checkpoint is damaged, 2 it cannot be used so."""
    arguments = _parse(argv)
    try:
        sampling = _sampling(arguments)
        saved = open_model(arguments.checkpoint)
        tokenizer = load_tokenizer(tokenizer_path(saved, arguments.tokenizer))
        dtype = DTYPES[arguments.dtype or ("bf16" if detect_hardware().bf16 else "fp32")]
        model = from_saved(saved, local_device(), dtype, arguments.mode, arguments.top_k)
        records = []
        for prompts in _prompts(arguments):
            record = _continue(model, tokenizer, prompts, sampling, arguments)
            records.append({"checkpoint": str(saved.folder), "mode": arguments.mode, **record})
        if arguments.json is not None:
            write_atomically(arguments.json, (json.dumps(records, indent=1, ensure_ascii=False) + "\n").encode())
    except (ConfigError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _continue(
    model: CausalModel, tokenizer: Tokenizer, prompts: list[str], sampling: Sampling, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Continue some prompts as one batch, show the text, and say how long it took."""
    started = time.perf_counter()
    first = None
    texts, counts = [""] * len(prompts), [0] * len(prompts)
    streams = len(prompts) == 1
    if streams:
        print(prompts[0], end="", flush=True)
    for piece in complete(model, tokenizer, prompts, sampling, arguments.max_new_tokens, arguments.stop):
        first = first or time.perf_counter()
        texts[piece.number] += piece.text
        counts[piece.number] = piece.tokens
        if streams:
            print(piece.text, end="", flush=True)
    seconds = time.perf_counter() - started
    if streams:
        print()
    else:
        for prompt, text in zip(prompts, texts, strict=True):
            print(f"{prompt}{text}\n")
    to_first = (first or started) - started
    rate = sum(counts) / seconds
    print(f"[{sum(counts)} tokens, {rate:.1f} tokens/s, first text after {to_first:.3f} s]", file=sys.stderr)
    return {
        "prompts": prompts,
        "texts": texts,
        "tokens": counts,
        "seconds": seconds,
        "seconds_to_first_text": to_first,
        "tokens_per_second": rate,
    }


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
    parser.add_argument("--batch_size", type=int, default=8, help="prompts of a file continued together (default 8)")
    parser.add_argument("--max_new_tokens", type=int, default=128)
    parser.add_argument("--mode", choices=MODES, default="auto", help="auto: sparse where it is faster (default)")
    parser.add_argument("--top_k", type=float, help="experts per token, mean over layers (default: as trained)")
    parser.add_argument("--greedy", action="store_true", help="always the likeliest token")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--sampling_top_k", type=int, metavar="N", help="choose among the N likeliest tokens")
    parser.add_argument("--top_p", type=float, default=1.0, help="choose among the likeliest with this probability")
    parser.add_argument("--repetition_penalty", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stop", action="append", default=[], help="end the text before this string; may be repeated")
    parser.add_argument("--tokenizer", type=Path, help="default: the one the model was trained with")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bf16 where the device computes it fast, else fp32")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write texts and times to this file as well")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
