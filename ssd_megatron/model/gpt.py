"""GPT: a decoder-only Transformer as one list of layers (embedding, blocks, head), or one pipeline stage of it."""

from torch import Tensor, nn

from ssd_megatron.config.schema import SsdMegatronConfig
from ssd_megatron.ffn.switchable import SwitchableFFN
from ssd_megatron.model.blocks import TransformerBlock, ffn_settings, transformer_config
from ssd_megatron.model.embedding import Embedding
from ssd_megatron.model.heads import LanguageModelHead
from ssd_megatron.model.init import initialize_parameters
from ssd_megatron.parallel.topology import Topology


class GPT(nn.Module):
    """The layers of one pipeline stage. Parameter names are the logical state's names.

    Stage p of P has blocks [p * L/P, (p + 1) * L/P) of L; the first also the embedding, the last also the head. With
    tied embeddings and several stages, first and last hold a copy of the word embedding each (`tied_copy` is the last
    stage's).

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
        blocks = stage_blocks(model.num_layers, topology)
        self.blocks = nn.ModuleDict(
            {str(i): TransformerBlock(mcore, model, ffn, i, recompute, gather_once, topology, compiled) for i in blocks}
        )
        word_embedding = None if self.embedding is None else self.embedding.word.weight
        chunk = config.training.loss_chunk_tokens
        self.head = LanguageModelHead(model, word_embedding, topology, chunk) if topology.is_last_stage else None
        self.hidden_size = model.hidden_size
        self._tied = model.tie_embeddings
        parameters = self.logical_parameters()
        initialize_parameters(parameters, seed=config.seed, std=model.init_std, num_layers=model.num_layers)

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

    def logits(self, tokens_bs: Tensor, position_ids_bs: Tensor) -> Tensor:
        """Logits [s, b, v] of token ids [b, s]; of a model on one stage."""
        return self._head().logits(self.run_stage((tokens_bs, position_ids_bs)))

    def forward(self, tokens_bs: Tensor, position_ids_bs: Tensor, labels_bs: Tensor) -> Tensor:
        """Loss of each token [b, s], fp32; of a model on one stage."""
        return self.token_losses(self.run_stage((tokens_bs, position_ids_bs)), labels_bs)

    def run_stage(self, inputs: Tensor | tuple[Tensor, Tensor]) -> Tensor:
        """This stage's layers.

        Args:
            inputs: on the first stage token and position ids [b, s], on others hidden states [s, b, h].
        Returns:
            hidden states [s, b, h]; on the last stage those that `token_losses` takes.
        """
        if self.embedding is not None:
            assert isinstance(inputs, tuple)
            x_sbh: Tensor = self.embedding(*inputs)
        else:
            assert isinstance(inputs, Tensor)
            x_sbh = inputs
        for block in self.blocks.values():
            x_sbh = block(x_sbh)
        return x_sbh if self.head is None else self.head(x_sbh)

    def token_losses(self, outputs_sbh: Tensor, labels_bs: Tensor) -> Tensor:
        """Loss of each token [b, s], fp32, from what the last stage gives; on the last stage."""
        return self._head().token_losses(outputs_sbh, labels_bs)

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
