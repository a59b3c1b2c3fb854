"""Fine-tune a trained model (gpt, bert, t5) to classify texts or pairs of texts, and evaluate it dense and sparse.

Examples are TSV files as GLUE has them (the first line names the columns) or JSON lines. Lines of SNLI and MultiNLI
with the gold_label "-", on which annotators did not agree, have no class and must be left out of a file first. --from
is a run_dir, of which the newest checkpoint is taken, or the folder of one checkpoint. --to becomes a checkpoint with
experts as they were, which --evaluate takes. Intervals are of 95 %.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssd_megatron.errors import ConfigError

if TYPE_CHECKING:
    from ssd_megatron.classification.finetune import Epoch, Recipe
    from ssd_megatron.classification.labelled import Columns
    from ssd_megatron.parallel.topology import Topology

EXAMPLE = """examples:
  python tools/finetune.py --from runs/quickstart --train SST-2/train.tsv --dev SST-2/dev.tsv --to sst2 --epochs 3
  python tools/finetune.py --evaluate sst2 --dev SST-2/dev.tsv --mode dense,sparse --top_k 2 4 8
  grep -v '"gold_label": "-"' snli_1.0_train.jsonl > snli_train.jsonl
"""
RECIPE = ("epochs", "lr", "batch", "warmup", "weight_decay", "clip", "dropout", "dtype", "seed")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit status: 0 done, 1 the checkpoint is damaged, 2 it cannot be used so."""
    arguments = _parse(argv)
    # After the arguments: importing torch and DeepSpeed takes seconds.
    from ssd_megatron.training.exit_status import exit_status

    return exit_status(lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> None:
    from ssd_megatron.files import locked, write_atomically
    from ssd_megatron.parallel.device import share_cores
    from ssd_megatron.parallel.launch import require_one_process
    from ssd_megatron.parallel.topology import initialize_topology, leave_topology
    from ssd_megatron.training.checkpoint_tools import find_checkpoint

    require_one_process("tools/finetune.py")
    _refuse_without_effect(arguments)
    folder = find_checkpoint(arguments.start or arguments.evaluate)
    share_cores()
    topology = initialize_topology()
    if arguments.start:
        with locked(arguments.to, "--to"):
            result = _finetune(arguments, folder, topology)
    else:
        result = _evaluate(arguments, folder, topology)
    leave_topology()
    if arguments.json is not None:
        write_atomically(arguments.json, f"{json.dumps(result, indent=1)}\n".encode())


def _finetune(arguments: argparse.Namespace, source: Path, topology: "Topology") -> dict[str, Any]:
    from rich.progress import track

    from ssd_megatron.classification.finetune import finetune
    from ssd_megatron.classification.labelled import labels_of, read_labelled
    from ssd_megatron.classification.saved_classifier import begin_classifier
    from ssd_megatron.files import LOCK, require_empty
    from ssd_megatron.training.saved_model import Classification

    require_empty(arguments.to, but=(LOCK,))
    recipe = _recipe(arguments)
    columns, texts = read_labelled(arguments.train, _columns(arguments))
    classification = Classification(labels_of(texts), [*columns.texts, columns.label], str(arguments.train))
    opened = begin_classifier(
        source,
        topology,
        classification,
        arguments.tokenizer,
        dropout=recipe.dropout,
        seed=recipe.seed,
    )
    recipe.check(opened.settings)
    train, validation = opened.read(arguments.train), opened.read(arguments.dev)
    length = opened.settings.model.seq_length
    for path, data in ((arguments.train, train), (arguments.dev, validation)):
        print(
            f"{path}: {len(data.samples):,} examples of {len(opened.labels)} classes, {data.majority:.1%} in the "
            f"largest; {data.cut:,} cut to {length} tokens"
        )
    epochs: list[Epoch] = []

    def report(epoch: "Epoch") -> None:
        epochs.append(epoch)
        dev = _shown(epoch.dev.accuracy, epoch.dev.error)
        print(f"epoch {epoch.number}: loss {epoch.train_loss:.4f}, dev accuracy {dev}", flush=True)

    started = time.perf_counter()
    best = finetune(opened.classifier, train.samples, validation.samples, recipe, track, report)
    seconds = time.perf_counter() - started
    folder = opened.write(arguments.to)
    print(f"{folder}: epoch {best.number}, dev accuracy {_shown(best.dev.accuracy, best.dev.error)}, {recipe.mode}")
    return {
        "from": str(source),
        "checkpoint": str(folder),
        "train": str(arguments.train),
        "dev": str(arguments.dev),
        "labels": opened.labels,
        "examples": {"train": len(train.samples), "dev": len(validation.samples)},
        "cut": {"train": train.cut, "dev": validation.cut},
        "majority": validation.majority,
        "recipe": asdict(recipe),
        "epochs": [asdict(epoch) | {"dev_accuracy": epoch.dev.accuracy} for epoch in epochs],
        "best_epoch": best.number,
        "accuracy": best.dev.accuracy,
        "seconds": seconds,
    }


def _evaluate(arguments: argparse.Namespace, folder: Path, topology: "Topology") -> dict[str, Any]:
    from rich.console import Console
    from rich.table import Table

    from ssd_megatron.classification.classifier import accuracy
    from ssd_megatron.classification.saved_classifier import open_classifier
    from ssd_megatron.inference.load import variants

    opened = open_classifier(folder, topology, arguments.tokenizer)
    only_sparse = {name: getattr(arguments, name) for name in ("top_k", "router")}
    found = variants(opened.settings, arguments.mode, arguments.top_k or [None], only_sparse, lacking=None)
    data = opened.read(arguments.dev, _columns(arguments))
    if arguments.router == "recomputed":
        opened.classifier.recompute_routers()
    table = Table("variant", "accuracy", "loss")
    results = []
    for name, top_k in found:
        opened.classifier.use("sparse" if top_k else "dense", top_k)
        score = accuracy(opened.classifier, data.samples)
        table.add_row(name, _shown(score.accuracy, score.error), f"{score.loss:.4f}")
        results.append(
            {
                "mode": "sparse" if top_k else "dense",
                "name": name,
                "top_k": top_k,
                "accuracy": score.accuracy,
                "accuracy_error": score.error,
                "loss": score.loss,
            }
        )
    Console().print(table)
    print(f"{len(data.samples):,} examples, {data.majority:.1%} in the largest class")
    return {
        "checkpoint": str(folder),
        "dev": str(arguments.dev),
        "labels": opened.labels,
        "examples": len(data.samples),
        "cut": data.cut,
        "majority": data.majority,
        "router": arguments.router or "as_saved",
        "results": results,
    }


def _recipe(arguments: argparse.Namespace) -> "Recipe":
    from ssd_megatron.classification.finetune import Recipe

    mode = arguments.mode or "dense"
    if mode not in ("dense", "sparse"):
        raise ConfigError(f"mode ({mode}) must be dense or sparse with --from")
    assert {field.name for field in fields(Recipe)} == {*RECIPE, "mode"}
    return Recipe(mode=mode, **{name: value for name in RECIPE if (value := getattr(arguments, name)) is not None})


def _columns(arguments: argparse.Namespace) -> "Columns | None":
    """Those that a user named; None if those of the file, or of the training file, are to be taken."""
    from ssd_megatron.classification.labelled import Columns

    if (arguments.columns is None) != (arguments.label is None):
        raise ConfigError("columns and label go together: give both, or neither")
    if arguments.columns is None:
        return None
    if len(arguments.columns) > 2:
        raise ConfigError(f"columns ({' '.join(arguments.columns)}) must be one text or a pair")
    return Columns(tuple(arguments.columns), arguments.label)


def _refuse_without_effect(arguments: argparse.Namespace) -> None:
    useless = ("top_k", "router") if arguments.start else ("train", "to", *RECIPE)
    given = [name for name in useless if getattr(arguments, name) is not None]
    option = "--from" if arguments.start else "--evaluate"
    if given:
        raise ConfigError(f"{', '.join(given)} has no effect with {option}: leave it out")
    missing = [name for name in ("train", "to") if arguments.start and getattr(arguments, name) is None]
    if missing:
        raise ConfigError(f"--from needs --{' and --'.join(missing)}")


def _shown(value: float, error: float) -> str:
    return f"{value:.2%} ± {error:.2%}"


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--from", dest="start", type=Path, metavar="DIR", help="fine-tune this model")
    what.add_argument("--evaluate", type=Path, metavar="DIR", help="evaluate this classifier")
    parser.add_argument("--train", type=Path, metavar="FILE", help="examples to train on, which have all labels")
    parser.add_argument("--dev", type=Path, required=True, metavar="FILE", help="examples to evaluate on")
    parser.add_argument("--to", type=Path, metavar="DIR", help="where the classifier is written; not there yet")
    parser.add_argument("--columns", nargs="+", metavar="NAME", help="of one text or a pair (default: GLUE's names)")
    parser.add_argument("--label", metavar="NAME", help="column of the label, with --columns")
    parser.add_argument("--mode", help="of fine-tuning: dense (default) or sparse; of --evaluate both with a comma")
    parser.add_argument("--top_k", type=float, nargs="+", help="--evaluate: experts per token, means over layers")
    parser.add_argument(
        "--router",
        choices=("as_saved", "recomputed"),
        help="--evaluate: routers as they were saved, fine-tuned if sparse (default), or centroids of the weights now",
    )
    parser.add_argument("--epochs", type=int, help="default: 3")
    parser.add_argument("--lr", type=float, help="peak learning rate (default: 5e-5)")
    parser.add_argument("--batch", type=int, help="examples of an optimizer step (default: 32)")
    parser.add_argument("--warmup", type=float, help="share of the steps in which the rate rises (default: 0.1)")
    parser.add_argument("--weight_decay", type=float, help="of matrices (default: 0.01)")
    parser.add_argument("--clip", type=float, help="largest norm of the gradient (default: 1)")
    parser.add_argument("--dropout", type=float, help="before the classifier (default: 0.1)")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help="of training's products (default: fp32)")
    parser.add_argument("--seed", type=int, help="default: 1")
    parser.add_argument("--tokenizer", type=Path, help="default: the one the model was trained with")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results to this file as well")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
