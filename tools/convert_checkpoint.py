"""Checkpoints to transformers' folders, and transformers' models to checkpoints.

    python tools/convert_checkpoint.py export --from DIR --to HF_DIR [--mode dense|sparse] [--dtype bf16]
    python tools/convert_checkpoint.py import --from HF_DIR --to DIR

export: DIR is a run_dir, of which the newest checkpoint is taken, or the folder of one checkpoint. Dense models become
OPTForCausalLM or LlamaForCausalLM, as their settings say, BertForMaskedLM (BertForPreTraining with a sentence
objective) or T5ForConditionalGeneration; sparse GPTs bring modeling_ssd.py with them, for trust_remote_code.

import: DIR gets a checkpoint of step 0 that holds weights alone. A run starts from it with

    deepspeed pretrain_ssd.py --ds_config ds.json --set ssd_megatron.checkpoint.start_from=DIR

and the model's settings, which the tool prints.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from ssd_megatron.export.convert import export_model, import_model
from ssd_megatron.training.checkpoint_tools import DTYPES
from ssd_megatron.training.exit_status import exit_status
from ssd_megatron.training.saved_model import open_model


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; returns the exit status: 0 done, 1 damaged or not written, 2 it cannot be converted."""
    arguments = _parse(argv)
    return exit_status(lambda: _convert(arguments))


def _convert(arguments: argparse.Namespace) -> None:
    if arguments.command == "export":
        saved = open_model(arguments.source)
        what = export_model(
            saved,
            arguments.to,
            arguments.mode,
            tokenizer=arguments.tokenizer,
            dtype=DTYPES[arguments.dtype],
        )
        print(f"{arguments.to}: {what}, of {saved.folder}")
    else:
        folder = import_model(arguments.source, arguments.to, arguments.tokenizer)
        model = open_model(folder).settings.model.model_dump(mode="json")
        print(f"{folder}: weights of {arguments.source}; a run that starts from it has in its ds.json:")
        print(json.dumps({"ssd_megatron": {"model": model, "checkpoint": {"start_from": str(arguments.to)}}}, indent=1))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in (("export", "write a folder for transformers"), ("import", "write a checkpoint")):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("--from", dest="source", type=Path, required=True, metavar="DIR")
        command.add_argument("--to", type=Path, required=True, metavar="DIR", help="a folder that is not there yet")
        command.add_argument("--tokenizer", type=Path, help="default: the one that belongs to the model")
        if name == "export":
            command.add_argument("--mode", choices=("dense", "sparse"), default="dense")
            command.add_argument("--dtype", choices=sorted(DTYPES), default="fp32", help="of the weights")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
