"""One optimizer step of a global batch through DeepSpeed's engine.

`train_step(microbatches)` is what the trainer knows of the engine; without pipeline it is DeepSpeedEngine (ZeRO 1, 2).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import deepspeed
import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from ssd_megatron.config.deepspeed_keys import WSDParams
from ssd_megatron.config.load import RunConfig
from ssd_megatron.model.gpt import GPT
from ssd_megatron.parallel.logical_state import LogicalState
from ssd_megatron.parallel.topology import Topology
from ssd_megatron.parallel.zero import ZeroAdapter
from ssd_megatron.switching.switch import ROUTER_GROUP

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class StepResult:
    """One optimizer step: mean loss over the global batch's valid tokens, gradient norm before clipping, learning rate.

    `skipped`: loss or gradients were not finite and nothing was updated.
    """

    loss: float
    grad_norm: float
    lr: float
    skipped: bool


class DataParallelEngine:
    """The model under DeepSpeedEngine: every process holds all layers and its part of the batch."""

    def __init__(self, model: GPT, config: RunConfig, topology: Topology) -> None:
        self._model = model
        self._topology = topology
        self._accumulation = config.gradient_accumulation_steps
        weight_decay = config.deepspeed["optimizer"]["params"]["weight_decay"]
        engine, optimizer, _, lr_scheduler = deepspeed.initialize(
            model=model,
            model_parameters=parameter_groups(model, weight_decay),
            config=config.deepspeed,
            lr_scheduler=own_scheduler(config),
        )
        assert isinstance(engine, DeepSpeedEngine)
        self.deepspeed = engine
        self.lr_scheduler = lr_scheduler
        self._optimizer = optimizer
        self.state = LogicalState(model, ZeroAdapter(optimizer), topology)

    def train_step(self, microbatches: Sequence[Batch]) -> StepResult:
        """Forward, backward and update for this rank's microbatches of one global batch (collective).

        The loss is the sum over the valid tokens of the global batch divided by their number, which is known before
        backward: it does not depend on how the batch is cut into ranks and microbatches.
        """
        valid = self._topology.sum([float(sum(batch["loss_mask"].sum(dtype=torch.float64) for batch in microbatches))])
        # DeepSpeed divides by accumulation steps (backward) and data-parallel size (reduction).
        scale = self._accumulation * self._topology.data_parallel_size / valid[0]
        lr = float(self._optimizer.param_groups[0]["lr"])
        self._model.train()
        total = torch.zeros((), dtype=torch.float64, device=self._topology.device)
        for batch in microbatches:
            losses = self.deepspeed(batch["tokens"], batch["position_ids"], batch["labels"])
            loss_sum = (losses * batch["loss_mask"]).sum()
            self.deepspeed.backward(loss_sum * scale)
            self.deepspeed.step()
            total += loss_sum.detach()
        skipped = bool(self._optimizer.overflow)
        grad_norm = float("nan") if skipped else float(self.deepspeed.get_global_grad_norm())
        return StepResult(self._topology.sum([float(total)])[0] / valid[0], grad_norm, lr, skipped)

    @torch.no_grad()
    def token_losses(self, batch: Batch) -> Tensor:
        """Losses [b, s] of a batch without dropout and gradients, in the mode that the networks have."""
        self._model.eval()
        losses: Tensor = self._model(batch["tokens"], batch["position_ids"], batch["labels"])
        return losses

    def close(self) -> None:
        """Free what the engine holds, so that the process can make another one."""
        self.deepspeed.destroy()


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Matrices with weight decay, norms and biases without, routers without and with a learning rate of their own."""
    groups: dict[str, list[nn.Parameter]] = {"decay": [], "no_decay": [], ROUTER_GROUP: []}
    for name, parameter in model.named_parameters():
        if name.endswith("router.weight"):
            groups[ROUTER_GROUP].append(parameter)
        else:
            groups["decay" if parameter.dim() > 1 else "no_decay"].append(parameter)
    return [
        {"name": name, "params": parameters, "weight_decay": weight_decay if name == "decay" else 0.0}
        for name, parameters in groups.items()
        if parameters
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
