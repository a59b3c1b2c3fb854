"""A trained dense model as one with experts, of which every token computes a few (MoEfication, arXiv 2110.01786).

    python tools/moefy.py --from DIR --to DIR [--num_experts E] [--top_k K] [--partition clustering|graph|random]
        [--router mlp|similarity|oracle|random] [--calibrate_steps N] [--compare] [--json FILE]

--from is a run_dir, the folder of one checkpoint, a classifier that tools/finetune.py has written, or a transformers
folder that tools/convert_checkpoint.py can import.
--to gets a checkpoint of step 0 that trains, generates and exports like any other. Networks are worked on by several
processes; started again after a stop, the tool goes on with those that are left.
"""

import argparse
import hashlib
import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from ssd_megatron.classification.saved_classifier import classifier_of
from ssd_megatron.errors import ConfigError
from ssd_megatron.export.convert import import_model
from ssd_megatron.export.hf_folder import read_json
from ssd_megatron.ffn.activations import ACTIVATIONS
from ssd_megatron.files import LOCK, locked, require_empty, write_atomically
from ssd_megatron.moefication.allocation import ALLOCATIONS
from ssd_megatron.moefication.classification_task import ClassificationTask
from ssd_megatron.moefication.comparison import compare, compared, draw
from ssd_megatron.moefication.conversion import (
    Conversion,
    Workshop,
    adapt_to_relu,
    convert,
    converted_table,
    write_converted,
)
from ssd_megatron.moefication.layers import ROUTERS
from ssd_megatron.moefication.splits import SPLITS
from ssd_megatron.moefication.task import LanguageTask, Task, data_of
from ssd_megatron.parallel.launch import require_one_process
from ssd_megatron.parallel.topology import Topology, initialize_topology, leave_topology
from ssd_megatron.training.checkpoint_files import checkpoints
from ssd_megatron.training.exit_status import exit_status
from ssd_megatron.training.model_alone import load_alone
from ssd_megatron.training.plots import png
from ssd_megatron.training.saved_model import SavedModel, Settings, open_model, tokenizer_path

