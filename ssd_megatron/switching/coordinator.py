"""The global coordinator: watches how neurons fire together, decides once for all ranks, and switches.

Every rank decides the same: what is decided on (clusterings, statistics, losses) is the same on all of them, which they
check, and the schedule is a pure function of it.
"""

import math
import time
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ssd_megatron.config.schema import Mode, SSDConfig
from ssd_megatron.parallel.logical_state import LogicalState
from ssd_megatron.switching.allocation import allocate_alike, sparsity_costs
from ssd_megatron.switching.clustering import Clustering
from ssd_megatron.switching.loss_watch import LossWatch
from ssd_megatron.switching.networks import Networks
from ssd_megatron.switching.partition import structure_similarity
from ssd_megatron.switching.planner import Plan, Planner, labels_of
from ssd_megatron.switching.reports import CheckReport, PlacementReport, SwitchReport
from ssd_megatron.switching.schedule import Schedule
from ssd_megatron.switching.statistics import ProbeBatch, collect_statistics, expert_overlap
from ssd_megatron.switching.switch import (
    ROUTER_GROUP,
    Applied,
    SwitchError,
    regroup_neurons,
    renumber_routers,
    set_routers,
)

# Relative change of the dense probe loss that a permutation of the neurons may cause: sums in another order.
SWITCH_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-3, torch.float16: 1e-3}


