"""Sparse weights at equal FLOPs: what dynamic masks give over a smaller dense model (arXiv 2108.06277). Real runs on
the embedded corpus, same data and steps for each arm.

    python -m benchmarks.dynsparse [--out runs/dynsparse] [--sparsities 0.5 0.9] [--blocks 1 4 8 16] [--steps 1000]

Arms: `dense`; for each sparsity `small`, a dense model that is narrower until it costs as many FLOPs as the masked one,
and for each block size `static` and `dynamic` masks. Masked products count as free, as in the paper, although they are
computed. Each arm has the best of the same learning rates; with --paper_rate those of masked arms are multiplied by the
paper's factor. Runs that are finished are not made again. The last rows are what a block-sparse kernel would give on
this device. loss.png goes to --out.
"""

import math
import os
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.row import Missing, Row
from benchmarks.runs import finish_run, make_embedded_corpus
from benchmarks.ssd_vs_dense import base_config
from benchmarks.table import parser_for, report
from benchmarks.timing import paired, take_turns
from ssd_megatron.config.model import ModelConfig
from ssd_megatron.config.schema import SSDConfig
from ssd_megatron.model.cost import flops_per_token
from ssd_megatron.parallel.device import IS_CUDA
from ssd_megatron.training.metrics import read_metrics

HEADS, SEQ_LENGTH = 4, 128
# Loss of BERT-base at sparsity 0.9 by block size, of 2.350 of the dense model with as many FLOPs (the paper).
PAPER = {1: 2.160, 4: 2.272, 8: 2.295, 16: 2.311}
PAPER_SMALL = 2.350

Arm = tuple[str, dict[str, Any]]  # name, and settings of the section


def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_for(__doc__)
    parser.add_argument("--family", choices=("gpt", "bert"), default="gpt")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.5, 0.9])
    parser.add_argument("--blocks", type=int, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--updates", type=int, default=50)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--rates", type=float, nargs="+", default=[1.0, 2.0, 6.0], help="multiples of 1e-3 that each arm tries"
    )
    parser.add_argument("--paper_rate", action="store_true", help="multiply rates of masked arms as the paper does")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=Path("runs/dynsparse"))
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.layers, arguments.hidden, arguments.sparsities, arguments.blocks = 2, 64, [0.9], [16]
        arguments.steps, arguments.updates, arguments.out = 20, 5, arguments.out / "quick"
        arguments.rates = [1.0]
    make_embedded_corpus(arguments.family)
    return 0 if report("sparse weights", rows(arguments), arguments.json) else 1


def rows(arguments: Any) -> Iterator[Row | Missing]:
    """Run what is missing, and compare."""
    out = arguments.out.resolve()
    run = partial(_best, arguments, out)
    dense = run(("dense", {}))
    for sparsity in arguments.sparsities:
        small = run(small_arm(arguments, sparsity))
        for block in arguments.blocks:
            static, dynamic = (run(masked_arm(arguments, sparsity, block, mask)) for mask in ("static", "dynamic"))
            details: dict[str, float | str] = {
                "loss": dynamic["loss_dense"],
                "static": static["loss_dense"],
                "small": small["loss_dense"],
                "dense": dense["loss_dense"],
                "best rates": ", ".join(f"{of['rate']:g}" for of in (dynamic, static, small, dense)),
                "FLOPs / dense": dynamic["flops"] / dense["flops"],
                "small's": small["flops"] / dense["flops"],
                "ever live": dynamic["masks"]["ever"],
                "regrown, then pruned": dynamic["masks"]["regrown_pruned"],
            }
            if sparsity == 0.9:
                details["in the paper"] = PAPER[block] / PAPER_SMALL
            value, ideal = (of["loss_dense"] / small["loss_dense"] for of in (dynamic, dense))
            yield Row(f"sparsity {sparsity:g}, {block}x{block}: loss / small dense", value, 1.0, ideal, details=details)
    _draw(out)
    yield from kernel_rows(256 if arguments.quick else 1024)


def small_arm(arguments: Any, sparsity: float) -> Arm:
    """Of all widths, the one whose FLOPs come nearest to the masked model's; an even size of each head."""
    masked = _flops(arguments, arguments.hidden, 1 - sparsity)
    widths = range(2 * HEADS, arguments.hidden + 1, 2 * HEADS)
    hidden = min(widths, key=lambda width: abs(_flops(arguments, width) - masked))
    return f"small-{hidden}", {"model": _shape(arguments, hidden)}


def masked_arm(arguments: Any, sparsity: float, block: int, mask: str) -> Arm:
    settings = {
        "sparsity": sparsity,
        "block_size": block,
        "mask": mask,
        "scale_learning_rate": arguments.paper_rate,
    }
    updates = {"updates": arguments.updates} if mask == "dynamic" else {}
    rate = "-paper-rate" if arguments.paper_rate else ""
    return f"{mask}-{block}-at-{sparsity:g}{rate}", {"weight_sparsity": settings | updates}


