"""Keeps the weights of this stage's Transformer blocks sparse, and moves their live blocks (arXiv 2108.06277).

A dead weight, its master and both moments are 0. It stays so because its gradient is masked before anybody sums, clips
or measures it: Adam leaves a weight alone whose value, gradient and moments are 0, and decay takes nothing from 0.
So only an update of the masks writes to the state.

Masks are global and the same on every rank, whatever the layout: what is drawn depends on seed, name and number of the
update, what is measured on the whole tensor.
"""

import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import partial

import torch
from torch import Tensor

from ssd_megatron.config.schema import WeightSparsityConfig
from ssd_megatron.parallel.logical_state import LogicalState
from ssd_megatron.parallel.topology import Topology
from ssd_megatron.parallel.zero import KINDS, MASTER
from ssd_megatron.seeding import generator_for
from ssd_megatron.sparse_weights.masks import BlockMask, Change, block_norms, elements, packed, unpacked
from ssd_megatron.sparse_weights.schedule import MaskSchedule

PARTS = tuple(field.name for field in fields(BlockMask))


@dataclass(frozen=True)
class MaskReport:
    """An update of all masks; shares are of the weights of all stages.

    Attributes:
        update: its number, from 1.
        share: of the live blocks, how many were pruned, and as many regrown.
        live: live weights.
        ever: weights that have been live at some time.
        regrown_pruned: of those regrown at the update before, how many were pruned now; None at the first.
    """

    update: int
    share: float
    live: float
    ever: float
    regrown_pruned: float | None
    seconds: float


