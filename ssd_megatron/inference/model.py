"""Trained models, for use: the parts that all families have, and the decoder (GPT).

Shapes: b batch, s new tokens, v vocabulary.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from ssd_megatron.config.model import ModelConfig
from ssd_megatron.ffn.router_kinds import KINDS
from ssd_megatron.inference.cache import Cache, KeyValueCache, View, view_of
from ssd_megatron.inference.ffn import Experts, FeedForward, Mode
from ssd_megatron.inference.layers import Block, Embedding, Head, PostNormBlock, rotary
from ssd_megatron.inference.place import Place
from ssd_megatron.inference.steps import Replays
from ssd_megatron.parallel.sharding import shard_rows


class Model(nn.Module):
    """Embedding, blocks and head; values are left uninitialised.

    Attributes:
        config: shape of the model.
        place: where it is, and how much of it.
        ffns: its feed-forward networks, first layer first.
        graphs: on a GPU, single tokens are replayed from a CUDA graph where they can be; False: never.
    """

    def __init__(self, config: ModelConfig, experts: Experts | None, place: Place) -> None:
        super().__init__()
        self.config, self.place, self.graphs = config, place, True
        self._routers_read = None if experts is None else KINDS[experts.router].reads
        self.embedding = Embedding(config, place)
        kind = Block if config.norm_position == "pre" else PostNormBlock
        self.blocks = nn.ModuleList(kind(config, experts, index, place) for index in range(config.total_layers))
        self.head = Head(config, self.embedding.word.weight, place)
        self.requires_grad_(False)
        self.eval()

    @property
    def ffns(self) -> list[FeedForward]:
        return [ffn for block in self.blocks if isinstance(ffn := block.mlp, FeedForward)]

    @property
    def device(self) -> torch.device:
        return self.place.device

    def set_mode(self, mode: Mode) -> None:
        for ffn in self.ffns:
            ffn.mode = mode

    @property
    def modes(self) -> tuple[tuple[Mode, int], ...]:
        """Mode and experts per token of each network."""
        return tuple((ffn.mode, ffn.top_k) for ffn in self.ffns)

    def can_replay(self, tokens: int) -> bool:
        """Whether passes of so many tokens may be captured in a CUDA graph: on one GPU, with kernels that are launched
        alike for all tokens (`FeedForward.launches_alike`)."""
        alone_on_gpu = self.device.type == "cuda" and self.place.group is None
        return self.graphs and alone_on_gpu and all(ffn.launches_alike(tokens) for ffn in self.ffns)

    def logical_parameters(self) -> dict[str, Tensor]:
        """Where the logical tensors of a checkpoint go, by their names; `row_shard` says which rows of them."""
        return dict(self._logical(*item) for item in self.named_parameters())

    def _logical(self, name: str, parameter: nn.Parameter) -> tuple[str, Tensor]:
        if name.startswith("blocks."):
            blocks, number, rest = name.split(".", 2)
            name = f"{blocks}.{number}.layer.{rest}"
        if not name.endswith("_attention.linear_proj.weight"):
            return name, parameter
        # Checkpoints have a row for each input, as everything that is sharded.
        rows = parameter.t()
        shard_rows(rows, self.place.rank, self.place.ranks)
        return name, rows

    def rotated(self, view: View) -> View:
        """The same with the rotation of rotary positions, where the model has these."""
        config = self.config
        if config.position_embedding != "rope":
            return view
        return replace(view, rotation=rotary(view.positions_bs, config.head_dim, config.rotary_base, self.place.dtype))

    def router_keys(self, tokens_bs: Tensor, positions_bs: Tensor) -> Tensor | None:
        """What routers go by that do not look at inputs, [b * s]."""
        if self._routers_read == "token_ids":
            return tokens_bs.flatten()
        return positions_bs.expand_as(tokens_bs).flatten() if self._routers_read == "positions" else None


class CausalModel(Model):
    """Decoder-only Transformer.

    Attributes:
        kept: of earlier texts on a GPU, for the next ones.
    """

    kept: Replays | None = None

    def new_cache(self, batch: int, capacity: int, padding_b: Tensor | None = None) -> KeyValueCache:
        """Room for the keys and values of `capacity` tokens of each of `batch` texts."""
        config, place = self.config, self.place
        shape = (batch, place.part(config.num_query_groups), config.head_dim)
        return KeyValueCache(config.num_layers, shape, capacity, padding_b, dtype=place.dtype, device=place.device)

    @torch.inference_mode()
    def forward(self, tokens_bs: Tensor, cache: Cache | None = None, *, last_only: bool = False) -> Tensor:
        """Logits of the next token after each of the new tokens, fp32 [b, s, v], or after the last ones, [b, 1, v].

        Args:
            tokens_bs: int64, the tokens that follow those in `cache`, which takes them in; all tokens without it.
        """
        tokens = tokens_bs.size(1)
        view = self.rotated(view_of(tokens, 0, None, self.device) if cache is None else cache.view(tokens))
        keys_T = self.router_keys(tokens_bs, view.positions_bs)
        x_bsh = self.embedding(tokens_bs, view.positions_bs)
        for block in self.blocks:
            x_bsh = block(x_bsh, view, cache, keys_T)
        if cache is not None:
            cache.advance(tokens)
        logits_bsv: Tensor = self.head(x_bsh[:, -1:] if last_only else x_bsh)
        return logits_bsv
