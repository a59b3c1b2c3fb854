"""The global coordinator: watches how neurons fire together, decides once for all ranks, and switches.

Every rank decides the same: what is decided on (clusterings, statistics, losses) is the same on all of them, and the
schedule is a pure function of it.
"""

import math
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ssd_megatron.config.schema import Mode, SSDConfig
from ssd_megatron.ffn.switchable import SwitchableFFN
from ssd_megatron.parallel.logical_state import LogicalState
from ssd_megatron.parallel.topology import Topology
from ssd_megatron.switching.allocation import allocate_experts, sparsity_costs
from ssd_megatron.switching.clustering import Clustering
from ssd_megatron.switching.partition import structure_similarity
from ssd_megatron.switching.schedule import Schedule
from ssd_megatron.switching.statistics import ProbeBatch, collect_statistics, expert_overlap
from ssd_megatron.switching.switch import ROUTER_GROUP, Applied, SwitchError, regroup_neurons

# Relative change of the dense probe loss that a permutation of the neurons may cause: sums in another order.
SWITCH_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-3}
# Steps before a switch whose mean loss is the level, steps after it that are watched, and spikes in a row that count.
LOSS_WINDOW, WATCHED_STEPS, SPIKES_IN_A_ROW = 20, 50, 3


@dataclass(frozen=True)
class CheckReport:
    """One look at the activation pattern.

    Attributes:
        similarity: structure similarity to the look before, mean over layers (adjusted Rand index); None at the first.
        overlap: share of a probe token's experts that it also had at the look before; None at the first after a switch.
        active_fraction: share of firing neurons by layer.
        stable: similar looks in a row, this one included.
    """

    similarity: float | None
    similarity_layers: list[float]
    overlap: float | None
    active_fraction: list[float]
    seconds: float
    stable: int = 0

    @property
    def agreement(self) -> float | None:
        """What ssd.similarity_threshold is held against: neurons stay together *and* tokens keep their experts."""
        if self.similarity is None or self.overlap is None:
            return None
        return min(self.similarity, self.overlap)


@dataclass(frozen=True)
class SwitchReport:
    """A switch that is done and verified.

    Attributes:
        loss_before, loss_after, loss_sparse: of the probe batch: dense before and after, sparse after.
        similarity: structure similarity by layer of the new partition to the labels known before.
        top_k: experts that a token computes in each layer.
    """

    from_mode: Mode
    to_mode: Mode
    reason: str
    seconds: float
    seconds_cluster: float
    seconds_transfer: float
    seconds_verify: float
    bytes_moved: int
    loss_before: float
    loss_after: float
    loss_sparse: float
    similarity: list[float]
    top_k: list[int]


