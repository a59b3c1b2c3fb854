"""Trained models on one device, for use: the parts that all families have, and the decoder (GPT).

Shapes: b batch, s new tokens, v vocabulary.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from ssd_megatron.config.schema import ModelConfig
from ssd_megatron.ffn.router_kinds import KINDS
from ssd_megatron.inference.cache import KeyValueCache, View, view_of
from ssd_megatron.inference.ffn import Experts, FeedForward, Mode
from ssd_megatron.inference.layers import Block, Embedding, Head, PostNormBlock, rotary


class Model(nn.Module):
    """Embedding, blocks and head; values are left uninitialised.

    Attributes:
        config: shape of the model.
        ffns: its feed-forward networks, first layer first.
    """

    def __init__(
        self, config: ModelConfig, experts: Experts | None, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.config, self.dtype, self.device = config, dtype, device
        self._routers_read = None if experts is None else KINDS[experts.router].reads
        self.embedding = Embedding(config, dtype=dtype, device=device)
        kind = Block if config.norm_position == "pre" else PostNormBlock
        self.blocks = nn.ModuleList(
            kind(config, experts, index, dtype=dtype, device=device) for index in range(config.total_layers)
        )
        self.head = Head(config, self.embedding.word.weight, dtype=dtype, device=device)
        self.requires_grad_(False)
        self.eval()

    @property
    def ffns(self) -> list[FeedForward]:
        return [ffn for block in self.blocks if isinstance(ffn := block.mlp, FeedForward)]

    def set_mode(self, mode: Mode) -> None:
        for ffn in self.ffns:
            ffn.mode = mode

    def logical_parameters(self) -> dict[str, Tensor]:
        """Where the logical tensors of a checkpoint go, by their names."""
        return dict(map(_logical, self.named_parameters()))

    def rotated(self, view: View) -> View:
        """The same with the rotation of rotary positions, where the model has these."""
        config = self.config
        if config.position_embedding != "rope":
            return view
        return replace(view, rotation=rotary(view.positions_bs, config.head_dim, config.rotary_base, self.dtype))

    def router_keys(self, tokens_bs: Tensor, positions_bs: Tensor) -> Tensor | None:
        """What routers go by that do not look at inputs, [b * s]."""
        if self._routers_read == "token_ids":
            return tokens_bs.flatten()
        return positions_bs.expand_as(tokens_bs).flatten() if self._routers_read == "positions" else None


class CausalModel(Model):
    """Decoder-only Transformer."""

    def new_cache(self, batch: int, capacity: int, padding_b: Tensor | None = None) -> KeyValueCache:
        """Room for the keys and values of `capacity` tokens of each of `batch` texts."""
        config = self.config
        shape = (batch, config.num_query_groups, config.head_dim)
        return KeyValueCache(config.num_layers, shape, capacity, padding_b, dtype=self.dtype, device=self.device)

    @torch.inference_mode()
    def forward(self, tokens_bs: Tensor, cache: KeyValueCache | None = None, *, last_only: bool = False) -> Tensor:
        """Logits of the next token after each of the new tokens, fp32 [b, s, v], or after the last ones, [b, 1, v].

        Args:
            tokens_bs: int64, the tokens that follow those in `cache`, which takes them in; all tokens without it.
        """
        past, padding_b = (0, None) if cache is None else (cache.length, cache.padding_b)
        view = self.rotated(view_of(tokens_bs.size(1), past, padding_b, self.device))
        keys_T = self.router_keys(tokens_bs, view.positions_bs)
        x_bsh = self.embedding(tokens_bs, view.positions_bs)
        for block in self.blocks:
            x_bsh = block(x_bsh, view, cache, keys_T)
        if cache is not None:
            cache.advance(tokens_bs.size(1))
        logits_bsv: Tensor = self.head(x_bsh[:, -1:] if last_only else x_bsh)
        return logits_bsv


def _logical(item: tuple[str, nn.Parameter]) -> tuple[str, Tensor]:
    name, parameter = item
    if name.startswith("blocks."):
        blocks, number, rest = name.split(".", 2)
        name = f"{blocks}.{number}.layer.{rest}"
    # Checkpoints have a row for each input, as everything that is sharded.
    is_transposed = name.endswith("_attention.linear_proj.weight")
    return name, parameter.t() if is_transposed else parameter
