"""What a training state is, saved and restored: masters and moments, Adam's steps, learning rates, RNG, neuron
identities, masks, the coordinator's memory, and the trainer's counters. How it lies on disk is checkpoint_files.py."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from torch import Tensor

from ssd_megatron.model.language_model import LanguageModel
from ssd_megatron.parallel.topology import Topology
from ssd_megatron.sparse_weights.masked_weights import MaskedWeights
from ssd_megatron.switching.coordinator import Coordinator
from ssd_megatron.training import checkpoint_files as files
from ssd_megatron.training.checkpoint_checks import check_identity, check_tensors
from ssd_megatron.training.checkpoint_files import CheckpointError, key_of
from ssd_megatron.training.checkpoint_writing import Writing, index_of
from ssd_megatron.training.engine import Engine
from ssd_megatron.training.saved_model import open_model
from ssd_megatron.training.start_weights import read_start_weights

RNG = "rng/"

T = TypeVar("T")


@dataclass(frozen=True)
class Trained:
    """What holds the state of a run; `identity` are the settings that must not change on resume."""

    engine: Engine
    model: LanguageModel
    coordinator: Coordinator
    masks: MaskedWeights | None
    identity: dict[str, Any]


class Checkpointer:
    """Saves and restores a run's state under `<run_dir>/checkpoints` (every method is collective).

    A save that fails on any rank ends in CheckpointError on all, with the checkpoints before it untouched.

    Args:
        tell: what to do with a line for the user; the first rank's counts.
    """

    def __init__(
        self,
        root: Path,
        trained: Trained,
        topology: Topology,
        *,
        keep_last: int | None,
        async_save: bool,
        tell: Callable[[str], None],
    ) -> None:
        self._root = root
        self._trained = trained
        self._topology = topology
        self._keep_last = keep_last
        self._async = async_save
        self._tell = tell
        self._writing: Writing | None = None
        if topology.is_first:
            root.mkdir(parents=True, exist_ok=True)

    def save(self, step: int, counters: Mapping[str, float]) -> Path | None:
        """Save the state after `step`. Returns the folder, or None if it is still being written in the background."""
        self.finish()
        topology, folder = self._topology, files.temporary_folder(self._root, step)
        if topology.is_first:
            shutil.rmtree(folder, ignore_errors=True)
        self._agree("written to", lambda: folder.mkdir(parents=True) if topology.is_first else None)
        owned = {
            key_of(name, kind): (fragment.start, fragment.values.detach())
            for name, kind, fragment in self._trained.engine.state.owned()
        }
        contents = {files.rank_file(topology.rank): {key: values for key, (_, values) in owned.items()} | _rng()}
        remembered, shared = self._trained.coordinator.state_dict()
        masks = {} if self._trained.masks is None else self._trained.masks.state_dict()
        values, identities = self._values(counters, remembered), self._neuron_ids()
        if topology.is_first:
            contents[files.SHARED] = identities | masks | shared
        pieces = {key: (start, values.numel()) for key, (start, values) in owned.items()}
        self._writing = Writing(step, folder, contents, pieces, values, in_background=self._async)
        return None if self._async else self.finish()

    def poll(self) -> Path | None:
        """Finish a background save once every rank has written its part; to be called between steps."""
        if self._writing is None or self._topology.world.max("saving", [int(not self._writing.is_done)])[0]:
            return None
        return self.finish()

    def finish(self) -> Path | None:
        """Wait for a save that is being written and make it the newest checkpoint; None if there is none."""
        writing, self._writing = self._writing, None
        if writing is None:
            return None
        try:
            return self._commit(writing)
        except CheckpointError:
            if self._topology.is_first:  # a full disk needs the space
                shutil.rmtree(writing.folder, ignore_errors=True)
            raise

    def _commit(self, writing: Writing) -> Path:
        records = self._agree("written to", writing.result)
        pieces = self._topology.world.objects_to_first("pieces of a checkpoint", writing.pieces)
        shapes = self._shapes()

        def commit() -> None:
            if self._topology.is_first:
                index = index_of(writing, [record for part in records for record in part], pieces, shapes)
                files.commit(self._root, index)

        self._agree("written to", commit)
        if self._topology.is_first:
            self._remove_old(writing.step)
        return self._root / files.folder_name(writing.step)

    def _remove_old(self, step: int) -> None:
        """What cannot be deleted now, as somebody has it open, is so with the next save."""
        try:
            files.remove_old(self._root, step, self._keep_last)
        except OSError as error:
            self._tell(f"old checkpoints in {self._root} could not be deleted: {error}")

    def restore_newest(self) -> tuple[int, dict[str, float]] | None:
        """Restore the newest checkpoint that is whole; damaged ones are told and passed over.

        Returns:
            its step and the counters saved with it, or None if there is no checkpoint at all.
        Raises:
            CheckpointError: there are checkpoints, and none is whole.
            ConfigError: it was made by a run with other settings.
        """
        found = [folder.name for folder in files.checkpoints(self._root)]
        folders = self._topology.world.gather_objects("checkpoints", found)[0]
        damaged: list[Path] = []
        for name in folders:
            folder = self._root / name
            damage = self._damages(folder)
            if not damage:
                restored = self._restore(folder)
                self._agree("set aside in", lambda: self._set_aside(damaged))
                return restored
            damaged.append(folder)
            self._tell(f"checkpoint {folder} is damaged ({'; '.join(damage)}): it is passed over")
        if folders:
            raise CheckpointError(f"no checkpoint in {self._root} is whole: move the folder away to start anew")
        return None

    def start_from(self, path: Path, keep_experts: bool) -> Path:
        """Take over the weights of another checkpoint, which `check_start` has seen, where no mask of this run lies.

        Returns its folder.

        Args:
            keep_experts: neurons keep their identities, and routers their weights.
        Raises:
            CheckpointError: it is damaged, or has not exactly the tensors of this model.
        """
        shapes, state, masks = self._shapes(), self._trained.engine.state, self._trained.masks
        found = self._agree("read to start the run of", lambda: open_model(path).folder)[0]
        if damage := self._damages(found):
            raise CheckpointError(
                f"checkpoint.start_from ({path}): {found} is damaged ({'; '.join(damage)}). Name another checkpoint"
            )
        top_k: list[int] = []

        def read() -> None:
            saved = open_model(found)
            top_k.extend(saved.settings.top_k)
            read_start_weights(saved, state, shapes, with_routers=keep_experts)
            if keep_experts:
                self._set_identities(files.read_tensors(saved.folder, files.SHARED, self._is_of_this_stage))

        self._agree("read to start the run of", read)
        state.publish()
        if masks is not None:
            masks.apply()
        if keep_experts:
            self._trained.coordinator.keep_experts(top_k)
        return found

    def _set_aside(self, damaged: list[Path]) -> None:
        if self._topology.is_first:
            for folder in damaged:
                files.set_aside(folder)

    def _damages(self, folder: Path) -> list[str]:
        unreadable = None
        found: list[str] = []
        try:
            index = files.read_index(folder)
            found = files.index_damages(index)
            found += files.damages(folder, index, self._topology.rank, self._topology.world.size)
        except CheckpointError as error:
            unreadable = str(error)
        parts = self._topology.world.gather_objects("damages of a checkpoint", (unreadable, found))
        first, blind = parts[0][0], [f"rank {rank}: {error}" for rank, (error, _) in enumerate(parts) if error]
        if first is None and blind:
            raise CheckpointError(
                f"rank 0 can read {folder}, but {blind[0]}. All ranks need the same run_dir, on a file system that "
                "their nodes share"
            )
        return [first] if first else sorted({line for _, part in parts for line in part})

    def _restore(self, folder: Path) -> tuple[int, dict[str, float]]:
        index = files.read_index(folder)
        values = index.values
        check_identity(folder, values["identity"], self._trained.identity)
        check_tensors(folder, index.shapes, self._shapes())
        state = self._trained.engine.state
        held = {key_of(name, kind): (part.start, part.values) for name, kind, part in state.held()}
        same_layout = values["layout"] == self._layout()
        shared, rng = {}, {}

        def read() -> None:
            files.read_intervals(folder, index, held)
            shared.update(files.read_tensors(folder, files.SHARED, self._is_of_this_stage))
            if same_layout:
                own = files.rank_file(self._topology.rank)
                rng.update(files.read_tensors(folder, own, lambda key: key.startswith(RNG)))

        self._agree("restored from", read)
        state.publish()
        for group, step in values["adam_steps"].items():
            state.set_adam_step(group, step)
        for group, rate in values["learning_rates"].items():
            state.set_learning_rate(group, rate)
        self._trained.engine.zero.load_loss_scaler_state(values["loss_scaler"])
        scheduler = self._trained.engine.lr_scheduler
        scheduler.load_state_dict(scheduler.state_dict() | values["lr_scheduler"])
        self._trained.engine.deepspeed.global_steps = index.step
        self._set_identities(shared)
        if self._trained.masks is not None:
            self._trained.masks.load_state_dict(shared)
        self._trained.coordinator.load_state_dict(values["coordinator"], shared)
        if same_layout:
            _set_rng(rng)
        else:
            # Random numbers that no step has had; tensor-parallel ranks, whose first seeds are alike, go on alike.
            torch.manual_seed(hash((torch.initial_seed(), index.step)))
        return index.step, values["counters"]

    def _is_of_this_stage(self, key: str) -> bool:
        """Whether a tensor that all ranks have alike belongs to a network or a tensor of this stage."""
        ffns, name = self._trained.model.ffns, key.rpartition("/")[2]
        return name in ffns or name in self._trained.engine.state.specs or key.removesuffix(files.NEURON_IDS) in ffns

    def _set_identities(self, shared: Mapping[str, Tensor]) -> None:
        for name, ffn in self._trained.model.ffns.items():
            ffn.bank.neuron_ids.copy_(shared[f"{name}{files.NEURON_IDS}"])

    def _neuron_ids(self) -> dict[str, Tensor]:
        """Which neuron lies where in the banks of all stages, on each pipeline's first rank (collective)."""
        ffns = self._trained.model.ffns
        mine = {f"{name}{files.NEURON_IDS}": ffn.bank.neuron_ids.cpu() for name, ffn in ffns.items()}
        stages = self._topology.pipeline.objects_to_first("neuron identities", mine)
        return {name: ids for stage in stages for name, ids in stage.items()}

    def _values(self, counters: Mapping[str, float], remembered: Mapping[str, object]) -> dict[str, Any]:
        engine = self._trained.engine
        # A scheduler's lists are by parameter group, of which there are more with expert parallelism; rates are below.
        scheduler = {k: v for k, v in engine.lr_scheduler.state_dict().items() if not isinstance(v, list)}
        return {
            "layout": self._layout(),
            "identity": self._trained.identity,
            "adam_steps": engine.state.adam_steps(),
            "learning_rates": engine.state.learning_rates(),
            "loss_scaler": engine.zero.loss_scaler_state(),
            "lr_scheduler": scheduler,
            "coordinator": dict(remembered),
            "counters": dict(counters),
        }

    def _layout(self) -> dict[str, int]:
        """Sizes of the groups: only with the same ones does each rank find its own random state again."""
        t = self._topology
        return {group.name: group.size for group in (t.tensor, t.pipeline, t.expert, t.data)}

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Of the logical tensors of all stages (collective)."""
        mine = {name: spec.shape for name, spec in self._trained.engine.state.specs.items()}
        stages = self._topology.pipeline.gather_objects("tensors of the model", mine)
        return {name: shape for stage in stages for name, shape in stage.items()}

    def _agree(self, doing: str, action: Callable[[], T]) -> list[T]:
        """Run `action` on every rank; all raise CheckpointError if it failed on one. Returns every rank's result."""
        result: T | None = None
        error = None
        try:
            result = action()
        except (OSError, SafetensorError, CheckpointError) as failure:
            error = f"rank {self._topology.rank}: {failure}"
        gathered = self._topology.world.gather_objects("agreement on a checkpoint", (result, error))
        errors = [failure for _, failure in gathered if failure is not None]
        if errors:
            raise CheckpointError(f"a checkpoint could not be {doing} {self._root}: {'; '.join(errors)}")
        return [value for value, _ in gathered if value is not None]


def _rng() -> dict[str, Tensor]:
    states = {f"{RNG}cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states[f"{RNG}cuda"] = torch.cuda.get_rng_state()
    return states


def _set_rng(tensors: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(tensors[f"{RNG}cpu"])
    if torch.cuda.is_available() and f"{RNG}cuda" in tensors:
        torch.cuda.set_rng_state(tensors[f"{RNG}cuda"])
