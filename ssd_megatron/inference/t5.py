"""Encoder and decoder (T5) in use: the encoder runs once for a batch of texts, the decoder token by token.

Shapes: b batch, s tokens of the encoder, t new tokens of the decoder, v vocabulary, n heads.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ssd_megatron.config.model import ModelConfig
from ssd_megatron.inference.cache import Cache, KeyValueCache, View, whole_view
from ssd_megatron.inference.ffn import Experts, Mode
from ssd_megatron.inference.layers import Context, CrossAttention
from ssd_megatron.inference.model import Model
from ssd_megatron.inference.place import Place
from ssd_megatron.inference.steps import Replays
from ssd_megatron.model.norms import make_norm
from ssd_megatron.model.relative_positions import bias_between


class EncoderDecoder(Model):
    """T5."""

    def __init__(self, config: ModelConfig, experts: Experts | None, place: Place) -> None:
        super().__init__(config, experts, place)
        self.final_norm = make_norm(config).to(place.device, place.dtype).requires_grad_(False)

    def logical_parameters(self) -> dict[str, Tensor]:
        found = super().logical_parameters()
        found[f"blocks.{self.config.num_layers - 1}.final_norm.weight"] = found.pop("final_norm.weight")
        return found

    @torch.inference_mode()
    def encode(self, tokens_bs: Tensor, padding_b: Tensor | None = None) -> "Decoder":
        """The decoder for some texts.

        Args:
            tokens_bs: int64, with the end of document.
            padding_b: so many slots at the beginning of each text hold no token; None if all are equally long.
        """
        view = whole_view(tokens_bs.size(1), padding_b, self.device)
        slots_s, texts = torch.arange(tokens_bs.size(1), device=self.device), view.mask
        bias = self._bias("encoder", slots_s, slots_s)
        view = replace(view, mask=bias if texts is None else bias.masked_fill(~texts, float("-inf")))
        keys_T = self.router_keys(tokens_bs, view.positions_bs)
        x_bsh = self.embedding(tokens_bs, view.positions_bs)
        for block in self.blocks[: self.config.num_layers]:
            x_bsh = block(x_bsh, view, None, keys_T)
        x_bsh = self.final_norm(x_bsh)
        attentions = [module for module in self.modules() if isinstance(module, CrossAttention)]
        return Decoder(self, [attention.context(x_bsh, texts) for attention in attentions])

    def forward(self, tokens_bs: Tensor, decoder_tokens_bt: Tensor) -> Tensor:
        """Logits after each token of the decoder, fp32 [b, t, v]."""
        logits_btv: Tensor = self.encode(tokens_bs)(decoder_tokens_bt)
        return logits_btv

    def decode(self, tokens_bt: Tensor, contexts: Sequence[Context], cache: Cache | None, last_only: bool) -> Tensor:
        """See `Decoder`."""
        new = tokens_bt.size(1)
        slots_t, slots_S = 2 * (torch.arange(new, device=self.device),) if cache is None else cache.slots(new)
        positions_bt = slots_t[None]
        view = View(positions_bt, self._bias("decoder", slots_t, slots_S), causal=False)
        keys_T = self.router_keys(tokens_bt, positions_bt)
        x_bth = self.embedding(tokens_bt, positions_bt)
        for block, context in zip(self.blocks[self.config.num_layers :], contexts, strict=True):
            x_bth = block(x_bth, view, cache, keys_T, context)
        if cache is not None:
            cache.advance(new)
        logits_btv: Tensor = self.head(x_bth[:, -1:] if last_only else x_bth)
        return logits_btv

    def _bias(self, part: str, queries_s: Tensor, keys_S: Tensor) -> Tensor:
        assert self.embedding.position_bias is not None
        table_BN = self.embedding.position_bias[part]
        heads = self.place.part(table_BN.shape[1])
        table_BN = table_BN.narrow(1, self.place.rank * heads, heads)
        return bias_between(table_BN, queries_s, keys_S, self.config, causal=part == "decoder")


class Decoder:
    """The decoder beside what the encoder made of some texts; it generates as a decoder-only model does.

    Attributes:
        config, device, modes: the model's.
        kept: of earlier answers to these texts on a GPU, for the next ones.
    """

    kept: Replays | None = None

    def __init__(self, model: EncoderDecoder, contexts: Sequence[Context]) -> None:
        self.config, self.device = model.config, model.device
        self._model, self._contexts = model, contexts

    @property
    def modes(self) -> tuple[tuple[Mode, int], ...]:
        return self._model.modes

    def can_replay(self, tokens: int) -> bool:
        """See `Model`."""
        return self._model.can_replay(tokens)

    def new_cache(self, batch: int, capacity: int, padding_b: Tensor | None = None) -> KeyValueCache:
        """Room for `capacity` tokens of the decoder, whose texts all begin in the first slot."""
        assert padding_b is None
        config, place = self.config, self._model.place
        shape = (batch, place.part(config.num_attention_heads), config.head_dim)
        return KeyValueCache(config.num_decoder_layers, shape, capacity, None, dtype=place.dtype, device=place.device)

    @torch.inference_mode()
    def __call__(self, tokens_bt: Tensor, cache: Cache | None = None, *, last_only: bool = False) -> Tensor:
        """Logits as `CausalModel` gives them."""
        return self._model.decode(tokens_bt, self._contexts, cache, last_only)
