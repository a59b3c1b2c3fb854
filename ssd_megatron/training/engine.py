"""One optimizer step of a global batch through DeepSpeed's engine, and the forward pass alone.

`train_step(microbatches)` and `mean_loss(batches)` are what the trainer knows of the engine. Without pipeline it is
DeepSpeedEngine (ZeRO 1, 2), with one it is PipelineEngine (ZeRO 1, pipeline_engine.py).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import deepspeed
import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from ssd_megatron.config.deepspeed_keys import WSDParams
from ssd_megatron.config.load import RunConfig
from ssd_megatron.model.language_model import WORD_EMBEDDING, LanguageModel
from ssd_megatron.model.loss_parts import loss_parts, mean_of_parts
from ssd_megatron.parallel.experts import declare_expert_parallel
from ssd_megatron.parallel.logical_state import LogicalState
from ssd_megatron.parallel.sharding import expert_group_of
from ssd_megatron.parallel.topology import ModelParallelUnit, Topology
from ssd_megatron.parallel.zero import ZeroAdapter
from ssd_megatron.switching.switch import ROUTER_GROUP
from ssd_megatron.training.saved_model import is_router

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class StepResult:
    """One optimizer step: mean loss over the global batch's valid tokens, gradient norm before clipping, learning rate.

    `skipped`: loss or gradients were not finite and nothing was updated; `rescaled`: and a smaller loss scale may help.
    """

    loss: float
    grad_norm: float
    lr: float
    skipped: bool
    rescaled: bool = False
    loss_scale: float = 1.0


class Engine(ABC):
    """A model under a DeepSpeed engine.

    Attributes:
        deepspeed: the engine.
        zero: its optimizer.
        state: masters and moments by logical name.
    """

    deepspeed: DeepSpeedEngine
    zero: ZeroAdapter
    state: LogicalState

    def __init__(self, model: LanguageModel, config: RunConfig, topology: Topology) -> None:
        self._model = model
        self._topology = topology
        self._accumulation = config.gradient_accumulation_steps
        self._dtype = getattr(torch, config.dtype)

    def train_step(self, microbatches: Sequence[Batch]) -> StepResult:
        """Forward, backward and update for this rank's microbatches of one global batch (collective).

        Each part of the loss is the sum over what its mask lets through in the global batch, divided by the number of
        that, which is known before backward: it does not depend on how the batch is cut into ranks and microbatches.
        """
        homes = [ffn.homes for ffn in self._model.ffns.values()]
        for home in homes:
            home.begin_step(len(microbatches))
        for ffn in self._model.ffns.values():
            ffn.router.loss_weight = self.zero.loss_scale / len(microbatches)
        result = self._step(microbatches)
        for home in homes:
            home.end_step()
        return result

    @torch.no_grad()
    def mean_loss(self, batches: Sequence[Batch]) -> float:
        """Loss over the valid tokens of all ranks' batches without dropout, in the mode that the networks have.

        Collective; expert-parallel ranks give the same number of batches. Batches may be empty.
        """
        self._model.eval()
        parts_2M = torch.zeros(2, len(self._model.fields.masks), dtype=torch.float64)
        for batch, losses in self._losses(batches):
            parts_2M += loss_parts(losses, batch).cpu()
        # Each batch counts once: on the last stage, and there on one of the ranks that share its layers.
        if not (self._topology.is_last_stage and self._topology.tensor.rank == 0):
            parts_2M.zero_()
        total = self._topology.world.sum("mean loss", parts_2M.flatten().tolist())
        return float(mean_of_parts(torch.tensor(total, dtype=torch.float64).view_as(parts_2M)))

    def close(self) -> None:
        """Free what the engine holds, so that the process can make another one."""
        self.deepspeed.destroy()

    @abstractmethod
    def _step(self, microbatches: Sequence[Batch]) -> StepResult:
        """See train_step."""

    @abstractmethod
    def _losses(self, batches: Sequence[Batch]) -> Iterator[tuple[Batch, dict[str, Tensor]]]:
        """Batches and their losses by mask, on the last stage."""

    def _start(self, module: nn.Module, config: RunConfig, mpu: ModelParallelUnit | None) -> None:
        """Make the DeepSpeed engine around `module`, which holds the model."""
        topology = self._topology
        parameters = self._model.logical_parameters()
        banks = [p for ffn in self._model.ffns.values() for p in ffn.bank.neuron_parameters().values()]
        declare_expert_parallel(module, banks, topology)
        weight_decay = config.deepspeed["optimizer"]["params"]["weight_decay"]
        self.deepspeed, self._optimizer, _, self.lr_scheduler = deepspeed.initialize(
            model=module,
            model_parameters=parameter_groups(parameters, weight_decay),
            config=config.for_deepspeed(),
            lr_scheduler=own_scheduler(config),
            mpu=mpu,
        )
        tied = self._model.tied_weight
        copies = frozenset({WORD_EMBEDDING} if tied is not None and topology.is_last_stage else ())
        self.zero = ZeroAdapter(self._optimizer)
        self.state = LogicalState(parameters, self.zero, topology, kept_elsewhere=copies)

    def _valid(self, microbatches: Sequence[Batch]) -> list[float]:
        """What each mask lets through in the global batch."""
        masks = self._model.fields.masks
        mine = [float(sum(batch[mask].sum(dtype=torch.float64) for batch in microbatches)) for mask in masks]
        return self._topology.data.sum("valid tokens", mine)

    def _loss_scales(self, valid: Sequence[float]) -> list[float]:
        """What to multiply a microbatch's sums of losses by: DeepSpeed divides by accumulation steps (backward) and
        data-parallel size (reduction)."""
        return [self._accumulation * self._topology.data.size / count for count in valid]

    def _result(self, loss: float, lr: float, could_rescale: bool) -> StepResult:
        """Of a step before which the loss scale could still be lowered, or not."""
        skipped = bool(self._optimizer.overflow)
        rescaled = skipped and math.isfinite(loss) and could_rescale
        grad_norm = float("nan") if skipped else float(self.deepspeed.get_global_grad_norm())
        return StepResult(loss, grad_norm, lr, skipped, rescaled, self.zero.loss_scale)

    def _learning_rate(self) -> float:
        return float(self._optimizer.param_groups[0]["lr"])


class DataParallelEngine(Engine):
    """The model under DeepSpeedEngine: every process holds (its shard of) all layers and its part of the batch."""

    def __init__(self, model: LanguageModel, config: RunConfig, topology: Topology) -> None:
        super().__init__(model, config, topology)
        self._start(model, config, ModelParallelUnit(topology) if topology.tensor.size > 1 else None)

    def _step(self, microbatches: Sequence[Batch]) -> StepResult:
        valid, masks = self._valid(microbatches), self._model.fields.masks
        scales, lr, could_rescale = self._loss_scales(valid), self._learning_rate(), self.zero.can_lower_loss_scale
        self._model.train()
        totals = torch.zeros(len(masks), dtype=torch.float64, device=self._topology.device)
        for batch in microbatches:
            losses = self.deepspeed(batch)
            sums = torch.stack([(losses[mask] * batch[mask]).sum() for mask in masks])
            self.deepspeed.backward((sums * sums.new_tensor(scales)).sum())
            self.deepspeed.step()
            totals += sums.detach()
        total = self._topology.data.sum("training loss", totals.tolist())
        loss = sum(part / count for part, count in zip(total, valid, strict=True))
        return self._result(loss, lr, could_rescale)

    def _losses(self, batches: Sequence[Batch]) -> Iterator[tuple[Batch, dict[str, Tensor]]]:
        for batch in batches:
            yield batch, self._model(batch)


def parameter_groups(parameters: Mapping[str, nn.Parameter], weight_decay: float) -> list[dict[str, object]]:
    """Matrices with weight decay, norms and biases without, routers without and with a learning rate of their own.

    `role` says which of these a group is. Expert-parallel parameters have groups of their own, marked as DeepSpeed
    wants them: `moe`, and the name of the expert-parallel group as `name`.
    """
    groups: dict[tuple[str, str | None], list[nn.Parameter]] = {("decay", None): []}  # the first group's rate is shown
    for name, parameter in parameters.items():
        role = ROUTER_GROUP if is_router(name) else "decay" if parameter.dim() > 1 else "no_decay"
        groups.setdefault((role, expert_group_of(parameter)), []).append(parameter)
    return [
        {"role": role, "params": members, "weight_decay": weight_decay if role == "decay" else 0.0}
        | ({"name": role} if expert_group is None else {"name": expert_group, "moe": True})
        for (role, expert_group), members in groups.items()
    ]


def own_scheduler(config: RunConfig) -> Callable[[torch.optim.Optimizer], LambdaLR] | None:
    """The learning rate where DeepSpeed has no scheduler for it: WSD, or constant without a scheduler."""
    if "scheduler" in config.deepspeed:
        return None
    wsd = config.scheduler
    factor = (lambda _step: 1.0) if wsd is None else partial(wsd_factor, wsd)
    return lambda optimizer: LambdaLR(optimizer, factor)


def wsd_factor(wsd: WSDParams, step: int) -> float:
    """Warm-up, stable, decay: share of the peak rate after `step` steps; linear up, 1, linear down to min_lr_ratio."""
    assert isinstance(wsd.total_num_steps, int)
    rise = (step + 1) / wsd.warmup_num_steps
    left = max(0, wsd.total_num_steps - step)
    fall = wsd.min_lr_ratio + (1 - wsd.min_lr_ratio) * left / wsd.decay_num_steps
    return min(1.0, rise, fall)
