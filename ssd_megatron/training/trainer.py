"""The training loop: one step after the other, and between steps whatever is due."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from ssd_megatron.config.load import RunConfig
from ssd_megatron.model.cost import flops_per_token
from ssd_megatron.model.language_model import LanguageModel
from ssd_megatron.parallel.collectives import CollectiveError, named
from ssd_megatron.parallel.device import peak_memory
from ssd_megatron.parallel.topology import Topology
from ssd_megatron.sparse_weights.masked_weights import MaskedWeights
from ssd_megatron.switching.coordinator import Coordinator
from ssd_megatron.switching.partition import save_partition
from ssd_megatron.switching.switch import SwitchError
from ssd_megatron.training.checkpoint import Checkpointer
from ssd_megatron.training.checkpoint_files import CheckpointError
from ssd_megatron.training.console import StepLine
from ssd_megatron.training.engine import Batch, Engine, StepResult
from ssd_megatron.training.routing_record import StepRouting
from ssd_megatron.training.run_log import RunLog
from ssd_megatron.training.signals import StopRequests

Status = Literal["finished", "stopped"]


class TrainingError(RuntimeError):
    """Training cannot go on; the message says where it broke."""


@dataclass
class Counters:
    """What a run has spent so far: FLOPs, FLOPs had all steps been dense, and bad steps in a row."""

    flops: float = 0.0
    flops_dense: float = 0.0
    bad_steps: int = 0


class Trainer:
    """Trains from the step after `done_steps` to the last, or until it is asked to stop.

    Args:
        batches: this rank's microbatches from that step on.
        eval_batches: this rank's part of the fixed evaluation batches.
        masks: of sparse weights; None: weights are dense.
        partitions: folder where each switch records its experts, for ssd.partition.
        routing: around each training step, see `step_routing`.
        peak_flops: peak FLOP/s of one device, or None where it is not known.
    """

    def __init__(
        self,
        config: RunConfig,
        topology: Topology,
        *,
        engine: Engine,
        model: LanguageModel,
        coordinator: Coordinator,
        masks: MaskedWeights | None,
        checkpointer: Checkpointer,
        batches: Iterator[Batch],
        eval_batches: list[Batch],
        partitions: Path,
        routing: StepRouting,
        log: RunLog,
        stop: StopRequests,
        counters: Counters,
        done_steps: int,
        peak_flops: float | None,
    ) -> None:
        self._config = config
        self._section = config.ssd_megatron
        self._topology = topology
        self._engine = engine
        self._model = model
        self._coordinator = coordinator
        self._masks = masks
        self._checkpointer = checkpointer
        self._batches = batches
        self._eval_batches = eval_batches
        self._partitions = partitions
        self._routing = routing
        self._log = log
        self._stop = stop
        self._counters = counters
        self._done = done_steps
        self._peak_flops = peak_flops
        shape, ssd = self._section.model, self._section.ssd
        self._flops = flops_per_token(shape, ssd, self._section.live_weights)
        self._flops_dense = flops_per_token(shape, ssd).dense
        self._tokens_per_step = config.train_batch_size * shape.sample_tokens

    @property
    def done_steps(self) -> int:
        return self._done

    def run(self) -> Status:
        """Train. Every state that is left behind is saved.

        Raises:
            TrainingError: too many steps in a row with NaN or infinite loss or gradients.
            SwitchError: a switch could not be verified.
            CheckpointError: a checkpoint could not be written.
        """
        try:
            return self._run()
        except (TrainingError, SwitchError) as error:
            # All ranks are here, but for those of other pipeline stages than the one whose neurons are not verified.
            if isinstance(error, TrainingError) or self._topology.pipeline.size == 1:
                try:
                    self._checkpointer.finish()
                except CheckpointError as lost:
                    self._log.event(f"step {self._done}: {lost}")
            raise

    def _run(self) -> Status:
        training, interval = self._section.training, self._section.checkpoint.interval
        if training.stop_after_step is not None and self._done >= training.stop_after_step:
            self._log.event(f"step {self._done}: training.stop_after_step ({training.stop_after_step}) is reached")
            return "stopped"
        while self._done < training.train_steps:
            self._train_step(self._done + 1)
            step = self._done
            last = step == training.train_steps
            if last or step % training.eval_interval == 0:
                with named(f"evaluation after step {step}"):
                    self._evaluate(step)
            reason = self._stop_reason(step)
            due = step % interval == 0 and self._counters.bad_steps == 0  # bad ones must not crowd out good checkpoints
            if last or reason is not None or due:
                with named(f"checkpoint after step {step}"):
                    self._save(step)
            elif self._completed(step, self._checkpointer.poll):
                self._log.event(f"step {step}: the checkpoint in the background is complete")
            if reason is not None and not last:
                self._completed(step, self._checkpointer.finish)
                self._log.event(f"step {step}: saved and stopped by {reason}")
                return "stopped"
        self._completed(self._done, self._checkpointer.finish)
        return "finished"

    def _train_step(self, step: int) -> None:
        with named(f"switch before step {step}"):
            switch = self._coordinator.before_step(step)
        if switch is not None:
            self._log.switch(step, switch)
            if switch.to_mode == "sparse":
                partition = self._coordinator.partition()
                if self._topology.is_first:
                    save_partition(self._partitions / f"step_{step:08d}.safetensors", partition)
        if self._masks is not None:
            self._masks.before_step(step)
        mode = self._coordinator.mode
        started = time.perf_counter()
        batch = [next(self._batches) for _ in range(self._config.gradient_accumulation_steps)]
        with named(f"training step {step}"), self._routing(step, mode):
            result = self._engine.train_step(batch)
        seconds = time.perf_counter() - started
        self._done = step
        self._counters.flops += self._flops.of(mode) * self._tokens_per_step
        self._counters.flops_dense += self._flops_dense * self._tokens_per_step
        self._record_step(step, mode, result, seconds)
        bad = (result.skipped and not result.rescaled) or not math.isfinite(result.loss)
        if result.rescaled:
            self._log.event(
                f"step {step}: gradients overflow fp16, the update is skipped: loss scale {result.loss_scale:g}"
            )
        elif bad:
            self._bad_step(step, result, batch)
        else:
            self._counters.bad_steps = 0
        if self._masks is not None:
            with named(f"masks after step {step}"):
                update = self._masks.after_step(step)
            if update is not None:
                self._log.masks(step, update)
        with named(f"check after step {step}"):
            check = self._coordinator.after_step(step, None if bad else result.loss)
        if check is not None:
            self._log.check(step, check)
        if self._coordinator.spiking:
            self._log.record("fault", step, what="the loss rose after the last switch")
            self._log.event(f"step {step}: the loss rose after the last switch")
        if mode == "sparse":
            self._look_at_loads(step)

    def _record_step(self, step: int, mode: str, result: StepResult, seconds: float) -> None:
        speed = self._tokens_per_step / seconds
        flops_per_second = speed * self._flops.of(mode)
        self._log.record(
            "train",
            step,
            loss=result.loss,
            grad_norm=result.grad_norm,
            lr=result.lr,
            mode=mode,
            tokens_per_second=speed,
            seconds=seconds,
            flops=self._counters.flops,
            flops_dense=self._counters.flops_dense,
            skipped=result.skipped,
            loss_scale=result.loss_scale,
            peak_memory=peak_memory(self._topology.device),
        )
        mfu = None
        if self._peak_flops is not None:
            mfu = flops_per_second / (self._peak_flops * self._topology.world.size)
        self._log.step(StepLine(step, result.loss, mode, speed, flops_per_second / 1e12, seconds, mfu))

    def _bad_step(self, step: int, result: StepResult, batch: list[Batch]) -> None:
        """Count a step whose loss or gradients are not finite; the update was skipped."""
        self._counters.bad_steps += 1
        in_a_row, limit = self._counters.bad_steps, self._section.training.max_bad_steps
        what = f"loss {result.loss}, gradient norm {result.grad_norm}: the update is skipped ({in_a_row} in a row)"
        self._log.record("fault", step, what=what)
        self._log.event(f"step {step}: {what}")
        if in_a_row >= limit:
            found = first_non_finite(self._model, lambda: self._engine.mean_loss(batch[:1]))
            stages = self._topology.pipeline.gather_objects("modules that are not finite", found)
            where = next((f"the output of {name}" for name in stages if name is not None), "the gradients")
            raise TrainingError(
                f"{in_a_row} steps in a row up to step {step} had a loss or gradients that are not finite "
                f"(training.max_bad_steps is {limit}); first not finite: {where}. "
                "Look at the data, or start in another run_dir with a lower learning rate"
            )

    def _evaluate(self, step: int) -> None:
        """Mean loss over the fixed validation batches, of the same weights in both modes."""
        started, mode = time.perf_counter(), self._coordinator.mode
        losses: dict[str, float | None] = {"dense": None, "sparse": None}
        self._coordinator.set_mode("dense")
        losses["dense"] = self._engine.mean_loss(self._eval_batches)
        if self._coordinator.has_partition:
            self._coordinator.set_mode("sparse")
            losses["sparse"] = self._engine.mean_loss(self._eval_batches)
        self._coordinator.set_mode(mode)
        seconds = time.perf_counter() - started
        self._log.record("eval", step, loss_dense=losses["dense"], loss_sparse=losses["sparse"], seconds=seconds)
        shown = ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items() if loss is not None)
        self._log.event(f"step {step}: validation loss {shown}")

    def _stop_reason(self, step: int) -> str | None:
        """Why all ranks stop after this step; None if they go on. One rank that was asked is enough."""
        if step == self._section.training.stop_after_step:
            return f"training.stop_after_step ({step})"
        mine = self._stop.reason(look_for_file=self._topology.is_first)
        asked, latest, earliest = self._topology.world.max(f"end of step {step}", [int(mine is not None), step, -step])
        if latest != -earliest:
            raise CollectiveError(f"this rank is at step {step}, others are at steps {-earliest} to {latest}")
        if not asked:
            return None
        return mine or "a request to another rank"

    def _save(self, step: int) -> None:
        self._log.flush()
        started = time.perf_counter()
        folder = self._checkpointer.save(step, vars(self._counters))
        seconds = time.perf_counter() - started
        self._log.record("save", step, seconds=seconds)
        if folder is not None:
            self._log.event(f"step {step}: checkpoint {folder} in {seconds:.2f} s")

    def _completed(self, step: int, work: Callable[[], Path | None]) -> bool:
        """Whether a save in the background has become a checkpoint by this, for which training waits."""
        started = time.perf_counter()
        if work() is None:
            return False
        self._log.record("save", step, seconds=time.perf_counter() - started)
        return True

    def _look_at_loads(self, step: int) -> None:
        """Log tokens per expert in the last microbatch, over all data-parallel ranks; place experts anew if due."""
        ssd, due = self._section.ssd, step % self._section.logging.log_interval == 0
        if not due and (ssd.rebalance_limit is None or step % ssd.check_interval != 0):
            return
        names, ffns = list(self._model.ffns), self._model.ffns.values()
        loads = torch.stack([ffn.expert_load for ffn in ffns])
        self._topology.data.reduce_("expert loads", loads)
        loads = loads.cpu()
        if due:
            stages = self._topology.pipeline.gather_objects("expert loads", loads.tolist())
            self._log.loads(step, [layer for stage in stages for layer in stage], self._topology.homes)
        placement = self._coordinator.rebalance(step, dict(zip(names, loads, strict=True)))
        if placement is not None:
            self._log.placement(step, placement)


def first_non_finite(model: nn.Module, forward: Callable[[], object]) -> str | None:
    """Name the first module whose output is not finite in a forward pass, None if none is."""
    found: list[str] = []

    def hook(name: str) -> Callable[[nn.Module, object, object], None]:
        def look(_module: nn.Module, _inputs: object, output: object) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            if not found and isinstance(tensor, Tensor) and not bool(torch.isfinite(tensor).all()):
                found.append(name)

        return look

    handles = [module.register_forward_hook(hook(name)) for name, module in model.named_modules() if name]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None
