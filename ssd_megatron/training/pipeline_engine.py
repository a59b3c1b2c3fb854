"""The model under DeepSpeed's PipelineEngine: every process holds one stage of layers (ZeRO 1)."""

import contextlib
import io
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.pipe import LayerSpec, PipelineModule
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import Tensor, nn

from ssd_megatron.config.load import RunConfig
from ssd_megatron.model.heads import Outputs
from ssd_megatron.model.language_model import LanguageModel
from ssd_megatron.parallel.collectives import named
from ssd_megatron.parallel.topology import Topology
from ssd_megatron.training.engine import Batch, Engine, StepResult


class PipelineParallelEngine(Engine):
    """One stage of the model under PipelineEngine, microbatches in the order one forward, one backward (1F1B)."""

    def __init__(self, model: LanguageModel, config: RunConfig, topology: Topology) -> None:
        super().__init__(model, config, topology)
        with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints its partition
            self._start(_Pipeline(model, topology), config, mpu=None)

    def _step(self, microbatches: Sequence[Batch]) -> StepResult:
        self._share_tied_weight()
        valid, fields = self._valid(microbatches), self._model.fields
        lr, could_rescale = self._learning_rate(), self.zero.can_lower_loss_scale
        scales = torch.tensor(self._loss_scales(valid), device=self._topology.device)
        batches = (
            (
                tuple(batch[name] for name in fields.inputs),
                (scales, *(batch[name] for name in fields.targets + fields.masks)),
            )
            for batch in microbatches
        )
        return self._result(float(self.deepspeed.train_batch(batches)), lr, could_rescale)

    def _losses(self, batches: Sequence[Batch]) -> Iterator[tuple[Batch, dict[str, Tensor]]]:
        """Each stage takes one batch after the other from the stage before: the stages work at the same time."""
        self._share_tied_weight()
        pipeline, model = self._topology.pipeline, self._model
        for batch in batches:
            inputs: Tensor | tuple[Tensor, ...] = tuple(batch[name] for name in model.fields.inputs)
            if not self._topology.is_first_stage:
                inputs = torch.empty(model.hidden_shape(batch), dtype=self._dtype, device=self._topology.device)
                with named("receiving activations"):
                    dist.recv(inputs, pipeline.ranks[pipeline.rank - 1], group=pipeline.handle)
            outputs = model.run_stage(inputs)
            if self._topology.is_last_stage:
                yield batch, model.losses(outputs, batch)
            else:
                assert isinstance(outputs, Tensor)
                with named("sending activations"):
                    dist.send(outputs.contiguous(), pipeline.ranks[pipeline.rank + 1], group=pipeline.handle)

    def _share_tied_weight(self) -> None:
        """Give the last stage the first's copy of a tied embedding. Both get the same gradients, but add them up over
        data-parallel ranks in another order, so that the copies would drift apart, in bf16 by percents."""
        weight, ends = self._model.tied_weight, self._topology.embedding
        if weight is not None and ends is not None:
            with named("sharing the tied embedding"):
                dist.broadcast(weight.detach(), ends.ranks[0], group=ends.handle)


class _Stage(nn.Module):
    def __init__(self, model: LanguageModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor | tuple[Tensor, ...]) -> Outputs:
        return self.model.run_stage(inputs)


class _Pipeline(PipelineModule):  # type: ignore[misc]
    """DeepSpeed's pipeline with one layer per stage: a stage of ours, with the tied embedding held together by us."""

    def __init__(self, model: LanguageModel, topology: Topology) -> None:
        sizes = {"num_pp": topology.pipeline.size, "num_mp": topology.tensor.size, "num_dp": topology.data.size}
        layers: list[Any] = [LayerSpec(nn.Identity) for _ in range(topology.pipeline.size)]
        layers[topology.pipeline.rank] = _Stage(model)
        super().__init__(
            layers=layers,
            topology=PipeModelDataParallelTopology(**sizes),
            loss_fn=lambda outputs, labels: _scaled_loss(model, outputs, *labels),
            partition_method="uniform",
        )
        self._tied: list[tuple[nn.Parameter, dist.ProcessGroup]] = []
        if model.tied_weight is not None:
            assert topology.embedding is not None
            self._tied = [(model.tied_weight, topology.embedding.handle)]
            # Of two copies, one counts in the gradient norm.
            vars(model.tied_weight).update(ds_pipe_replicated=topology.is_last_stage)

    def get_tied_weights_and_groups(self) -> list[tuple[nn.Parameter, dist.ProcessGroup]]:
        """Whose gradients the engine adds up over which ranks before it reduces gradients."""
        return self._tied


def _scaled_loss(model: LanguageModel, outputs: Outputs, scales: Tensor, *targets_and_masks: Tensor) -> Tensor:
    fields = model.fields
    batch = dict(zip(fields.targets + fields.masks, targets_and_masks, strict=True))
    losses = model.losses(outputs, batch)
    sums = torch.stack([(losses[mask] * batch[mask]).sum() for mask in fields.masks])
    return (sums * scales).sum()
