"""From a trained dense model to one with experts: observe, split, make routers, calibrate.

Source: MoEfication (arXiv 2110.01786).
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from ssd_megatron.config.model import Activation
from ssd_megatron.errors import ConfigError
from ssd_megatron.ffn.activations import ACTIVATIONS
from ssd_megatron.moefication.experts import set_mode, ssd_settings, use
from ssd_megatron.moefication.layers import LayerExperts, LayerJob, Router, read_result, run_jobs
from ssd_megatron.moefication.observation import observe
from ssd_megatron.moefication.splits import Split
from ssd_megatron.moefication.task import Quality, Task
from ssd_megatron.moefication.tuning import tune
from ssd_megatron.switching.assignment import expert_size
from ssd_megatron.training.checkpoint_files import checkpoints
from ssd_megatron.training.saved_model import SavedModel, open_model, write_model

CALIBRATED = ".mlp.bank.w_out"  # what calibration trains

# What takes the place of an activation that is never 0.
TO_RELU: dict[str, Activation] = dict.fromkeys(("gelu", "gelu_tanh", "silu"), "relu")
TO_RELU |= dict.fromkeys(("geglu", "geglu_tanh", "swiglu"), "reglu")


@dataclass(frozen=True)
class Conversion:
    """What is asked for.

    Attributes:
        calibrate_steps: of training `w_out` alone, sparse; 0: none.
    """

    num_experts: int
    top_k: int
    split: Split
    router: Router
    calibrate_steps: int = 0
    calibrate_rate: float = 1e-4

    def check(self, neurons: int) -> None:
        """Raises ConfigError if a network of so many neurons cannot be split so."""
        expert_size(neurons, self.num_experts)
        if not 1 <= self.top_k <= self.num_experts:
            raise ConfigError(f"top_k ({self.top_k}) must be between 1 and num_experts ({self.num_experts})")


@dataclass(frozen=True)
class Converted:
    """What it gave: quality of the dense model, of the sparse one, and after calibration, if there was any."""

    dense: Quality
    sparse: Quality
    calibrated: Quality | None
    recall: list[float]  # of each network, with top_k experts

    def record(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)


def converted_table(converted: Converted) -> Table:
    """What became of the model's quality."""
    table = Table("model", "loss", *(() if converted.dense.accuracy is None else ("accuracy",)))
    rows = {"dense": converted.dense, "sparse": converted.sparse, "sparse, calibrated": converted.calibrated}
    for name, quality in rows.items():
        if quality is not None:
            accuracy = () if quality.accuracy is None else (f"{quality.accuracy:.1%}",)
            table.add_row(name, f"{quality.loss:.4f}", *accuracy)
    recall = sum(converted.recall) / len(converted.recall)
    table.caption = f"the chosen experts have {recall:.1%} of the activation"
    return table


class Workshop:
    """A dense model and the results by network that already exist for it, in a folder of their own.

    Args:
        saved: the dense checkpoint.
        task: the same model, in this process.
        folder: for results, made if it is not there.
        routers: to be made for every split.
        tokens: on which every network is observed.
        processes: among which networks are dealt out.
    """

    def __init__(
        self,
        saved: SavedModel,
        task: Task,
        folder: Path,
        routers: Sequence[Router],
        *,
        tokens: int,
        seed: int,
        processes: int,
        progress: Progress,
    ) -> None:
        self.saved, self.task, self.routers, self.progress = saved, task, tuple(routers), progress
        self._tokens, self._seed, self._processes = tokens, seed, processes
        for ffn in task.ffns.values():  # experts go by where a neuron lies in the dense checkpoint
            torch.arange(len(ffn.bank.neuron_ids), out=ffn.bank.neuron_ids)
        # Results of other weights, other tokens or other routers are of no use.
        weights = sorted(record.sha256 for record in saved.index.files)
        asked = json.dumps([weights, task.name, tokens, seed, self.routers])
        self._folder = folder / hashlib.sha256(asked.encode()).hexdigest()[:12]
        self._folder.mkdir(parents=True, exist_ok=True)

    def split(self, split: Split, num_experts: int) -> list[LayerExperts]:
        """Experts and routers of all networks, made now or before."""
        set_mode(self.task.ffns, "dense")
        inputs = observe(self.task, self._folder, self._tokens, self.progress)
        jobs = [
            LayerJob(
                self.saved.folder,
                network,
                path,
                split,
                num_experts,
                self.routers,
                self._seed + number,
                self._folder / f"{split}_{num_experts}_{number}.safetensors",
            )
            for number, (network, path) in enumerate(zip(self.task.ffns, inputs, strict=True))
        ]
        bar = self.progress.add_task(f"{split}: experts and routers", total=len(jobs))
        for _ in run_jobs(jobs, self._processes):
            self.progress.update(bar, advance=1)
        return [read_result(job) for job in jobs]


def adapt_to_relu(
    saved: SavedModel, make_task: Callable[[SavedModel], Task], root: Path, steps: int, rate: float, progress: Progress
) -> SavedModel:
    """The model with ReLU in place of its activation, all of it tuned for so many steps; a checkpoint in `root`, the
    one that is there already if this was done before.

    Raises:
        ConfigError: it would not be tuned at all.
    """
    before = saved.settings.model.activation
    if ACTIVATIONS[before].sparse:
        return saved
    if not steps:
        raise ConfigError(
            f"model.activation ({before}) lets every neuron fire on every token, so that none can be left out: adapt "
            "the model to ReLU first, with --relu_adapt_steps 500 or more"
        )
    if not checkpoints(root):
        model = saved.settings.model.model_copy(update={"activation": TO_RELU[before]})
        settings = replace(saved.settings, model=model)
        task = make_task(replace(saved, settings=settings))
        tune(task, task.parameters.values(), steps, rate, f"{before} to {TO_RELU[before]}", progress)
        write_model(root, settings, _tensors(task), data=saved.data)
    return open_model(root)


def convert(workshop: Workshop, wanted: Conversion) -> Converted:
    """Give the model its experts, and measure it before and after."""
    task = workshop.task
    layers = workshop.split(wanted.split, wanted.num_experts)
    dense = task.evaluate()
    use(task.ffns, layers, wanted.router, wanted.top_k)
    set_mode(task.ffns, "sparse")
    sparse, calibrated = task.evaluate(), None
    if wanted.calibrate_steps:
        w_out = [parameter for name, parameter in task.parameters.items() if name.endswith(CALIBRATED)]
        tune(task, w_out, wanted.calibrate_steps, wanted.calibrate_rate, "calibrating", workshop.progress)
        calibrated = task.evaluate()
    recall = [float(layer.recall[wanted.router][wanted.top_k - 1]) for layer in layers]
    return Converted(dense, sparse, calibrated, recall)


def write_converted(workshop: Workshop, wanted: Conversion, root: Path) -> Path:
    """Write the model, as `convert` has left it, as a checkpoint in `root`; returns its folder."""
    before = workshop.saved.settings
    settings = replace(
        before,
        ssd=ssd_settings(before.ssd, wanted.router, wanted.num_experts, wanted.top_k),
        top_k=[wanted.top_k] * len(workshop.task.ffns),
        has_experts=True,
    )
    return write_model(root, settings, _tensors(workshop.task), data=workshop.saved.data)


def _tensors(task: Task) -> Iterator[tuple[str, Tensor]]:
    return ((name, parameter.detach().cpu()) for name, parameter in task.parameters.items())
