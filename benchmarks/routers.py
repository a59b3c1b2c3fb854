"""Which router, and experts of which size? Validation loss of sparse runs that compute as many neurons per token,
beside a dense network of just that many (Liu et al., A Unified View of Sparse Feed-Forward Networks, arXiv 2305.13999).

    python -m benchmarks.routers --out runs/routers [--routers centroid hash ...] [--sizes 1 4 16 64 256] [--steps 1000]
                                 [--seed 1] [--expansion 4] [--threads N] [--json FILE] [--quick]

Each run is sparse from its first step on the embedded corpus; a network has --expansion times the neurons that a token
computes, and only the router's own FLOPs differ, which the details have. A row is loss / the dense network's loss. Runs
that are finished are not run again. --quick shows that it works, not how well: 30 steps, three routers, one size.
"""

import argparse
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.row import Missing, Row
from benchmarks.runs import finish_run, make_embedded_corpus
from benchmarks.ssd_vs_dense import base_config
from benchmarks.table import parser_for, report
from ssd_megatron.config.schema import NEURON_ROUTERS
from ssd_megatron.ffn.router_kinds import KINDS
from ssd_megatron.training.metrics import read_metrics

SIZES = (1, 4, 16, 64, 256)  # neurons of an expert; the numbers of experts are squares, as product keys need
ACTIVE = 256  # neurons that a token computes; hidden size 256 as well
BRUTE_FORCE_BELOW = 16  # neurons of an expert: masking the whole network is then the faster way


def config_of(out: Path, steps: int, seed: int, name: str, model: dict[str, Any], ssd: dict[str, Any]) -> Any:
    config = base_config(steps, seed, out / f"{name.replace(' ', '-')}-{seed}", seq_length=128)
    section = config["ssd_megatron"]
    section["model"] |= model
    section["ssd"] = ssd
    return config


def sparse_settings(router: str, size: int, expansion: int) -> dict[str, Any]:
    """The section ssd: experts of `size` neurons, as many of them as have ACTIVE neurons."""
    return {
        "schedule": "sparse",
        "router": router,
        "num_experts": ACTIVE * expansion // size,
        "top_k": ACTIVE // size,
        "top_k_allocation": "equal",
        "backend": "reference" if size < BRUTE_FORCE_BELOW else "auto",
        "check_interval": 1_000_000,  # nothing is to be decided
    }


def impossible(router: str, size: int) -> str | None:
    """Why there is no such run."""
    if router in NEURON_ROUTERS and size > 1:
        return "chooses single neurons"
    if router in ("centroid", "pkm") and size == ACTIVE:
        return "one expert for a token gives it no gradient"
    return None


def rows(args: argparse.Namespace) -> Iterator[Row | Missing]:
    out = args.out.resolve()
    dense_config = config_of(out, args.steps, args.seed, "dense", {"ffn_hidden_size": ACTIVE}, {"schedule": "dense"})
    dense = finish_run(dense_config, args.threads)
    for router in args.routers:
        for size in args.sizes:
            name = f"{router}, experts of {size}"
            if (reason := impossible(router, size)) is not None:
                yield Missing(name, reason)
                continue
            model, ssd = {"ffn_hidden_size": ACTIVE * args.expansion}, sparse_settings(router, size, args.expansion)
            config = config_of(out, args.steps, args.seed, f"{router}-{size}", model, ssd)
            run = finish_run(config, args.threads)
            records = read_metrics(Path(config["ssd_megatron"]["run_dir"]))
            loads = [record["expert_load"] for record in records if record["kind"] == "load"]
            details = {
                "loss": run["loss_sparse"],
                "dense network's": dense["loss_dense"],
                "FLOPs / dense network's": run["flops"] / dense["flops"],
                "busiest expert / mean": sum(loads[-1]) / len(loads[-1]) if loads else float("nan"),
                "s": run["seconds"],
            }
            yield Row(name, run["loss_sparse"] / dense["loss_dense"], goal=1.0, ideal=0.0, details=details)


def main(argv: Sequence[str] | None = None) -> None:
    parser = parser_for(__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/routers"))
    parser.add_argument("--routers", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--expansion", type=int, default=4, help="neurons of a network over those that a token computes"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args(argv)
    if args.quick:
        args.out, args.steps, args.sizes = args.out / "quick", 30, [16]
        args.routers = ["centroid", "switch", "hash"]
    make_embedded_corpus()
    report(f"routers at equal active neurons, {args.steps} steps", rows(args), args.json)


if __name__ == "__main__":
    main()
