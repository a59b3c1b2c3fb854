"""Predict memory, communication and time of a run on a cluster, and recommend how to cut it.

Give --tensor, --pipeline or --expert for one layout (the others are 1; batch, ZeRO, recomputation and dense_gather as
configured); without them, all layouts that fit are compared.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import rich.console

from ssd_megatron.config.load import Hardware, RunConfig, load_config
from ssd_megatron.errors import ConfigError
from ssd_megatron.files import write_atomically
from ssd_megatron.model.memory import layout_of
from ssd_megatron.planning.cluster import GPUS, Cluster
from ssd_megatron.planning.recommend import Job, Plan, plan, recommend
from ssd_megatron.planning.show import as_json, details, overview
from ssd_megatron.training.exit_status import exit_status

EXAMPLE = """example:
  python tools/plan.py --ds_config examples/gpt/13b.json --gpus 64 --gpus_per_node 8 --gpu h200 --tensor 8
"""
PARALLEL = "ssd_megatron.parallel."
# What the recommendation chooses itself.
OURS = ("train_micro_batch_size_per_gpu=auto", "gradient_accumulation_steps=auto", f"{PARALLEL}dense_gather=")
# What does not matter here, and some layouts refuse.
IGNORED = ("ssd_megatron.ssd.rebalance_limit=",)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit status: 0 done, 1 not written, 2 the sizes are impossible or nothing fits."""
    arguments = _parse(argv)
    return exit_status(lambda: _plan(arguments))


def _plan(arguments: argparse.Namespace) -> None:
    if arguments.top < 1:
        raise ConfigError(f"--top ({arguments.top}) must be at least 1")
    cluster = _cluster(arguments)
    asked = {name: getattr(arguments, name) for name in ("tensor", "pipeline", "expert")}
    sizes = [f"{PARALLEL}{name}_parallel_size={1 if size is None else size}" for name, size in asked.items()]
    if any(size is not None for size in asked.values()):
        config = _load(arguments, sizes, cluster.gpus)
        job = _job(config, cluster)
        plans = [plan(job, layout_of(config))]
    else:
        job = _job(_load(arguments, [*sizes, *OURS], 1), cluster)
        plans = recommend(job)[: arguments.top]
    _show(job, plans, arguments.markdown)
    if arguments.json is not None:
        write_atomically(arguments.json, (json.dumps(as_json(job, plans), indent=2) + "\n").encode())


def _load(arguments: argparse.Namespace, overrides: list[str], world_size: int) -> RunConfig:
    given = [assignment for group in arguments.set for assignment in group]
    chosen = {assignment.partition("=")[0] for assignment in overrides}
    for assignment in given:
        if assignment.partition("=")[0] in chosen:
            raise ConfigError(
                f"--set {assignment} has no effect on what is compared here: leave it out, or name one layout with "
                "--tensor, --pipeline or --expert"
            )
    hardware = Hardware("cuda", bf16=True, name=arguments.gpu)
    return load_config(arguments.ds_config, [*given, *overrides, *IGNORED], world_size=world_size, hardware=hardware)


def _cluster(arguments: argparse.Namespace) -> Cluster:
    gpus, per_node = arguments.gpus, arguments.gpus_per_node
    if gpus < 1 or per_node < 1 or (gpus > per_node and gpus % per_node):
        raise ConfigError(f"--gpus ({gpus}) must be whole nodes of --gpus_per_node ({per_node})")
    if not 0 < arguments.fraction <= 1:
        raise ConfigError(f"--fraction ({arguments.fraction}) must be a share of the peak, such as 0.5")
    gpu = GPUS[arguments.gpu]
    speeds = {"intra": gpu.link_gbs, "inter": 50.0}  # one 400 Gb/s network card for each GPU
    for link in arguments.link:
        name, _, speed = link.partition("=")
        try:
            value = float(speed)
        except ValueError:
            value = 0.0
        if name not in speeds or value <= 0:
            raise ConfigError(f"--link {link}: must be intra=GB/s or inter=GB/s of one GPU, such as inter=50")
        speeds[name] = value
    return Cluster(gpu, gpus, min(gpus, per_node), arguments.fraction, speeds["intra"], speeds["inter"])


def _job(config: RunConfig, cluster: Cluster) -> Job:
    zero = config.deepspeed["zero_optimization"]
    return Job(
        config=config.ssd_megatron,
        cluster=cluster,
        batch=config.train_batch_size,
        dtype=config.dtype,
        reduce_bucket_size=zero["reduce_bucket_size"],
        multi_rank=zero["use_multi_rank_bucket_allreduce"],
    )


def _show(job: Job, plans: list[Plan], markdown: bool) -> None:
    console = rich.console.Console(highlight=False, width=None if sys.stdout.isatty() else 140)
    for table in (overview(job, plans), *details(job, plans[0])):
        if markdown:
            print(table.markdown())
        else:
            table.show(console)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ds_config", type=Path, required=True, help='DeepSpeed config with a section "ssd_megatron"')
    parser.add_argument("--set", action="append", nargs="+", default=[], metavar="PATH=VALUE", help="override a value")
    parser.add_argument("--gpus", type=int, required=True, help="GPUs in all")
    parser.add_argument("--gpus_per_node", type=int, default=8, help="(default: 8)")
    parser.add_argument("--gpu", choices=tuple(GPUS), default="h100", help="kind of GPU (default: h100)")
    parser.add_argument("--tensor", type=int, help="tensor-parallel size of the layout to predict")
    parser.add_argument("--pipeline", type=int, help="pipeline-parallel size")
    parser.add_argument("--expert", type=int, help="expert-parallel size")
    parser.add_argument(
        "--link", nargs="+", default=[], metavar="NAME=GB/s", help="intra=, inter=: one direction, for each GPU"
    )
    parser.add_argument(
        "--fraction", type=float, default=0.5, help="of the peak that arithmetic reaches (default: 0.5)"
    )
    parser.add_argument("--top", type=int, default=5, help="layouts to recommend (default: 5)")
    parser.add_argument("--markdown", action="store_true", help="tables in Markdown")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything to a file as well")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