WORK = ".moefy"  # below --to, while the tool works
NEURONS = 32  # of an expert, by default, as in the paper
EVAL_TOKENS = 32768  # by default
RATE = 1e-4  # by default, of calibration and of adapting to ReLU
LEAST = {
    "num_experts": 1,
    "processes": 1,
    "tokens": 2,  # of which one is held out from the routers' training
    "eval_tokens": 1,
    "batch": 1,
    "calibrate_steps": 0,
    "relu_adapt_steps": 0,
}
LEAST_WIDTH = 100  # of the table, also where nobody says how wide lines may be
SHARE = 0.2  # of the experts that a token computes, by default


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit status: 0 done, 1 damaged or not written, 2 it cannot be done so."""
    arguments = _parse(argv)
    return exit_status(lambda: _moefy(arguments))


def _moefy(arguments: argparse.Namespace) -> None:
    require_one_process("tools/moefy.py")
    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with locked(arguments.to, "--to"):
        if not (arguments.to / WORK).exists():  # of a start that was interrupted
            require_empty(arguments.to, but=(LOCK,))
        saved, wanted = _source(arguments)
        topology = initialize_topology()
        with Progress(*columns, console=console) as progress:
            written, table = _convert(arguments, saved, wanted, topology, progress)
        leave_topology()
        shutil.rmtree(arguments.to / WORK)
        for path in written:
            print(path)
        Console(width=max(LEAST_WIDTH, console.width)).print(table)


def _work(arguments: argparse.Namespace) -> Path:
    """Folder for what is made on the way, of these arguments alone."""
    mattering = ("source", "data", "tokenizer", "held_out", "seed", "batch", "relu_adapt_steps", "relu_adapt_lr")
    files = sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in arguments.source.glob("*.*"))
    asked = [files, *(str(getattr(arguments, name)) for name in mattering)]
    return Path(arguments.to) / WORK / hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:12]


def _source(arguments: argparse.Namespace) -> tuple[SavedModel, Conversion]:
    """The dense model, and what is to become of it."""
    _check_numbers(arguments)
    source = arguments.source
    if _is_of_transformers(source):
        source = _work(arguments) / "imported"
        if not checkpoints(source):
            shutil.rmtree(source, ignore_errors=True)  # what an interrupted import left
            import_model(arguments.source, source, arguments.tokenizer)
    saved = open_model(source)
    if arguments.tokenizer is not None or saved.settings.tokenizer is not None:
        path = tokenizer_path(saved, arguments.tokenizer)
        saved = replace(saved, settings=replace(saved.settings, tokenizer=path))
    neurons = saved.settings.model.ffn_hidden_size
    num_experts = max(1, neurons // NEURONS) if arguments.num_experts is None else arguments.num_experts
    wanted = Conversion(
        num_experts=num_experts,
        top_k=max(1, round(SHARE * num_experts)) if arguments.top_k is None else arguments.top_k,
        split=arguments.partition,
        router=arguments.router,
        top_k_allocation=arguments.top_k_allocation,
        calibrate_steps=arguments.calibrate_steps,
        calibrate_rate=RATE if arguments.calibrate_lr is None else arguments.calibrate_lr,
    )
    wanted.check(neurons)
    _refuse_without_effect(arguments, saved.settings)
    return saved, wanted


def _is_of_transformers(folder: Path) -> bool:
    """A run_dir has a config.json, too."""
    path = folder / "config.json"
    return path.exists() and "model_type" in read_json(path)


def _check_numbers(arguments: argparse.Namespace) -> None:
    for name, least in LEAST.items():
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise ConfigError(f"{name} ({value}) must be at least {least}")
    for name in ("calibrate_lr", "relu_adapt_lr"):
        value = getattr(arguments, name)
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"{name} ({value}) must be above 0")


def _refuse_without_effect(arguments: argparse.Namespace, settings: Settings) -> None:
    activation, classifies = settings.model.activation, settings.classification is not None
    useless = {
        "calibrate_lr": None if arguments.calibrate_steps else "calibrate_steps (0)",
        "relu_adapt_lr": None if arguments.relu_adapt_steps else "relu_adapt_steps (0)",
        "relu_adapt_steps": f"model.activation ({activation})" if ACTIVATIONS[activation].sparse else None,
        "eval_tokens": "a classifier, which is measured on all of --held_out" if classifies else None,
        "held_out": None if classifies else "a language model, which is measured on its corpus's validation split",
    }
    for name, reason in useless.items():
        if reason is not None and (value := getattr(arguments, name)):
            raise ConfigError(f"{name} ({value}) has no effect with {reason}: leave it out")


def _convert(
    arguments: argparse.Namespace, saved: SavedModel, wanted: Conversion, topology: Topology, progress: Progress
) -> tuple[list[Path], Table]:
    """Returns what was written, and what to show."""
    work = _work(arguments)
    classifies = saved.settings.classification is not None
    make_task = _classification(arguments, topology) if classifies else _language(arguments, saved, wanted, topology)
    adapt = arguments.relu_adapt_steps, RATE if arguments.relu_adapt_lr is None else arguments.relu_adapt_lr
    saved = adapt_to_relu(saved, make_task, work / "adapted", *adapt, progress)
    workshop = Workshop(
        saved,
        make_task(saved),
        work,
        ROUTERS if arguments.compare else (wanted.router,),
        tokens=arguments.tokens,
        seed=arguments.seed,
        processes=arguments.processes,
        progress=progress,
    )
    written: list[Path] = []
    about = {"from": str(arguments.source), "step": saved.index.step} | asdict(wanted)
    if arguments.compare:
        dense, points = compare(workshop, wanted.num_experts, wanted.top_k_allocation)
        about["comparison"] = [point.record() for point in points]
        written.append(arguments.to / "comparison.png")
        write_atomically(written[-1], png(draw(dense, points)))
    converted = convert(workshop, wanted)
    about |= converted.record()
    written.append(arguments.json or arguments.to / "moefication.json")
    write_atomically(written[-1], (json.dumps(about, indent=1) + "\n").encode())
    written.append(write_converted(workshop, wanted, arguments.to))
    return written, compared(dense, points) if arguments.compare else converted_table(converted)


def _language(
    arguments: argparse.Namespace, saved: SavedModel, wanted: Conversion, topology: Topology
) -> Callable[[SavedModel], Task]:
    """Makes the task of a language model."""
    data = data_of(saved, arguments.data, arguments.tokenizer)

    def make(source: SavedModel) -> Task:
        return LanguageTask(
            load_alone(source, topology, wanted.num_experts),
            source.settings.model,
            data,
            _work(arguments) / "data_cache",
            seed=arguments.seed,
            tokens=arguments.tokens,
            steps=max(arguments.calibrate_steps, arguments.relu_adapt_steps),
            batch_size=arguments.batch,
            held_out_tokens=EVAL_TOKENS if arguments.eval_tokens is None else arguments.eval_tokens,
        )

    return make


def _classification(arguments: argparse.Namespace, topology: Topology) -> Callable[[SavedModel], Task]:
    """Makes the task of a classifier."""
    if arguments.held_out is None:
        raise ConfigError("a classifier needs --held_out, a file of labelled texts to measure it on")

    def make(source: SavedModel) -> Task:
        assert source.settings.classification is not None
        train = Path(arguments.data or source.settings.classification.train)
        opened = classifier_of(source, topology, arguments.tokenizer)
        return ClassificationTask(opened, train, arguments.held_out, seed=arguments.seed, batch_size=arguments.batch)

    return make


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--from", dest="source", type=Path, required=True, metavar="DIR")
    add("--to", type=Path, required=True, metavar="DIR", help="a folder that is not there yet")
    add("--num_experts", type=int, metavar="E", help=f"of each network (default: of {NEURONS} neurons each)")
    add("--top_k", type=int, metavar="K", help=f"experts that a token computes (default: {SHARE:.0%}%)")
    add(
        "--top_k_allocation",
        choices=ALLOCATIONS,
        default="measured",
        help="as many experts in every layer, or at the same cost more where they save more (default: %(default)s)",
    )
    add("--partition", choices=SPLITS, default="clustering", help="how neurons are grouped")
    add("--router", choices=ROUTERS, default="mlp", help="who chooses experts")
    add(
        "--data",
        metavar="PREFIX",
        help="a corpus, without .bin and .idx (default: what the model was trained on); "
        "of a classifier a file of labelled texts",
    )
    add("--held_out", type=Path, metavar="FILE", help="labelled texts on which a classifier is measured")
    add("--tokenizer", type=Path, help="default: the one that belongs to the model")
    add("--tokens", type=int, default=65536, help="on which networks are observed (default: %(default)s)")
    add("--eval_tokens", type=int, help=f"held out, on which language models are measured (default: {EVAL_TOKENS})")
    add("--batch", type=int, default=16, help="samples of a batch (default: %(default)s)")
    add("--calibrate_steps", type=int, default=0, metavar="N", help="train w_out alone, sparse (default: not at all)")
    add("--calibrate_lr", type=float, help=f"with --calibrate_steps (default: {RATE:g})")
    add("--relu_adapt_steps", type=int, default=0, metavar="N", help="train with ReLU first, in place of another")
    add("--relu_adapt_lr", type=float, help=f"with --relu_adapt_steps (default: {RATE:g})")
    add("--compare", action="store_true", help="measure every split with every router, 5 to 100 %% of the neurons")
    add("--processes", type=int, default=os.cpu_count(), help="that share the networks (default: one a core)")
    add("--seed", type=int, default=1234)
    add("--json", type=Path, metavar="FILE", help="where the figures go (default: moefication.json in --to)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
