"""Token and position embeddings. Shapes: b batch, s sequence, h hidden."""

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import VocabParallelEmbedding
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from ssd_megatron.config.model import ModelConfig
from ssd_megatron.model.norms import make_norm
from ssd_megatron.parallel.sharding import shard_rows
from ssd_megatron.parallel.topology import Topology


class Embedding(nn.Module):
    """Vocabulary-parallel token embedding, plus learned positions and kinds of tokens where the model has them, and
    normalised where the blocks normalise after their networks.

    Attributes:
        position_bias: biases of attention by bucket of distance and head, of encoder and decoder, where the model has
            them; the blocks use them.
    """

    def __init__(self, config: TransformerConfig, model: ModelConfig, topology: Topology) -> None:
        super().__init__()
        self.word = VocabParallelEmbedding(
            model.padded_vocab_size, model.hidden_size, init_method=torch.nn.init.normal_, config=config
        )
        shard_rows(self.word.weight, topology.tensor.rank, topology.tensor.size)
        self.position = None
        if model.position_embedding == "learned":
            self.position = nn.Embedding(model.seq_length, model.hidden_size)
        self.token_type = None
        if model.num_token_types:
            self.token_type = nn.Embedding(model.num_token_types, model.hidden_size)
        self.position_bias = None
        if model.position_embedding == "relative":
            table = (model.relative_attention_num_buckets, model.num_attention_heads)
            tables = {name: nn.Parameter(torch.empty(table)) for name in ("encoder", "decoder")}
            self.position_bias = nn.ParameterDict(tables)
        self.norm = make_norm(model) if model.norm_position == "post" else None
        self.dropout = model.dropout

    def forward(
        self, tokens_bs: Tensor, position_ids_bs: Tensor | None = None, token_types_bs: Tensor | None = None
    ) -> Tensor:
        """Hidden states [s, b, h], the layout of megatron-core's blocks."""
        x_bsh = self.word(tokens_bs)
        if self.position is not None:
            x_bsh = x_bsh + self.position(position_ids_bs)
        if self.token_type is not None:
            x_bsh = x_bsh + self.token_type(token_types_bs)
        if self.norm is not None:
            x_bsh = self.norm(x_bsh)
        return F.dropout(x_bsh.transpose(0, 1).contiguous(), self.dropout, self.training)