class MaskedWeights:
    """The masks of this stage's matrices; one object on every rank, made before a checkpoint is read.

    Args:
        names: the masked tensors of this stage.
        seed: of the run.
    """

    def __init__(
        self,
        settings: WeightSparsityConfig,
        names: list[str],
        state: LogicalState,
        topology: Topology,
        schedule: MaskSchedule,
        seed: int,
    ) -> None:
        self._settings = settings
        self._state = state
        self._topology = topology
        self._schedule = schedule
        self._seed = seed
        self._masks = {name: self._first_mask(name) for name in names}
        self._dead: dict[str, Tensor] = {}  # this rank's rows of each tensor, on its device
        self._gradients: dict[str, Tensor] | None = None  # of dead weights too, summed over microbatches, when needed
        self.apply()
        for name in names:
            state.parameter(name).register_hook(partial(self._mask_gradient, name))  # type: ignore[no-untyped-call]

    @property
    def live(self) -> dict[str, Tensor]:
        """Live blocks by tensor, bool [M, N]."""
        return {name: mask.live for name, mask in self._masks.items()}

    @torch.no_grad()
    def apply(self) -> None:
        """Set dead weights to 0 that something else has written to the state, and publish it (collective)."""
        self._zero_dead(self.live)

    def before_step(self, step: int) -> None:
        """To be called before every step."""
        due = self._schedule.update_after(step) is not None
        self._gradients = {} if due and self._settings.regrow == "gradient" else None

    @torch.no_grad()
    def after_step(self, step: int) -> MaskReport | None:
        """Move blocks if an update is due (collective)."""
        number = self._schedule.update_after(step)
        if number is None:
            return None
        started = time.perf_counter()
        share, size = self._schedule.share(step), self._settings.block_size
        changes: dict[str, Change] = {}
        for name, mask in self._masks.items():
            norms = block_norms(self._state.read(name, MASTER), size, self._settings.criterion)
            changes[name] = mask.updated(norms, self._scores(name, number).to(norms.device), share)
        digest = hashlib.sha256()
        for change in changes.values():
            digest.update(change.after.live.numpy().tobytes())
        self._topology.stage.agree(f"masks of update {number}", digest.hexdigest())
        before, self._masks = self._masks, {name: change.after for name, change in changes.items()}
        self._zero_dead({name: mask.live & ~changes[name].pruned_MN for name, mask in before.items()})
        total, live, ever, regrown, regrown_pruned = self._counts(before, changes)
        return MaskReport(
            update=number,
            share=share,
            live=live / total,
            ever=ever / total,
            regrown_pruned=regrown_pruned / regrown if regrown else None,
            seconds=time.perf_counter() - started,
        )

    def state_dict(self) -> dict[str, Tensor]:
        """The masks of all stages, eight blocks a byte, on each pipeline's first rank (collective)."""
        mine = {_key(part, name): packed(vars(mask)[part]) for name, mask in self._masks.items() for part in PARTS}
        stages = self._topology.pipeline.objects_to_first("masks", mine)
        return {key: bits for stage in stages for key, bits in stage.items()}

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Take this stage's masks over; masters and moments come from the same checkpoint."""
        for name, mask in self._masks.items():
            shape = mask.live.shape
            self._masks[name] = BlockMask(*(unpacked(tensors[_key(part, name)], shape) for part in PARTS))
        self._remember_dead()

    def _first_mask(self, name: str) -> BlockMask:
        rows, columns = self._state.specs[name].shape
        size = self._settings.block_size
        assert rows % size == 0 and columns % size == 0, (name, rows, columns, size)
        generator = generator_for(f"{self._seed}/{name}/mask 0")
        return BlockMask.random((rows // size, columns // size), self._settings.sparsity, generator)

    def _scores(self, name: str, number: int) -> Tensor:
        """Which dead blocks grow first: random ones, or those with the largest gradient."""
        if self._gradients is None:
            generator = generator_for(f"{self._seed}/{name}/mask {number}")
            return torch.rand(self._masks[name].live.shape, generator=generator)
        spec, mine = self._state.specs[name], self._gradients[name]
        whole = torch.zeros(spec.numel, device=mine.device)
        whole.narrow(0, self._state.offset(name), mine.numel()).copy_(mine.flatten())
        self._topology.stage.reduce_(f"gradient of {name}", whole)
        whole.nan_to_num_(0.0, 0.0, 0.0)  # of a step that was skipped
        return block_norms(whole.view(spec.shape), self._settings.block_size, self._settings.criterion)

    def _mask_gradient(self, name: str, gradient: Tensor | None) -> Tensor | None:
        """There is none before a step's last microbatch where weights are gathered once a step."""
        if gradient is None:
            return None
        if self._gradients is not None:
            seen = self._gradients.get(name)
            self._gradients[name] = gradient.float() if seen is None else seen + gradient
        return gradient.masked_fill(self._dead[name], 0.0)

    def _zero_dead(self, kept: Mapping[str, Tensor]) -> None:
        """Set everything to 0 that is not in a kept block: masters, moments, and the model's own weights."""
        for name, kept_MN in kept.items():
            for kind in KINDS:
                fragment = self._state.fragment(name, kind)
                lost = ~elements(kept_MN, self._settings.block_size, fragment.start, fragment.values.numel())
                fragment.values.masked_fill_(lost.to(fragment.values.device), 0.0)
        self._state.publish()
        self._remember_dead()

    def _remember_dead(self) -> None:
        for name, mask in self._masks.items():
            parameter = self._state.parameter(name)
            mine = elements(mask.live, self._settings.block_size, self._state.offset(name), parameter.numel())
            self._dead[name] = ~mine.view_as(parameter).to(parameter.device)

    def _counts(self, before: Mapping[str, BlockMask], changes: Mapping[str, Change]) -> list[float]:
        """Blocks of all stages: all, live, ever live, regrown at the update before, and pruned of those."""
        counts = [
            [
                mask.live.numel(),
                int(changes[name].after.live.sum()),
                int(changes[name].after.ever.sum()),
                int(mask.regrown.sum()),
                int((mask.regrown & changes[name].pruned_MN).sum()),
            ]
            for name, mask in before.items()
        ]
        return self._topology.pipeline.sum("masks", [float(sum(column)) for column in zip(*counts, strict=True)])


def _key(part: str, name: str) -> str:
    """Key of a checkpoint: what of a mask, then the name of its tensor."""
    return f"mask_{part}/{name}"
