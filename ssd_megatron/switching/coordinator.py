"""The global coordinator: watches how neurons fire together, decides once for all ranks, and switches.

Every rank decides the same: what is decided on (clusterings, statistics, losses) is the same on all of them, and the
schedule is a pure function of it.
"""

import hashlib
import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from ssd_megatron.config.schema import Mode, SSDConfig
from ssd_megatron.ffn.switchable import SwitchableFFN
from ssd_megatron.parallel.logical_state import LogicalState
from ssd_megatron.parallel.topology import Topology
from ssd_megatron.switching.allocation import allocate_experts, sparsity_costs
from ssd_megatron.switching.clustering import Clustering, Grouping
from ssd_megatron.switching.partition import structure_similarity
from ssd_megatron.switching.placement import balanced_numbering, imbalance
from ssd_megatron.switching.schedule import Schedule
from ssd_megatron.switching.statistics import ProbeBatch, collect_statistics, expert_overlap
from ssd_megatron.switching.switch import ROUTER_GROUP, Applied, SwitchError, regroup_neurons

# Relative change of the dense probe loss that a permutation of the neurons may cause: sums in another order.
SWITCH_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-3, torch.float16: 1e-3}
# Steps before a switch whose mean loss is the level, steps after it that are watched, and spikes in a row that count.
LOSS_WINDOW, WATCHED_STEPS, SPIKES_IN_A_ROW = 20, 50, 3