class Coordinator:
    """Switches `ffns` (by the name of their module, in order) between dense and sparse.

    Raises:
        ConfigError: `ssd.partition` names a recorded partition that does not fit.
    """

    def __init__(
        self,
        ssd: SSDConfig,
        ffns: Mapping[str, SwitchableFFN],
        state: LogicalState,
        probe: ProbeBatch,
        schedule: Schedule,
        topology: Topology,
        seed: int,
    ) -> None:
        self._ssd = ssd
        self._ffns = dict(ffns)
        self._state = state
        self._probe = probe
        self._topology = topology
        self._clustering = Clustering(ssd, ffns, topology, seed)
        self.schedule = schedule
        self.mode: Mode = "dense"
        self.has_partition = False  # once a switch has formed experts, the model can be evaluated in both modes
        self._labels: dict[str, Tensor] = {}
        self._expert_ids: dict[str, Tensor] = {}
        self._losses: deque[float] = deque(maxlen=LOSS_WINDOW)
        self._level: float | None = None
        self._spikes = 0

    def before_step(self, step: int) -> SwitchReport | None:
        """Bring the model into the mode of `step` (collective). To be called before every step.

        Raises:
            SwitchError: the switch could not be verified; the run must end.
        """
        wanted = self.schedule.mode(step)
        report = None if wanted == self.mode else self._switch(step, wanted)
        if self.mode == "dense":
            self._state.set_learning_rate(ROUTER_GROUP, 0.0)
        return report

    def after_step(self, step: int, loss: float | None) -> CheckReport | None:
        """Watch the loss, look at the activation pattern every check_interval steps, and decide the next mode.

        Args:
            loss: of this step, the same on every rank; None if it was not finite.
        """
        report = self._check(step) if step % self._ssd.check_interval == 0 else None
        spike = loss is not None and self._watch(step, loss) and self._ssd.on_spike == "dense"
        stable = self.schedule.after_step(step, similarity=None if report is None else report.agreement, spike=spike)
        return None if report is None else replace(report, stable=stable)

    @property
    def spiking(self) -> bool:
        """The loss has just risen after a switch, for SPIKES_IN_A_ROW steps in a row."""
        return self._spikes == SPIKES_IN_A_ROW

    def partition(self) -> list[Tensor]:
        """Experts of the last switch by neuron identity, [N] int64 for each layer: what ssd.partition can replay."""
        layers = []
        for ffn in self._ffns.values():
            identities = ffn.bank.neuron_ids.cpu()
            labels = torch.empty_like(identities)
            labels[identities] = _contiguous(len(identities), self._ssd.num_experts)
            layers.append(labels)
        return layers

    def set_mode(self, mode: Mode) -> None:
        """Compute in `mode` from now on; nothing else changes."""
        self.mode = mode
        for ffn in self._ffns.values():
            ffn.mode = mode

    def state_dict(self) -> tuple[dict[str, object], dict[str, Tensor]]:
        """What a checkpoint keeps: plain values, ready for JSON, and tensors."""
        values: dict[str, object] = {
            "mode": self.mode,
            "schedule": self.schedule.state_dict(),
            "losses": list(self._losses),
            "level": self._level,
            "spikes": self._spikes,
            "top_k": self._top_k(),
            "has_partition": self.has_partition,
        }
        tensors = {f"labels/{name}": labels for name, labels in self._labels.items()}
        tensors |= {f"expert_ids/{name}": ids for name, ids in self._expert_ids.items()}
        return values, tensors

    def load_state_dict(self, values: Mapping[str, object], tensors: Mapping[str, Tensor]) -> None:
        mode, schedule, losses, level, spikes, top_k = (
            values[key] for key in ("mode", "schedule", "losses", "level", "spikes", "top_k")
        )
        assert mode in ("dense", "sparse") and isinstance(schedule, dict) and isinstance(losses, list)
        assert (level is None or isinstance(level, float)) and isinstance(spikes, int)
        assert isinstance(top_k, list)
        self._set_top_k(top_k)
        self.has_partition = bool(values["has_partition"])
        self.set_mode("sparse" if mode == "sparse" else "dense")
        self.schedule.load_state_dict(schedule)
        self._losses = deque(losses, maxlen=LOSS_WINDOW)
        self._level, self._spikes = level, spikes
        for prefix, kept in (("labels/", self._labels), ("expert_ids/", self._expert_ids)):
            kept.clear()
            kept.update({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})

    def _switch(self, step: int, wanted: Mode) -> SwitchReport:
        started = time.perf_counter()
        before_mode, reason = self.mode, self.schedule.decision(step).reason
        self.set_mode("dense")
        loss_before = self._probe.loss()
        similarity: list[float] = []
        applied = Applied(0, 0.0, 0.0)
        clustered = started
        if wanted == "sparse":
            labels = self._clustering.form_experts(self._labels, self._signatures(), step)
            similarity = [structure_similarity(old, labels[name]) for name, old in self._labels.items()]
            clustered = time.perf_counter()
            applied = regroup_neurons(self._ffns, labels, self._ssd.num_experts, self._state, self._topology)
            self._labels = {name: _contiguous(label.numel(), self._ssd.num_experts) for name, label in labels.items()}
            self._expert_ids = {}
            self._set_top_k(self._allocate())
            self.has_partition = True
        loss_after = self._probe.loss()
        self._verify_loss(loss_before, loss_after)
        self.set_mode("sparse")
        loss_sparse = self._probe.loss()
        self.set_mode(wanted)
        self._level = sum(self._losses) / len(self._losses) if self._losses else None
        self._losses.clear()
        self._spikes = 0
        return SwitchReport(
            from_mode=before_mode,
            to_mode=wanted,
            reason=reason,
            seconds=time.perf_counter() - started,
            seconds_cluster=clustered - started,
            seconds_transfer=applied.transfer_seconds,
            seconds_verify=applied.verify_seconds,
            bytes_moved=applied.bytes_moved,
            loss_before=loss_before,
            loss_after=loss_after,
            loss_sparse=loss_sparse,
            similarity=similarity,
            top_k=self._top_k(),
        )

    def _allocate(self) -> list[int]:
        """Experts per token of each layer in the phase that begins."""
        ssd = self._ssd
        if ssd.top_k_allocation == "equal":
            return [ssd.top_k] * len(self._ffns)
        # With a single expert the straight-through router would not learn.
        least = min(ssd.top_k, 2 if ssd.router_update == "straight_through" else 1)
        costs = sparsity_costs(self._ffns, self._probe, least)
        return allocate_experts(list(costs.values()), ssd.top_k, least)

    def _top_k(self) -> list[int]:
        return [ffn.router.top_k for ffn in self._ffns.values()]

    def _set_top_k(self, top_k: list[int]) -> None:
        for ffn, experts in zip(self._ffns.values(), top_k, strict=True):
            ffn.router.top_k = experts

    def _verify_loss(self, before: float, after: float) -> None:
        dtype = next(iter(self._ffns.values())).bank.w_in.dtype
        automatic = self._ssd.switch_tolerance == "auto"
        tolerance = SWITCH_TOLERANCE[dtype] if automatic else float(self._ssd.switch_tolerance)
        if not math.isfinite(before):
            raise SwitchError(f"the dense loss of the probe batch was {before} before a switch: training has diverged")
        if not abs(after - before) <= tolerance * abs(before):
            raise SwitchError(
                f"the dense loss of the probe batch went from {before:.6f} to {after:.6f} in a switch; "
                f"ssd.switch_tolerance allows a relative change of {tolerance:g}"
            )

    @torch.no_grad()
    def _check(self, step: int) -> CheckReport:
        started = time.perf_counter()
        names = list(self._ffns)[: self._ssd.check_layers]
        labels = self._clustering.follow(names, self._labels, step)
        centroids = {name: self._clustering.centroids(name, labels[name]) for name in names}
        statistics = collect_statistics(self._ffns, self._probe, centroids, self._ssd.top_k, signatures=False)
        ids = {name: statistics[name].expert_ids for name in names}
        known = [name for name in names if name in self._labels]
        layers = [structure_similarity(self._labels[name], labels[name]) for name in known]
        overlaps = [
            expert_overlap(self._expert_ids[name], ids[name], self._ssd.num_experts)
            for name in names
            if name in self._expert_ids
        ]
        similarity = sum(layers) / len(layers) if layers else None
        self._labels.update(labels)
        self._expert_ids = ids
        return CheckReport(
            similarity=similarity,
            similarity_layers=layers,
            overlap=sum(overlaps) / len(overlaps) if overlaps else None,
            active_fraction=[layer.active_fraction for layer in statistics.values()],
            seconds=time.perf_counter() - started,
        )

    def _signatures(self) -> dict[str, Tensor]:
        """Bits of every neuron on the probe batch, if the partition is made from them."""
        if self._ssd.partition != "coactivation":
            return {}
        statistics = collect_statistics(self._ffns, self._probe, {}, self._ssd.top_k)
        return {name: layer.signatures for name, layer in statistics.items()}

    def _watch(self, step: int, loss: float) -> bool:
        """True when the loss after the last switch stays above spike_factor times its level before."""
        self._losses.append(loss)
        since = step + 1 - self.schedule.decision(step).step
        if self._level is None or since > WATCHED_STEPS:
            self._spikes = 0
            return False
        self._spikes = self._spikes + 1 if loss > self._ssd.spike_factor * self._level else 0
        return self._spikes >= SPIKES_IN_A_ROW


def _contiguous(neurons: int, experts: int) -> Tensor:
    return torch.arange(experts).repeat_interleave(neurons // experts)
