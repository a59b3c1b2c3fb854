"""Which experts each token of a training step got, recorded by one process and replayed on any layout: two runs that
are to be compared then do not part where two experts score alike to the last bit.

Shapes: B samples of the global batch, S sequence, K experts per token, E experts.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from ssd_megatron.config.load import RunConfig
from ssd_megatron.config.schema import Mode
from ssd_megatron.errors import DataError
from ssd_megatron.ffn.routers import Choice
from ssd_megatron.ffn.switchable import SwitchableFFN
from ssd_megatron.files import write_atomically
from ssd_megatron.model.language_model import LanguageModel
from ssd_megatron.parallel.topology import Topology

StepRouting = Callable[[int, Mode], AbstractContextManager[None]]


def step_routing(config: RunConfig, model: LanguageModel, topology: Topology) -> StepRouting:
    """What a training step, given its number and mode, runs within: `ssd.routing` and `ssd.record_routing`."""
    ssd = config.ssd_megatron.ssd
    changes: list[Callable[[int], AbstractContextManager[None]]] = []
    if isinstance(ssd.routing, Path):
        changes.append(partial(_replayed, ssd.routing, model.ffns, config, topology))
    if ssd.record_routing is not None:
        changes.append(partial(_recorded, ssd.record_routing, model.ffns, config))
    assert len(changes) < 2, "checked with the configuration"
    return lambda step, mode: changes[0](step) if changes and mode == "sparse" else nullcontext()


@contextmanager
def _recorded(folder: Path, ffns: dict[str, SwitchableFFN], config: RunConfig, step: int) -> Iterator[None]:
    seen: dict[str, list[Tensor]] = {name: [] for name in ffns}

    def keep(name: str, expert_ids_TK: Tensor) -> Tensor:
        seen[name].append(expert_ids_TK)
        return expert_ids_TK

    with _asked(ffns, {name: partial(keep, name) for name in ffns}):
        yield
    tensors = {}
    for name, microbatches in seen.items():
        numbers_E = ffns[name].bank.expert_numbers(ffns[name].settings.num_experts)
        parts = [numbers_E[ids].view(-1, config.micro_batch_size, ids.shape[1]).transpose(0, 1) for ids in microbatches]
        tensors[name] = torch.cat(parts).to(torch.int32).cpu().contiguous()
    write_atomically(_file(folder, step), save(tensors))


@contextmanager
def _replayed(
    folder: Path, ffns: dict[str, SwitchableFFN], config: RunConfig, topology: Topology, step: int
) -> Iterator[None]:
    try:
        recorded = load_file(_file(folder, step))
    except (OSError, SafetensorError) as error:
        raise DataError(f"ssd.routing ({folder}) has no step {step} that can be read ({error}): record it") from error

    def play(step_ids: Iterator[Tensor], name: str, expert_ids_TK: Tensor) -> Tensor:
        given_TK = next(step_ids)
        if given_TK.shape != expert_ids_TK.shape:
            raise DataError(
                f"ssd.routing ({folder}) has {list(given_TK.shape)} tokens and experts for {name} at step {step}, this "
                f"run has {list(expert_ids_TK.shape)}: record it with the same model, samples and experts per token"
            )
        return given_TK

    choices = {}
    for name, ffn in ffns.items():
        if name not in recorded:
            raise DataError(f"ssd.routing ({folder}) has no {name} at step {step}: record it with this model")
        positions_E = ffn.bank.expert_numbers(ffn.settings.num_experts).argsort()
        ids_BSK = positions_E[recorded[name].to(positions_E.device, torch.int64)]
        choices[name] = partial(play, iter(_my_microbatches(ids_BSK, config, topology)), name)
    with _asked(ffns, choices):
        yield


def _my_microbatches(ids_BSK: Tensor, config: RunConfig, topology: Topology) -> list[Tensor]:
    """This rank's part [T, K] of each microbatch, as StepSampler deals out the samples."""
    runs = ids_BSK.view(-1, topology.data.size, config.micro_batch_size, *ids_BSK.shape[1:])
    return list(runs[:, topology.data.rank].transpose(1, 2).flatten(1, 2))


@contextmanager
def _asked(ffns: dict[str, SwitchableFFN], choices: Mapping[str, Choice]) -> Iterator[None]:
    for name, ffn in ffns.items():
        ffn.chosen = choices[name]
    try:
        yield
    finally:
        for ffn in ffns.values():
            ffn.chosen = None


def _file(folder: Path, step: int) -> Path:
    return folder / f"step_{step:08d}.safetensors"
