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
from ssd_megatron.model.gpt import GPT
from ssd_megatron.parallel.collectives import named
from ssd_megatron.parallel.topology import Topology
from ssd_megatron.training.engine import Batch, Engine, StepResult


class PipelineParallelEngine(Engine):
    """One stage of the model under PipelineEngine, microbatches in the order one forward, one backward (1F1B)."""

    def __init__(self, model: GPT, config: RunConfig, topology: Topology) -> None:
        super().__init__(model, config, topology)
        with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints its partition
            self._start(_Pipeline(model, topology), config, mpu=None)

    def _step(self, microbatches: Sequence[Batch]) -> StepResult:
        self._share_tied_weight()
        valid = self._valid_tokens(microbatches)
        lr, could_rescale = self._learning_rate(), self.zero.can_lower_loss_scale
        scale = torch.tensor(self._loss_scale(valid), device=self._topology.device)
        batches = (
            ((batch["tokens"], batch["position_ids"]), (batch["labels"], batch["loss_mask"], scale))
            for batch in microbatches
        )
        return self._result(float(self.deepspeed.train_batch(batches)), lr, could_rescale)

    def _losses(self, batches: Sequence[Batch]) -> Iterator[tuple[Batch, Tensor]]:
        """Each stage takes one batch after the other from the stage before: the stages work at the same time."""
        self._share_tied_weight()
        pipeline = self._topology.pipeline
        for batch in batches:
            tokens_bs = batch["tokens"]
            inputs: Tensor | tuple[Tensor, Tensor] = (tokens_bs, batch["position_ids"])
            if not self._topology.is_first_stage:
                shape = (*reversed(tokens_bs.shape), self._model.hidden_size)
                inputs = torch.empty(shape, dtype=self._dtype, device=self._topology.device)
                with named("receiving activations"):
                    dist.recv(inputs, pipeline.ranks[pipeline.rank - 1], group=pipeline.handle)
            outputs = self._model.run_stage(inputs)
            if self._topology.is_last_stage:
                yield batch, self._model.token_losses(outputs, batch["labels"])
            else:
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
    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        return self.model.run_stage(inputs)


class _Pipeline(PipelineModule):  # type: ignore[misc]
    """DeepSpeed's pipeline with one layer per stage: a stage of ours, with the tied embedding held together by us."""

    def __init__(self, model: GPT, topology: Topology) -> None:
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


def _scaled_loss(model: GPT, outputs_sbh: Tensor, labels_bs: Tensor, mask_bs: Tensor, scale: Tensor) -> Tensor:
    return (model.token_losses(outputs_sbh, labels_bs) * mask_bs).sum() * scale
