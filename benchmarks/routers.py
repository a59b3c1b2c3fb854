"""Which router, and experts of which size? Validation loss of sparse runs that compute as many neurons per token,
beside a dense network of just that many (Liu et al., A Unified View of Sparse Feed-Forward Networks, arXiv 2305.13999).

    python -m benchmarks.routers --out runs/routers [--routers centroid hash ...] [--sizes 1 4 16 64 256] [--steps 1000]
                                 [--seeds 1 2 3] [--expansion 4] [--jobs 2] [--json FILE] [--quick]

Each run is sparse from its first step on the embedded corpus; a network has --expansion times the neurons that a token
computes, and only the router's own FLOPs differ, which the details have. A row is loss / the dense network's loss, the
mean over seeds. Runs that are finished are not run again. routers.png goes to --out. --quick shows that it works, not
how well: 30 steps, three routers, one size, one seed.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.row import Missing, Row
from benchmarks.runs import finish_run, make_embedded_corpus, runs_at_once
from benchmarks.ssd_vs_dense import base_config
from benchmarks.table import parser_for, report
from ssd_megatron.config.schema import NEURON_ROUTERS
from ssd_megatron.ffn.router_kinds import KINDS
from ssd_megatron.training.metrics import read_metrics

SIZES = (1, 4, 16, 64, 256)  # neurons of an expert; the numbers of experts are squares, as product keys need
ACTIVE = 256  # neurons that a token computes; hidden size 256 as well
BRUTE_FORCE_BELOW = 16  # neurons of an expert: masking the whole network is then the faster way


class Run(NamedTuple):
    """How a run ended; `busiest` is the load of the busiest expert over the mean, if it was measured."""

    loss: float
    flops: float
    busiest: float | None
    seconds: float


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


def run(args: argparse.Namespace, out: Path, seed: int, name: str, model: dict[str, Any], ssd: dict[str, Any]) -> Run:
    """Run, or resume, or take a finished run."""
    config = config_of(out, args.steps, seed, name, model, ssd)
    summary = finish_run(config, max(1, (os.cpu_count() or 1) // args.jobs))
    loss = summary["loss_dense" if ssd["schedule"] == "dense" else "loss_sparse"]
    records = read_metrics(Path(config["ssd_megatron"]["run_dir"]))
    loads = [record["expert_load"] for record in records if record["kind"] == "load"]
    return Run(loss, summary["flops"], sum(loads[-1]) / len(loads[-1]) if loads else None, summary["seconds"])


def rows(args: argparse.Namespace) -> Iterator[Row | Missing]:
    out = args.out.resolve()
    with runs_at_once(args.jobs) as pool:

        def start(name: str, model: dict[str, Any], ssd: dict[str, Any]) -> list[Future[Run]]:
            return [pool.submit(run, args, out, seed, name, model, ssd) for seed in args.seeds]

        dense_runs = start("dense", {"ffn_hidden_size": ACTIVE}, {"schedule": "dense"})
        sparse_runs = {
            (router, size): start(
                f"{router}-{size}",
                {"ffn_hidden_size": ACTIVE * args.expansion},
                sparse_settings(router, size, args.expansion),
            )
            for router in args.routers
            for size in args.sizes
            if impossible(router, size) is None
        }
        dense = [future.result() for future in dense_runs]
        curves: dict[str, dict[int, list[float]]] = {}
        for router in args.routers:
            for size in args.sizes:
                name = f"{router}, experts of {size}"
                if (reason := impossible(router, size)) is not None:
                    yield Missing(name, reason)
                    continue
                sparse = [future.result() for future in sparse_runs[router, size]]
                ratios = [mine.loss / reference.loss for mine, reference in zip(sparse, dense, strict=True)]
                curves.setdefault(router, {})[size] = ratios
                yield Row(name, fmean(ratios), goal=1.0, ideal=0.0, details=details_of(sparse, dense, ratios))
    draw(out / "routers.png", curves, args)


def details_of(sparse: Sequence[Run], dense: Sequence[Run], ratios: Sequence[float]) -> dict[str, float | str]:
    details: dict[str, float | str] = {
        "loss": fmean(mine.loss for mine in sparse),
        "dense network's": fmean(reference.loss for reference in dense),
        "seeds": len(ratios),
        "FLOPs / dense network's": sparse[0].flops / dense[0].flops,
        "s": fmean(mine.seconds for mine in sparse),
    }
    if len(ratios) > 1:
        details["deviation over seeds"] = stdev(ratios)
    loads = [mine.busiest for mine in sparse if mine.busiest is not None]
    return details | ({"busiest expert / mean": fmean(loads)} if loads else {})


def draw(path: Path, curves: Mapping[str, Mapping[int, Sequence[float]]], args: argparse.Namespace) -> None:
    """Loss against the dense network's over the size of experts: a line through the means, and every seed's point."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    axes.axhline(0, color="black", linewidth=0.8, label=f"dense network of {ACTIVE}")
    for number, (router, by_size) in enumerate(curves.items()):
        percent = {size: [100 * (ratio - 1) for ratio in by_size[size]] for size in sorted(by_size)}
        axes.plot(list(percent), [fmean(values) for values in percent.values()], "o-", color=f"C{number}", label=router)
        for size, values in percent.items():
            axes.plot([size] * len(values), values, "_", color=f"C{number}")
    axes.set_xscale("log", base=2)
    axes.set(
        xlabel="neurons of an expert",
        ylabel=f"loss above the dense network's, % (after {args.steps} steps)",
        title=f"{ACTIVE} of {ACTIVE * args.expansion} neurons for each token",
    )
    axes.legend(fontsize="small")
    FigureCanvasAgg(figure).print_png(path)


def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_for(__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/routers"))
    parser.add_argument("--routers", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument(
        "--expansion", type=int, default=4, help="neurons of a network over those that a token computes"
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time, each with its share of the cores")
    args = parser.parse_args(argv)
    if args.quick:
        args.out, args.steps, args.sizes, args.seeds = args.out / "quick", 30, [16], [1]
        args.routers = ["centroid", "switch", "hash"]
    make_embedded_corpus()
    met = report(f"routers at equal active neurons, {args.steps} steps", rows(args), args.json)
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