class Coordinator:
    """Switches the networks between dense and sparse; one object on every rank, all of them alike.

    Raises:
        ConfigError: `ssd.partition` names a recorded partition that does not fit.
    """

    def __init__(
        self,
        ssd: SSDConfig,
        networks: Networks,
        state: LogicalState,
        probe: ProbeBatch,
        schedule: Schedule,
        seed: int,
    ) -> None:
        self._ssd = ssd
        self.networks = networks
        self._state = state
        self._probe = probe
        self._clustering = Clustering(ssd, networks, seed)
        self._planner = Planner(ssd, networks, self._clustering, probe)
        self._watch = LossWatch(ssd.spike_factor)
        self.schedule = schedule
        self.mode: Mode = "dense"
        self.has_partition = False  # once a switch has formed experts, the model can be evaluated in both modes
        self._labels: dict[str, Tensor] = {}  # of this stage, by neuron identity
        self._expert_ids: dict[str, Tensor] = {}  # of this stage, by probe token, int32

    def before_step(self, step: int) -> SwitchReport | None:
        """Bring the model into the mode of `step` (collective). To be called before every step.

        Raises:
            SwitchError: the switch could not be verified; the run must end.
        """
        wanted = self.schedule.mode(step)
        report = None if wanted == self.mode else self._switch(step, wanted)
        # Set in every step: the scheduler, which gives all groups the same rate, does not move after a skipped one.
        rate = 0.0 if self.mode == "dense" else self._state.learning_rates()["decay"]
        self._state.set_learning_rate(ROUTER_GROUP, rate)
        return report

    def after_step(self, step: int, loss: float | None) -> CheckReport | None:
        """Watch the loss, look at the activation pattern every check_interval steps, and decide the next mode.

        Args:
            loss: of this step, the same on every rank; None if it was not finite.
        """
        report = self._check(step) if self._is_due(step) else None
        spike = loss is not None and self._is_spike(step, loss)
        stable = self.schedule.after_step(step, similarity=None if report is None else report.agreement, spike=spike)
        return None if report is None else replace(report, stable=stable)

    def rebalance(self, step: int, loads: Mapping[str, Tensor]) -> PlacementReport | None:
        """Inside a sparse phase, when a check is due and the homes' loads differ by more than ssd.rebalance_limit, give
        experts new homes, neurons and routers with all their moments; nothing changes but where they are (collective).

        Args:
            loads: of this stage's networks, tokens of each expert [E] in the last microbatch of all data-parallel
                ranks.
        Raises:
            SwitchError: the move could not be verified; the run must end.
        """
        limit, networks = self._ssd.rebalance_limit, self.networks
        if limit is None or self.mode == "dense" or networks.homes == 1 or not self._is_due(step):
            return None
        started = time.perf_counter()
        plan = self._planner.place_by_load(loads)
        assert plan.imbalance_before is not None and plan.imbalance_after is not None
        if plan.imbalance_before <= limit or plan.imbalance_after >= plan.imbalance_before:
            return None
        self._agree_on(step, "sparse", plan)
        applied = regroup_neurons(networks, plan.placed(), self._ssd.num_experts, self._state)
        renumber_routers(networks, plan.numbers, self._state)
        return PlacementReport(
            time.perf_counter() - started, applied.bytes_moved, plan.imbalance_before, plan.imbalance_after
        )

    @property
    def spiking(self) -> bool:
        """The loss has just risen after a switch, and stays up."""
        return self._watch.spiking

    def partition(self) -> list[Tensor]:
        """Experts of the last switch by neuron identity, [F] int64 for each layer of all stages: what ssd.partition can
        replay (collective)."""
        local = self.networks.local
        layers = {name: labels_of(ffn.bank, self._ssd.num_experts) for name, ffn in local.items()}
        return self.networks.all_stages("partition", layers)

    def keep_experts(self, top_k: list[int]) -> None:
        """Take the slices of the banks as they are for experts, of which a token computes so many in each layer."""
        self.networks.set_top_k(top_k)
        self.has_partition = True

    def set_mode(self, mode: Mode) -> None:
        """Compute in `mode` from now on; nothing else changes."""
        self.mode = mode
        for ffn in self.networks.local.values():
            ffn.mode = mode

    def state_dict(self) -> tuple[dict[str, object], dict[str, Tensor]]:
        """What a checkpoint keeps of all stages: plain values, ready for JSON, and, on each pipeline's first rank,
        tensors (collective)."""
        values: dict[str, object] = {
            "mode": self.mode,
            "schedule": self.schedule.state_dict(),
            "loss_watch": self._watch.state_dict(),
            "top_k": self.networks.top_k(),
            "has_partition": self.has_partition,
        }
        tensors = {f"labels/{name}": labels for name, labels in self._labels.items()}
        tensors |= {f"expert_ids/{name}": ids for name, ids in self._expert_ids.items()}
        stages = self.networks.topology.pipeline.objects_to_first("the coordinator's state", tensors)
        return values, {name: tensor for stage in stages for name, tensor in stage.items()}

    def load_state_dict(self, values: Mapping[str, object], tensors: Mapping[str, Tensor]) -> None:
        mode, schedule, watch, top_k = (values[key] for key in ("mode", "schedule", "loss_watch", "top_k"))
        assert mode in ("dense", "sparse") and isinstance(schedule, dict)
        assert isinstance(watch, dict) and isinstance(top_k, list)
        self.networks.set_top_k(top_k)
        self.has_partition = bool(values["has_partition"])
        self.set_mode("sparse" if mode == "sparse" else "dense")
        self.schedule.load_state_dict(schedule)
        self._watch.load_state_dict(watch)
        for prefix, kept in (("labels/", self._labels), ("expert_ids/", self._expert_ids)):
            kept.clear()
            found = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
            kept.update({name: tensor for name, tensor in found.items() if name in self.networks.local})

    def _is_spike(self, step: int, loss: float) -> bool:
        """Whether the loss calls for dense mode; the same on all ranks, whose sums may differ in the last bit."""
        since = step + 1 - self.schedule.decision(step).step
        spike = self._watch.step(loss, since)
        if self._ssd.on_spike != "dense" or not self._watch.is_watching(since):
            return False
        return bool(self.networks.topology.world.max("loss after a switch", [int(spike)])[0])

    def _is_due(self, step: int) -> bool:
        return step % self._ssd.check_interval == 0

    def _switch(self, step: int, wanted: Mode) -> SwitchReport:
        """Plan -> check -> apply -> verify -> commit. Nothing is changed before all ranks have the same plan."""
        started = time.perf_counter()
        before_mode, reason = self.mode, self.schedule.decision(step).reason
        self.set_mode("dense")
        loss_before = self._probe.loss()
        if not math.isfinite(loss_before):
            raise SwitchError(f"the dense loss of the probe batch was {loss_before} before a switch: it has diverged")
        plan, applied, similarity = Plan({}, {}), Applied(0, 0.0, 0.0), []
        if wanted == "sparse":
            plan = self._planner.form_experts(self._labels, step)
            similarity = self._similarity(plan.labels)
        self._agree_on(step, wanted, plan)
        if wanted == "sparse":
            applied = self._apply(plan)
        loss_after = self._probe.loss()
        self._verify_loss(loss_before, loss_after)
        self.set_mode("sparse")
        loss_sparse = self._probe.loss()
        self.set_mode(wanted)
        self._watch.switched()
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
            top_k=self.networks.top_k(),
            imbalance_before=plan.imbalance_before,
            imbalance_after=plan.imbalance_after,
        )

    def _agree_on(self, step: int, wanted: Mode, plan: Plan) -> None:
        """The last moment at which nothing has changed.

        Raises:
            CollectiveError: the ranks do not have the same plan.
        """
        topology = self.networks.topology
        topology.stage.agree(f"plan of step {step}", {"step": step, "to": wanted, "plan": plan.digest()})
        topology.world.agree(f"switch at step {step}", {"step": step, "to": wanted})

    def _apply(self, plan: Plan) -> Applied:
        experts = self._ssd.num_experts
        applied = regroup_neurons(self.networks, plan.placed(), experts, self._state)
        if self._ssd.partition != "kept":
            set_routers(self.networks, experts, self._state)
        self._labels = dict(plan.labels)
        self._expert_ids = {}
        self.networks.set_top_k(self._allocate())
        self.has_partition = True
        return applied

    def _similarity(self, labels: Mapping[str, Tensor]) -> list[float]:
        """Structure similarity by layer to the labels known before, where there are any."""
        known = {name: structure_similarity(old, labels[name]) for name, old in self._labels.items() if name in labels}
        return self.networks.all_stages("similarity", known)

    def _allocate(self) -> list[int]:
        """Experts per token of each layer in the phase that begins."""
        ssd = self._ssd
        if ssd.top_k_allocation == "equal":
            return [ssd.top_k] * len(self.networks.names)
        # With a single expert the straight-through router would not learn.
        least = min(ssd.top_k, 2 if ssd.straight_through else 1)
        costs = sparsity_costs(self.networks, self._probe, ssd.num_experts, least)
        return allocate_alike(costs, self.networks.tokens, ssd.top_k, least)

    def _verify_loss(self, before: float, after: float) -> None:
        dtype = next(iter(self.networks.local.values())).bank.w_in.dtype
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
        networks, ssd = self.networks, self._ssd
        names = [name for name in networks.names[: ssd.check_layers] if name in networks.local]
        groupings = self._clustering.follow(names, self._labels, step)
        labels = {name: grouping.labels for name, grouping in groupings.items()}
        centroids = {name: grouping.centroids for name, grouping in groupings.items()}
        top_k = dict.fromkeys(networks.local, ssd.top_k)
        statistics = collect_statistics(networks.local, self._probe, centroids, top_k, signatures=False)
        ids = {name: statistics[name].expert_ids.to(torch.int32) for name in names}
        layers = self._similarity(labels)
        known = {
            name: expert_overlap(self._expert_ids[name], ids[name], ssd.num_experts)
            for name in names
            if name in self._expert_ids
        }
        overlaps = networks.all_stages("overlap", known)
        self._labels.update(labels)
        self._expert_ids = ids
        active = {name: layer.active_fraction for name, layer in statistics.items()}
        report = CheckReport(
            similarity=sum(layers) / len(layers) if layers else None,
            similarity_layers=layers,
            overlap=sum(overlaps) / len(overlaps) if overlaps else None,
            active_fraction=networks.all_stages("active fraction", active),
            seconds=time.perf_counter() - started,
        )
        networks.topology.world.agree(f"check at step {step}", [step, report.similarity, report.overlap])
        return report
