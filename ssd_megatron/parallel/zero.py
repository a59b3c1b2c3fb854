"""The one adapter on DeepSpeed's ZeRO optimizer (stages 1 and 2): fp32 masters and Adam moments by parameter.

ZeRO lays the parameters of an optimizer group end to end, cuts that line into equal parts, one a data-parallel rank,
and keeps masters and moments of its part only. `fragment` returns what this rank owns of one parameter.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor

MASTER, EXP_AVG, EXP_AVG_SQ = "master", "exp_avg", "exp_avg_sq"
KINDS = (MASTER, EXP_AVG, EXP_AVG_SQ)
# Elements: DeepSpeed's nccl_start_alignment_factor.
ALIGNMENT = 2
# Elements of a gradient whose squares are added up in fp32.
NORM_ROW = 512
# What a dynamic loss scale is, beside its settings.
LOSS_SCALER_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


@dataclass(frozen=True)
class Fragment:
    """Elements [start, start + values.numel()) of a flattened parameter, as a writable fp32 view of ZeRO's storage."""

    start: int
    values: Tensor


def partition_stops(numels: Sequence[int], ranks: int) -> list[int]:
    """Where ZeRO cuts a group's parameters, laid end to end: ends of the ranks' parts, the last one with padding.

    Source: DeepSpeed's flattening, which pads to a multiple of twice the ranks.
    """
    alignment = ALIGNMENT * ranks
    size = -(-sum(numels) // alignment) * ALIGNMENT
    return [size * (rank + 1) for rank in range(ranks)]


def row_norms(gradient: Tensor) -> Tensor:
    """Norms of runs of NORM_ROW elements, fp32: their norm, in fp64, is the gradient's to 1e-8, and copies nothing."""
    flat = gradient.detach().flatten()
    whole = flat.numel() // NORM_ROW * NORM_ROW
    rows = torch.linalg.vector_norm(flat[:whole].view(-1, NORM_ROW), dim=1, dtype=torch.float32)
    return torch.cat([rows, torch.linalg.vector_norm(flat[whole:], dtype=torch.float32)[None]])


class ZeroAdapter:
    """Reads and writes masters, moments and step counts of a DeepSpeedZeroOptimizer that wraps torch's Adam or AdamW.

    Raises:
        RuntimeError: DeepSpeed's internals are not those that this adapter knows (checked at construction).
    """

    def __init__(self, optimizer: DeepSpeedZeroOptimizer) -> None:
        if not isinstance(optimizer, DeepSpeedZeroOptimizer):
            raise RuntimeError(f"expected DeepSpeed's ZeRO stage 1 or 2 optimizer, got {type(optimizer).__name__}")
        if not isinstance(optimizer.optimizer, torch.optim.Adam):
            raise RuntimeError(f"expected torch's Adam or AdamW in ZeRO, got {type(optimizer.optimizer).__name__}")
        self._optimizer = optimizer
        self._flat: list[Tensor] = optimizer.single_partition_of_fp32_groups
        self._create_adam_state()
        self._check_layout()
        self._look_at_gradients_once()
        if dist.get_world_size(optimizer.dp_process_group) == 1:
            self._leave_gradients_where_they_are()
        if self._dynamic_scaler is not None:
            self._dynamic_scaler.raise_error_at_min_scale = False  # the trainer counts such steps

    @property
    def groups(self) -> list[dict[str, object]]:
        """The optimizer's parameter groups (lr, weight_decay, name), in order."""
        groups: list[dict[str, object]] = self._optimizer.optimizer.param_groups
        return groups

    def fragment(self, parameter: Tensor, kind: str) -> Fragment:
        """What this rank owns of `parameter` (possibly nothing), `kind` one of KINDS."""
        mapping = parameter._hp_mapping  # type: ignore[attr-defined]
        if mapping is None:
            return Fragment(0, torch.empty(0, device=parameter.device))
        flat = self._flat[mapping.param_group_index]
        source = flat.data if kind == MASTER else self._optimizer.optimizer.state[flat][kind]
        address = mapping.hp_fragment_address
        return Fragment(mapping.lp_fragment_address.start, source.narrow(0, address.start, address.numel))

    def step(self, group: int) -> int:
        """Adam's step count of one group."""
        return int(self._optimizer.optimizer.state[self._flat[group]]["step"])

    def set_step(self, group: int, step: int) -> None:
        self._optimizer.optimizer.state[self._flat[group]]["step"].fill_(float(step))

    @property
    def loss_scale(self) -> float:
        """What the loss is multiplied with before backward; 1 without fp16."""
        return float(self._optimizer.loss_scaler.cur_scale)

    @property
    def can_lower_loss_scale(self) -> bool:
        """Whether an overflow may be cured by a smaller loss scale."""
        scaler = self._dynamic_scaler
        return scaler is not None and scaler.cur_scale > scaler.min_scale

    def loss_scaler_state(self) -> dict[str, float]:
        """Empty without dynamic loss scaling."""
        scaler = self._dynamic_scaler
        return {} if scaler is None else {name: vars(scaler)[name] for name in LOSS_SCALER_STATE}

    def load_loss_scaler_state(self, state: dict[str, float]) -> None:
        """A run that has changed its precision keeps the scale that it starts with."""
        if self._dynamic_scaler is not None:
            vars(self._dynamic_scaler).update(state)

    @property
    def _dynamic_scaler(self) -> DynamicLossScaler | None:
        scaler = self._optimizer.loss_scaler
        return scaler if isinstance(scaler, DynamicLossScaler) else None

    def publish(self) -> None:
        """Copy every master into the parameters that the model computes with, on all ranks (collective)."""
        self._optimizer.update_lp_params()

    def _look_at_gradients_once(self) -> None:
        """Norms of gradients by `row_norms`, where DeepSpeed copies every gradient to fp64."""
        whole = self._optimizer.get_grad_norm_direct

        def by_rows(gradients: Iterable[Tensor], *arguments: object, **keywords: object) -> Tensor:
            rows = [g if getattr(g, "_zero_padding", False) else row_norms(g) for g in gradients]
            norm: Tensor = whole(rows, *arguments, **keywords)
            return norm

        self._optimizer.get_grad_norm_direct = by_rows
        if not self._optimizer.has_moe_layers and self._optimizer.model_parallel_world_size == 1:
            # The norm is of every gradient here, and one that is not finite skips the update, too: no second look.
            self._optimizer.check_overflow = lambda *_, **__: None

    def _leave_gradients_where_they_are(self) -> None:
        """With one data-parallel rank there is nothing to reduce: no copies into buckets and back, no division by 1."""
        self._optimizer.contiguous_gradients = False
        self._optimizer.buffered_reduce_fallback = lambda *_, **__: None

    def _create_adam_state(self) -> None:
        # torch creates it at the first step; a checkpoint or a switch may come before that.
        for group, flat in zip(self.groups, self._flat, strict=True):
            state = self._optimizer.optimizer.state[flat]
            if not state:
                device = flat.device if group.get("fused") or group.get("capturable") else "cpu"
                state["step"] = torch.zeros((), dtype=torch.float32, device=device)
                state[EXP_AVG] = torch.zeros_like(flat.data)
                state[EXP_AVG_SQ] = torch.zeros_like(flat.data)

    def _check_layout(self) -> None:
        if self._optimizer.nccl_start_alignment_factor != ALIGNMENT:
            raise RuntimeError(f"DeepSpeed aligns its flat groups to {self._optimizer.nccl_start_alignment_factor}")
        for group, parameters in enumerate(self._optimizer.bit16_groups):
            for parameter in parameters:
                mapping = parameter._hp_mapping
                if mapping is None:
                    continue
                if mapping.param_group_index != group or mapping.hp_fragment.numel() != mapping.lp_fragment.numel():
                    raise RuntimeError("DeepSpeed's fragment map does not name the group and size of a parameter")
                master = self.fragment(parameter, MASTER).values
                if master.data_ptr() != mapping.hp_fragment.data_ptr():
                    raise RuntimeError("DeepSpeed's fp32 fragments are not views of its flat partition any more")
