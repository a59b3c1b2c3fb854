"""A language model of any family as one list of layers (embedding, blocks, head), or one pipeline stage of it."""

from collections.abc import Mapping

from torch import Tensor, nn

from ssd_megatron.config.schema import SsdMegatronConfig
from ssd_megatron.ffn.switchable import SwitchableFFN
from ssd_megatron.model.blocks import TransformerBlock, ffn_settings, transformer_config
from ssd_megatron.model.embedding import Embedding
from ssd_megatron.model.families import batch_fields
from ssd_megatron.model.heads import LanguageModelHead, Outputs
from ssd_megatron.model.init import initialize_parameters
from ssd_megatron.model.streams import make_streams
from ssd_megatron.parallel.topology import Topology


class LanguageModel(nn.Module):
    """The layers of one pipeline stage. Parameter names are the logical state's names.

    Stage p of P has blocks [p * L/P, (p + 1) * L/P) of L; the first also the embedding, the last also the head. With
    tied embeddings and several stages, first and last hold a copy of the word embedding each (`tied_copy` is the last
    stage's).

    Attributes:
        fields: what it reads from a batch.

    Args:
        backend: kernels of sparse mode, as `ffn.kernels.choose_backend` resolved it.
    """

    def __init__(self, config: SsdMegatronConfig, backend: str, topology: Topology) -> None:
        super().__init__()
        model = config.model
        mcore = transformer_config(model, topology)
        ffn = ffn_settings(model, config.ssd, backend)
        recompute = config.training.recompute == "full"
        gather_once = config.parallel.dense_gather == "step"
        compiled = config.training.compile == "blocks"
        self.embedding = Embedding(mcore, model, topology) if topology.is_first_stage else None
        blocks = stage_blocks(model.total_layers, topology)
        self.blocks = nn.ModuleDict(
            {str(i): TransformerBlock(mcore, model, ffn, i, recompute, gather_once, topology, compiled) for i in blocks}
        )
        word_embedding = None if self.embedding is None else self.embedding.word.weight
        chunk = config.training.loss_chunk_tokens
        self.head = LanguageModelHead(model, word_embedding, topology, chunk) if topology.is_last_stage else None
        self.fields = batch_fields(model)
        self._streams = make_streams(model, topology)
        self._hidden_size = model.hidden_size
        self._tied = model.tie_embeddings
        parameters = self.logical_parameters()
        initialize_parameters(parameters, seed=config.seed, std=model.init_std, num_layers=model.total_layers)

    @property
    def ffns(self) -> dict[str, SwitchableFFN]:
        """This stage's feed-forward networks by the name of their module, first layer first."""
        return {name: module for name, module in self.named_modules() if isinstance(module, SwitchableFFN)}

    @property
    def tied_weight(self) -> nn.Parameter | None:
        """This stage's copy of a word embedding that first and last stage share; None if there is only one copy."""
        if not self._tied or (self.embedding is None) == (self.head is None):
            return None
        return self.embedding.word.weight if self.embedding is not None else self._head().weight

    def logical_parameters(self) -> dict[str, nn.Parameter]:
        """This stage's parameters by their names in the whole model."""
        parameters = dict(self.named_parameters())
        if self._tied and "head.weight" in parameters:
            parameters[WORD_EMBEDDING] = parameters.pop("head.weight")
        return parameters

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Losses of a batch (see `losses`); of a model on one stage."""
        return self.losses(self.run_stage(tuple(batch[name] for name in self.fields.inputs)), batch)

    def logits(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """Logits [s, b, v] of the batch's `fields.inputs`; of a model on one stage."""
        outputs = self.run_stage(inputs)
        return self._head().logits(outputs if isinstance(outputs, Tensor) else outputs[0])

    def hidden_states(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """What the last block gives for the batch's `fields.inputs`, [s, b, h], after the final norm where norms come
        before the networks; of a model on one stage."""
        x_sbh = self._streams.run(self.embedding, self.blocks.values(), inputs)
        norm = self._head().norm
        return x_sbh if norm is None else norm(x_sbh)

    def run_stage(self, inputs: Tensor | tuple[Tensor, ...]) -> Outputs:
        """This stage's layers.

        Args:
            inputs: on the first stage the batch's `fields.inputs`, on others what the stage before gave.
        Returns:
            hidden states [rows, b, h] for the next stage, on the last one what `losses` takes.
        """
        inputs = inputs if isinstance(inputs, tuple) else (inputs,)
        x_sbh = self._streams.run(self.embedding, self.blocks.values(), inputs)
        if self.head is None:
            return x_sbh
        outputs: Outputs = self.head(x_sbh)
        return outputs

    def losses(self, outputs: Outputs, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Losses in fp32 by the mask that says which of them count (`fields.masks`), of its shape; on the last stage.

        Args:
            batch: at least `fields.targets`.
        """
        return self._head().losses(outputs, batch)

    def hidden_shape(self, batch: Mapping[str, Tensor]) -> tuple[int, int, int]:
        """Shape of the hidden states that one stage gives to the next."""
        return self._streams.rows(batch), len(batch["tokens"]), self._hidden_size

    def _head(self) -> LanguageModelHead:
        assert self.head is not None, "only the last stage has the head"
        return self.head


WORD_EMBEDDING = "embedding.word.weight"


def stage_blocks(num_layers: int, topology: Topology) -> range:
    """Blocks of this stage, numbered in the whole model."""
    per_stage = num_layers // topology.pipeline.size
    return range(per_stage * topology.pipeline.rank, per_stage * (topology.pipeline.rank + 1))


def ffn_names(num_layers: int) -> list[str]:
    """Names of the feed-forward networks of all stages, first layer first."""
    return [f"blocks.{index}.layer.mlp" for index in range(num_layers)]
