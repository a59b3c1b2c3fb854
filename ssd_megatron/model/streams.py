"""What runs through a model's blocks, and how one pipeline stage hands it to the next.

Shapes: s sequence, b batch, h hidden; t sequence of a decoder beside an encoder; B buckets of distances, N heads.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssd_megatron.config.model import ModelConfig
from ssd_megatron.model.blocks import TransformerBlock
from ssd_megatron.model.cost import position_rows
from ssd_megatron.model.embedding import Embedding
from ssd_megatron.model.relative_positions import position_bias
from ssd_megatron.parallel.topology import Topology


class Streams(Protocol):
    """A family's way through one stage.

    Between stages there is one tensor [rows, b, h]: DeepSpeed's pipeline splits one tensor over tensor-parallel ranks,
    and takes no gradient of others.
    """

    def run(self, embedding: Embedding | None, blocks: Iterable[nn.Module], inputs: tuple[Tensor, ...]) -> Tensor:
        """Hidden states after this stage: for the next one, or on the last stage what the head takes [s, b, h].

        Args:
            embedding: the first stage's.
            inputs: on the first stage the batch's fields, on others what the stage before gave.
        """
        ...

    def rows(self, batch: Mapping[str, Tensor]) -> int:
        """Rows of the tensor between stages."""
        ...


class OneStream:
    """One sequence through all blocks."""

    def run(self, embedding: Embedding | None, blocks: Iterable[nn.Module], inputs: tuple[Tensor, ...]) -> Tensor:
        x_sbh: Tensor = inputs[0] if embedding is None else embedding(*inputs)
        token_ids_bs = None if embedding is None else inputs[0]
        for block in blocks:
            x_sbh = block(x_sbh, token_ids_bs=token_ids_bs)
        return x_sbh

    def rows(self, batch: Mapping[str, Tensor]) -> int:
        return batch["tokens"].shape[1]


class _State(NamedTuple):
    """What T5's stages share: both sequences, and the tables of attention biases by distance, which all layers use and
    the first stage has as parameters."""

    encoder_sbh: Tensor
    decoder_tbh: Tensor
    encoder_bias_BN: Tensor
    decoder_bias_BN: Tensor


class EncoderDecoder:
    """T5: one sequence through the encoder's blocks; then the other, which looks at it, through the decoder's.

    Between stages both sequences travel as rows of one tensor, and after them, in the first sample's place, the tables
    of biases: so their gradients come back to the first stage by themselves.
    """

    def __init__(self, model: ModelConfig, topology: Topology) -> None:
        self._model = model
        self._topology = topology
        self._table = (model.relative_attention_num_buckets, model.num_attention_heads)
        self._table_rows = position_rows(model)

    def run(self, embedding: Embedding | None, blocks: Iterable[nn.Module], inputs: tuple[Tensor, ...]) -> Tensor:
        state = self._unpack(inputs[0]) if embedding is None else self._embed(embedding, *inputs)
        tokens_bs, decoder_tokens_bt = (None, None) if embedding is None else inputs
        x_sbh, y_tbh = state.encoder_sbh, state.decoder_tbh
        biases: dict[bool, Tensor] = {}
        for block in blocks:
            assert isinstance(block, TransformerBlock)
            is_decoder = block.looks_at_context
            if is_decoder not in biases:
                table = state.decoder_bias_BN if is_decoder else state.encoder_bias_BN
                length = len(y_tbh if is_decoder else x_sbh)
                biases[is_decoder] = position_bias(table, length, self._model, self._topology, causal=is_decoder)
            if is_decoder:
                y_tbh = block(y_tbh, biases[True], x_sbh, decoder_tokens_bt)
            else:
                x_sbh = block(x_sbh, biases[False], None, tokens_bs)
        return (
            y_tbh if self._topology.is_last_stage else self._pack(state._replace(encoder_sbh=x_sbh, decoder_tbh=y_tbh))
        )

    def rows(self, batch: Mapping[str, Tensor]) -> int:
        return batch["tokens"].shape[1] + batch["decoder_tokens"].shape[1] + self._table_rows

    def _embed(self, embedding: Embedding, tokens_bs: Tensor, decoder_tokens_bt: Tensor) -> _State:
        tables = cast(nn.ParameterDict, embedding.position_bias)
        return _State(embedding(tokens_bs), embedding(decoder_tokens_bt), tables["encoder"], tables["decoder"])

    def _pack(self, state: _State) -> Tensor:
        samples, h = state.encoder_sbh.shape[1:]
        tables = torch.cat([state.encoder_bias_BN.flatten(), state.decoder_bias_BN.flatten()])
        row = F.pad(tables, (0, self._table_rows * h - len(tables))).view(-1, 1, h)
        return torch.cat([state.encoder_sbh, state.decoder_tbh, row.expand(-1, samples, -1)])

    def _unpack(self, packed: Tensor) -> _State:
        s, t = self._model.seq_length, self._model.decoder_seq_length
        encoder_sbh, decoder_tbh, rows = torch.split(packed, [s, t, self._table_rows])
        size = self._table[0] * self._table[1]
        flat = rows[:, :1].sum(1).flatten()  # the first sample's; 0 where there is none
        return _State(encoder_sbh, decoder_tbh, flat[:size].view(self._table), flat[size : 2 * size].view(self._table))


def make_streams(model: ModelConfig, topology: Topology) -> Streams:
    return EncoderDecoder(model, topology) if model.family == "t5" else OneStream()