T = TypeVar("T")


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
        imbalance_before, imbalance_after: tokens of the busiest home over the mean on the probe batch, worst layer,
            with the experts as clustered and as placed; None with a single home.
    """

    from_mode: Mode
    to_mode: Mode
    reason: str
    seconds: float
    seconds_statistics: float
    seconds_cluster: float
    seconds_transfer: float
    seconds_verify: float
    bytes_moved: int
    loss_before: float
    loss_after: float
    loss_sparse: float
    similarity: list[float]
    top_k: list[int]
    imbalance_before: float | None
    imbalance_after: float | None


@dataclass(frozen=True)
class _Plan:
    """Where every neuron of this stage goes: labels by network, numbered by placement, and what the placement gains."""

    labels: dict[str, Tensor]
    imbalance_before: float | None = None
    imbalance_after: float | None = None
    seconds_statistics: float = 0.0
    seconds_cluster: float = 0.0


class Coordinator:
    """Switches feed-forward networks between dense and sparse; one object on every rank, all of them alike.

    Args:
        ffns: this stage's networks by the name of their module, in order.
        names: the networks of all stages, in order.
    Raises:
        ConfigError: `ssd.partition` names a recorded partition that does not fit.
    """

    def __init__(
        self,
        ssd: SSDConfig,
        ffns: Mapping[str, SwitchableFFN],
        names: Sequence[str],
        state: LogicalState,
        probe: ProbeBatch,
        schedule: Schedule,
        topology: Topology,
        seed: int,
    ) -> None:
        self._ssd = ssd
        self._ffns = dict(ffns)
        self._names = list(names)
        self._state = state
        self._probe = probe
        self._topology = topology
        self._clustering = Clustering(ssd, ffns, names, topology, seed)
        self.schedule = schedule
        self.mode: Mode = "dense"
        self.has_partition = False  # once a switch has formed experts, the model can be evaluated in both modes
        self._labels: dict[str, Tensor] = {}  # of this stage
        self._expert_ids: dict[str, Tensor] = {}  # of this stage
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
        """Experts of the last switch by neuron identity, [F] int64 for each layer of all stages: what ssd.partition can
        replay (collective)."""
        layers = {}
        for name, ffn in self._ffns.items():
            identities = ffn.bank.neuron_ids.cpu()
            layers[name] = torch.empty_like(identities)
            layers[name][identities] = _contiguous(len(identities), self._ssd.num_experts)
        return self._of_all_stages("partition", layers)

    def set_mode(self, mode: Mode) -> None:
        """Compute in `mode` from now on; nothing else changes."""
        self.mode = mode
        for ffn in self._ffns.values():
            ffn.mode = mode

    def state_dict(self) -> tuple[dict[str, object], dict[str, Tensor]]:
        """What a checkpoint keeps of all stages: plain values, ready for JSON, and tensors (collective)."""
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
        stages = self._topology.pipeline.gather_objects("the coordinator's state", tensors)
        return values, {name: tensor for stage in stages for name, tensor in stage.items()}

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
            found = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            kept.update({name: tensor for name, tensor in found.items() if name in self._ffns})

    def _switch(self, step: int, wanted: Mode) -> SwitchReport:
        """Plan -> check -> apply -> verify -> commit. Nothing is changed before all ranks have the same plan."""
        started = time.perf_counter()
        before_mode, reason = self.mode, self.schedule.decision(step).reason
        self.set_mode("dense")
        loss_before = self._probe.loss()
        plan, applied, similarity = _Plan({}), Applied(0, 0.0, 0.0), []
        if wanted == "sparse":
            plan = self._plan(step)
            similarity = self._similarity(plan.labels)
        self._check_plan(step, wanted, plan, loss_before)
        if wanted == "sparse":
            applied = self._apply(plan)
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
            seconds_statistics=plan.seconds_statistics,
            seconds_cluster=plan.seconds_cluster,
            seconds_transfer=applied.transfer_seconds,
            seconds_verify=applied.verify_seconds,
            bytes_moved=applied.bytes_moved,
            loss_before=loss_before,
            loss_after=loss_after,
            loss_sparse=loss_sparse,
            similarity=similarity,
            top_k=self._top_k(),
            imbalance_before=plan.imbalance_before,
            imbalance_after=plan.imbalance_after,
        )

    def _plan(self, step: int) -> _Plan:
        started = time.perf_counter()
        signatures = self._signatures()
        observed = time.perf_counter()
        groupings = self._clustering.form_experts(self._labels, signatures, step)
        clustered = time.perf_counter()
        plan = self._place(groupings)
        statistics = observed - started + time.perf_counter() - clustered
        return replace(plan, seconds_statistics=statistics, seconds_cluster=clustered - observed)

    def _place(self, groupings: Mapping[str, Grouping]) -> _Plan:
        """Number the experts so that every home has as many tokens, as the probe batch chooses them."""
        homes, num_experts = self._topology.homes, self._ssd.num_experts
        labels = {name: grouping.labels for name, grouping in groupings.items()}
        if homes == 1:
            return _Plan(labels)
        centroids = {name: grouping.centroids for name, grouping in groupings.items()}
        statistics = collect_statistics(self._ffns, self._probe, centroids, self._ssd.top_k, signatures=False)
        before, after = {}, {}
        for name, layer in statistics.items():
            load = torch.bincount(layer.expert_ids.flatten(), minlength=num_experts)
            numbers = balanced_numbering(load, homes)
            labels[name] = numbers[labels[name]]
            before[name] = imbalance(load, homes)
            after[name] = imbalance(load[numbers.argsort()], homes)
        return _Plan(labels, max(self._of_all_stages("loads", before)), max(self._of_all_stages("placed loads", after)))

    def _check_plan(self, step: int, wanted: Mode, plan: _Plan, loss: float) -> None:
        """The last moment at which nothing has changed.

        Raises:
            SwitchError: training has diverged.
            CollectiveError: the ranks do not have the same plan.
        """
        if not math.isfinite(loss):
            raise SwitchError(f"the dense loss of the probe batch was {loss} before a switch: training has diverged")
        digests = {name: hashlib.sha256(labels.numpy().tobytes()).hexdigest() for name, labels in plan.labels.items()}
        self._topology.stage.agree(f"plan of the switch at step {step}", {"step": step, "to": wanted, "plan": digests})
        self._topology.world.agree(f"switch at step {step}", {"step": step, "to": wanted, "loss": loss})

    def _apply(self, plan: _Plan) -> Applied:
        experts = self._ssd.num_experts
        applied = regroup_neurons(self._ffns, plan.labels, experts, self._state, self._topology)
        self._labels = {name: _contiguous(label.numel(), experts) for name, label in plan.labels.items()}
        self._expert_ids = {}
        self._set_top_k(self._allocate())
        self.has_partition = True
        return applied

    def _similarity(self, labels: Mapping[str, Tensor]) -> list[float]:
        """Structure similarity by layer to the labels known before, where there are any."""
        known = {name: structure_similarity(old, labels[name]) for name, old in self._labels.items() if name in labels}
        return self._of_all_stages("similarity", known)

    def _allocate(self) -> list[int]:
        """Experts per token of each layer in the phase that begins."""
        ssd = self._ssd
        if ssd.top_k_allocation == "equal":
            return [ssd.top_k] * len(self._names)
        # With a single expert the straight-through router would not learn.
        least = min(ssd.top_k, 2 if ssd.router_update == "straight_through" else 1)
        costs = sparsity_costs(self._names, self._ffns, self._probe, ssd.num_experts, least)
        return allocate_experts(costs, ssd.top_k, least)

    def _top_k(self) -> list[int]:
        return self._of_all_stages("top_k", {name: ffn.router.top_k for name, ffn in self._ffns.items()})

    def _set_top_k(self, top_k: list[int]) -> None:
        for name, experts in zip(self._names, top_k, strict=True):
            if name in self._ffns:
                self._ffns[name].router.top_k = experts

    def _of_all_stages(self, what: str, mine: Mapping[str, T]) -> list[T]:
        """What each stage has by network, in the order of the networks; networks without are left out (collective)."""
        stages = self._topology.pipeline.gather_objects(what, dict(mine))
        merged = {name: value for stage in stages for name, value in stage.items()}
        return [merged[name] for name in self._names if name in merged]

    def _verify_loss(self, before: float, after: float) -> None:
        dtype = next(iter(self._ffns.values())).bank.w_in.dtype
        automatic = self._ssd.switch_tolerance == "auto"
        tolerance = SWITCH_TOLERANCE[dtype] if automatic else float(self._ssd.switch_tolerance)
        if not abs(after - before) <= tolerance * abs(before):
            raise SwitchError(
                f"the dense loss of the probe batch went from {before:.6f} to {after:.6f} in a switch; "
                f"ssd.switch_tolerance allows a relative change of {tolerance:g}"
            )

    @torch.no_grad()
    def _check(self, step: int) -> CheckReport:
        started = time.perf_counter()
        names = [name for name in self._names[: self._ssd.check_layers] if name in self._ffns]
        groupings = self._clustering.follow(names, self._labels, step)
        labels = {name: grouping.labels for name, grouping in groupings.items()}
        centroids = {name: grouping.centroids for name, grouping in groupings.items()}
        statistics = collect_statistics(self._ffns, self._probe, centroids, self._ssd.top_k, signatures=False)
        ids = {name: statistics[name].expert_ids for name in names}
        layers = self._similarity(labels)
        known = {
            name: expert_overlap(self._expert_ids[name], ids[name], self._ssd.num_experts)
            for name in names
            if name in self._expert_ids
        }
        overlaps = self._of_all_stages("overlap", known)
        self._labels.update(labels)
        self._expert_ids = ids
        active = {name: layer.active_fraction for name, layer in statistics.items()}
        report = CheckReport(
            similarity=sum(layers) / len(layers) if layers else None,
            similarity_layers=layers,
            overlap=sum(overlaps) / len(overlaps) if overlaps else None,
            active_fraction=self._of_all_stages("active fraction", active),
            seconds=time.perf_counter() - started,
        )
        self._topology.world.agree(f"check at step {step}", [step, report.similarity, report.overlap])
        return report

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
