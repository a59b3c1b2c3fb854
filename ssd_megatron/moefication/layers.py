"""The work on one network: split its neurons, make its routers, and see how much of the activation they find.

Networks do not depend on each other, so that several processes share them, and what is done stays done: each result is
a file. Shapes: T tokens, H hidden, N neurons, E experts.
"""

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from ssd_megatron.errors import ConfigError
from ssd_megatron.ffn.activations import ACTIVATIONS
from ssd_megatron.ffn.bank import NEURON_TENSORS, NeuronTensors
from ssd_megatron.ffn.router_kinds import activation_mass, expert_scores, neuron_scores
from ssd_megatron.ffn.routers import expert_directions, router_weights
from ssd_megatron.files import write_atomically
from ssd_megatron.moefication.mlp_router import train_mlp_router
from ssd_megatron.moefication.observation import read_inputs
from ssd_megatron.moefication.splits import Split, split_neurons
from ssd_megatron.switching.partition import partition_order
from ssd_megatron.training.saved_model import SavedModel, open_model

Router = Literal["mlp", "similarity", "oracle", "random"]
ROUTERS: tuple[Router, ...] = ("oracle", "mlp", "similarity", "random")

HELD_OUT = 0.1  # of the tokens, on which routers are measured
GRAPH_TOKENS = 16384  # at most so many make the co-activation graph
TOKENS_AT_ONCE = 4096


@dataclass(frozen=True)
class LayerJob:
    """One network to be split.

    Attributes:
        checkpoint: folder of the dense model.
        network: its module's name.
        inputs: file of what it saw.
        result: the file to write.
    """

    checkpoint: Path
    network: str
    inputs: Path
    split: Split
    num_experts: int
    routers: tuple[Router, ...]
    seed: int
    result: Path


@dataclass(frozen=True)
class LayerExperts:
    """What became of it.

    Attributes:
        labels: expert of each neuron, [N] int64, by the order of the dense checkpoint.
        weights: of each router that has any, by the names of the router module's parameters.
        recall: of each router, the mean share of a held-out token's activation mass that lies in its first 1 ... E
            experts, [E] float64.
    """

    labels: Tensor
    weights: dict[str, dict[str, Tensor]]
    recall: dict[str, Tensor]


def run_jobs(jobs: Sequence[LayerJob], processes: int) -> Iterator[LayerJob]:
    """Do what is not done yet; yields each job as it is finished, first those that were before."""
    left = [job for job in jobs if not job.result.exists()]
    yield from (job for job in jobs if job not in left)
    if not left:
        return
    workers = min(processes, len(left))
    threads = max(1, (os.cpu_count() or 1) // workers)
    # Not forked: torch's threads would not survive it.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=torch.set_num_threads, initargs=(threads,)) as pool:
        futures = {pool.submit(run_job, job): job for job in left}
        try:
            for future in as_completed(futures):
                future.result()
                yield futures[future]
        except BrokenProcessPool as error:
            raise ConfigError("a process was killed, perhaps for its memory: use fewer --processes") from error
        finally:
            pool.shutdown(cancel_futures=True)


@torch.no_grad()
def run_job(job: LayerJob) -> None:
    """Split one network and write the result."""
    saved = open_model(job.checkpoint)
    activation = ACTIVATIONS[saved.settings.model.activation]
    bank = _bank(saved, job.network)
    x_TH = read_inputs(job.inputs)
    fired_TN = neuron_scores(x_TH[: GRAPH_TOKENS if job.split == "graph" else 0], bank) > 0
    labels = split_neurons(job.split, bank.firing[0], fired_TN, job.num_experts, job.seed)
    order = partition_order(labels, job.num_experts)
    bank = bank.each(lambda rows: rows[order])
    parts = torch.split(x_TH, TOKENS_AT_ONCE)
    mass_TE = torch.cat([activation_mass(part, bank, activation, job.num_experts) for part in parts])
    weights, recall = _routers(job, x_TH, mass_TE, bank)
    tensors = {"labels": labels} | {f"recall/{router}": values for router, values in recall.items()}
    tensors |= {f"weights/{router}/{leaf}": t for router, own in weights.items() for leaf, t in own.items()}
    write_atomically(job.result, save({name: tensor.contiguous() for name, tensor in tensors.items()}))


def read_result(job: LayerJob) -> LayerExperts:
    tensors = load_file(job.result)
    weights: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("weights/"):
            _, router, leaf = name.split("/")
            weights.setdefault(router, {})[leaf] = tensor
    recall = {name.removeprefix("recall/"): t for name, t in tensors.items() if name.startswith("recall/")}
    return LayerExperts(tensors["labels"], weights, recall)


def _routers(
    job: LayerJob, x_TH: Tensor, mass_TE: Tensor, bank: NeuronTensors
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Weights and recall of every router that the job asks for."""
    held_out = max(1, int(HELD_OUT * len(x_TH)))
    seen_TH, there_TE = x_TH[-held_out:], mass_TE[-held_out:]
    directions_EH, norms_N = expert_directions(bank.firing[0], job.num_experts)
    weights: dict[str, dict[str, Tensor]] = {}
    recall: dict[str, Tensor] = {}
    for router in job.routers:
        if router == "mlp":
            with torch.enable_grad():
                mlp = train_mlp_router(x_TH, mass_TE, held_out, directions_EH, seed=job.seed)
            weights[router], scores_TE = {"weight": mlp.weight, "mix": mlp.mix}, mlp.scores(seen_TH)
        elif router == "similarity":
            weights[router] = {"weight": router_weights(directions_EH, norms_N)}
            scores_TE = expert_scores(seen_TH, directions_EH)
        elif router == "oracle":
            scores_TE = there_TE
        else:
            scores_TE = torch.rand(there_TE.shape, generator=torch.Generator().manual_seed(job.seed))
        recall[router] = recall_by_experts(scores_TE, there_TE)
    return weights, recall


def recall_of(layers: Sequence[LayerExperts], router: Router, top_k: Sequence[int]) -> list[float]:
    """Share of the activation mass that so many experts by layer have."""
    return [float(layer.recall[router][number - 1]) for layer, number in zip(layers, top_k, strict=True)]


def recall_by_experts(scores_TE: Tensor, mass_TE: Tensor) -> Tensor:
    """Mean share of the mass in the first 1 ... E experts by score, [E] float64; of tokens that have any."""
    ordered_TE = mass_TE.double().gather(1, scores_TE.argsort(dim=1, descending=True)).cumsum(dim=1)
    fires_T = ordered_TE[:, -1] > 0
    return (ordered_TE[fires_T] / ordered_TE[fires_T, -1:]).mean(dim=0)


def _bank(saved: SavedModel, network: str) -> NeuronTensors:
    names = {leaf: f"{network}.bank.{leaf}" for leaf in NEURON_TENSORS}
    found = {leaf: saved.tensor(name) if name in saved.shapes else None for leaf, name in names.items()}
    return NeuronTensors(**found)  # type: ignore[arg-type]  # those that every bank has are there