def config_of(arguments: Any, out: Path, arm: Arm, rate: float = 1.0) -> dict[str, Any]:
    """The ds.json of one arm, in a folder of its own below `out`."""
    name, settings = arm
    folder = out / (name if rate == 1 else f"{name}-rate-{rate:g}")
    config = base_config(arguments.steps, arguments.seed, folder, SEQ_LENGTH, arguments.family)
    config["optimizer"]["params"]["lr"] *= rate
    section = config["ssd_megatron"]
    section["model"] |= _shape(arguments, arguments.hidden)
    if arguments.family == "bert":  # or a short run of a small one stays where frequencies of words are all it knows
        section["model"]["norm_position"] = "pre"
    section["ssd"] = {"schedule": "dense", "num_experts": 8, "check_interval": arguments.steps}
    section["training"]["eval_interval"] = max(10, arguments.steps // 5)
    section["logging"] = {"plots": False}
    for field, value in settings.items():
        section[field] = section.get(field, {}) | value
    return config


def kernel_rows(size: int) -> Iterator[Row | Missing]:
    """Forward and backward of one matrix, torch's block-sparse (BSR) products against dense ones. The gradient of the
    weights is a dense product in both: torch has no other. Inputs of the sparse product lie as it wants them."""
    if IS_CUDA:
        yield Missing("block-sparse products", "measured on CPUs only")
        return
    tokens, generator = size, torch.Generator().manual_seed(0)
    x_HT, w_FH, dy_FT = (
        torch.randn(shape, generator=generator) for shape in ((size, tokens), (4 * size, size), (4 * size, tokens))
    )
    for sparsity in (0.5, 0.9, 0.95):
        live = torch.rand(4 * size // 16, size // 16, generator=generator) >= sparsity
        masked_FH = w_FH * live.repeat_interleave(16, 0).repeat_interleave(16, 1)
        forward, backward = (w.contiguous().to_sparse_bsr((16, 16)) for w in (masked_FH, masked_FH.T))

        def products(w: torch.Tensor, w_transposed: torch.Tensor, _turn: int) -> None:
            w @ x_HT, w_transposed @ dy_FT, dy_FT @ x_HT.T

        variants = {"dense": (masked_FH, masked_FH.T), "sparse": (forward, backward)}
        times = take_turns({name: partial(products, *pair) for name, pair in variants.items()}, turns=5)
        ratio = paired(times["sparse"], times["dense"])
        details = {"dense ms": 1e3 * min(times["dense"]), "sparse ms": 1e3 * min(times["sparse"])}
        yield Row(f"16x16 at {sparsity:g}, fp32: sparse / dense", ratio, 1.0, 1 - sparsity, details=details)
    yield Missing("16x16, bf16", "torch has no block-sparse product in bf16 for CPUs")


def _best(arguments: Any, out: Path, arm: Arm) -> dict[str, Any]:
    """Summary of the arm's best run, and its `rate`."""
    runs = [
        finish_run(config_of(arguments, out, arm, rate), arguments.threads) | {"rate": rate} for rate in arguments.rates
    ]
    return min(runs, key=lambda summary: math.inf if summary["loss_dense"] is None else summary["loss_dense"])


def _shape(arguments: Any, hidden: int) -> dict[str, int]:
    sizes = {"num_layers": arguments.layers, "hidden_size": hidden, "num_attention_heads": HEADS}
    return sizes | {"ffn_hidden_size": 4 * hidden}


def _flops(arguments: Any, hidden: int, live: float = 1.0) -> float:
    config = base_config(arguments.steps, arguments.seed, Path("run"), SEQ_LENGTH, arguments.family)
    model = config["ssd_megatron"]["model"]
    return flops_per_token(ModelConfig(**model | _shape(arguments, hidden)), SSDConfig(), live).dense


def _draw(out: Path) -> None:
    """Validation loss of every run in the folder over its FLOPs."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for number, path in enumerate(sorted(out.glob("*/summary.json"))):
        records = read_metrics(path.parent)
        flops = {r["step"]: r["flops"] for r in records if r["kind"] == "train"}
        evals = [r for r in records if r["kind"] == "eval"]
        style = "--" if path.parent.name.startswith("static") else "-"
        axes.plot(
            [flops[r["step"]] for r in evals],
            [r["loss_dense"] for r in evals],
            style,
            color=f"C{number % 10}",
            label=path.parent.name,
        )
    axes.set(xlabel="training FLOPs", ylabel="validation loss", xscale="log")
    axes.legend()
    FigureCanvasAgg(figure).print_png(out / "loss.png")


if __name__ == "__main__":
    sys.exit(main())
