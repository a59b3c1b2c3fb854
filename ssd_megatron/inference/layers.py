"""The layers of a trained model, for use: no gradients; keys and values may be kept. Of what `Place` deals out over
tensor-parallel ranks each has its part.

The arithmetic is that of `model/` (tests compare logits). Shapes: b batch, s new tokens, S tokens that they look at, h
hidden, n query heads, g key/value heads, r = n / g, d head size; n and g are those of this rank.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssd_megatron.config.model import ModelConfig
from ssd_megatron.ffn.kernels.decode import linear_row
from ssd_megatron.inference.cache import Cache, View
from ssd_megatron.inference.ffn import Experts, FeedForward
from ssd_megatron.inference.place import Place
from ssd_megatron.model.cost import qkv_size, query_size
from ssd_megatron.model.heads import SentenceHead, Transform
from ssd_megatron.model.norms import make_norm


class Context(NamedTuple):
    """An encoder's output as one decoder layer looks at it: keys and values [b, n, S, d], and where its texts are, bool
    [b, 1, 1, S]; None: everywhere."""

    key_bnSd: Tensor
    value_bnSd: Tensor
    mask: Tensor | None


class Table(nn.Module):
    """Rows by ids."""

    def __init__(self, rows: int, columns: int, place: Place) -> None:
        super().__init__()
        self.weight = place.parameter(rows, columns)

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight)


class SharedTable(nn.Module):
    """The same, of which each rank has some of the rows."""

    def __init__(self, rows: int, columns: int, place: Place) -> None:
        super().__init__()
        self.place = place
        self.weight = place.rows(rows, columns)

    def forward(self, ids: Tensor) -> Tensor:
        if self.place.ranks == 1:
            return F.embedding(ids, self.weight)
        mine = self.place.own(ids, len(self.weight))
        found = F.embedding(mine.clamp(min=0), self.weight).masked_fill((mine < 0)[..., None], 0)
        return self.place.sum("word embeddings", found)


class Embedding(nn.Module):
    """Tokens, and what a family adds to them; the tables of T5's position biases."""

    def __init__(self, config: ModelConfig, place: Place) -> None:
        super().__init__()
        h = config.hidden_size
        self.word = SharedTable(config.padded_vocab_size, h, place)
        learned, kinds = config.position_embedding == "learned", config.num_token_types
        self.position = Table(config.seq_length, h, place) if learned else None
        self.token_type = Table(kinds, h, place) if kinds else None
        self.position_bias = None
        if config.position_embedding == "relative":
            shape = (config.relative_attention_num_buckets, config.num_attention_heads)
            tables = {name: place.parameter(*shape) for name in ("encoder", "decoder")}
            self.position_bias = nn.ParameterDict(tables)
        self.norm = _norm(config, place) if config.norm_position == "post" else None

    def forward(self, tokens_bs: Tensor, positions_bs: Tensor, token_types_bs: Tensor | None = None) -> Tensor:
        """Hidden states [b, s, h]; tokens are of the first kind unless something else is said."""
        x_bsh: Tensor = self.word(tokens_bs)
        if self.position is not None:
            x_bsh = x_bsh + self.position(positions_bs)
        if self.token_type is not None:
            x_bsh = x_bsh + self.token_type(torch.zeros_like(tokens_bs) if token_types_bs is None else token_types_bs)
        return x_bsh if self.norm is None else self.norm(x_bsh)


class Head(nn.Module):
    """From hidden states to logits; `sentence` is BERT's second head.

    Args:
        word: the embedding's weight, which is the head's if they are tied.
    """

    def __init__(self, config: ModelConfig, word: nn.Parameter, place: Place) -> None:
        super().__init__()
        is_bert, rows = config.family == "bert", config.padded_vocab_size
        self.place = place
        self.norm = _norm(config, place) if config.norm_position == "pre" else None
        self.transform = Transform(config).to(place.device, place.dtype) if is_bert else None
        self.weight = word if config.tie_embeddings else place.rows(rows, config.hidden_size)
        self.bias = place.rows(rows) if is_bert else None
        self.sentence = SentenceHead(config).to(place.device, place.dtype) if config.predicts_sentences else None

    def forward(self, x_bsh: Tensor) -> Tensor:
        """fp32 [b, s, vocabulary]."""
        if self.norm is not None:
            x_bsh = self.norm(x_bsh)
        if self.transform is not None:
            x_bsh = self.transform(x_bsh)
        return self.place.all_columns("logits", _linear(x_bsh, self.weight, self.bias)).float()


class Block(nn.Module):
    """One layer: attention, in a decoder beside an encoder also to that, and feed-forward network, each behind its norm
    and added to what came in."""

    def __init__(self, config: ModelConfig, experts: Experts | None, index: int, place: Place) -> None:
        super().__init__()
        looks_at_context = index >= config.num_layers
        self.input_layernorm = _norm(config, place)
        number = index - config.num_layers if looks_at_context else index
        self.self_attention = Attention(config, number, place)
        self.pre_cross_attn_layernorm = _norm(config, place) if looks_at_context else None
        self.cross_attention = CrossAttention(config, place) if looks_at_context else None
        self.pre_mlp_layernorm = _norm(config, place)
        self.mlp = make_ffn(config, experts, index, place)

    def forward(
        self,
        x_bsh: Tensor,
        view: View,
        cache: Cache | None = None,
        keys_T: Tensor | None = None,
        context: Context | None = None,
    ) -> Tensor:
        """
        Args:
            keys_T: for a router that goes by ids or positions of tokens.
        """
        x_bsh = x_bsh + self.self_attention(self.input_layernorm(x_bsh), view, cache)
        if self.cross_attention is not None:
            assert self.pre_cross_attn_layernorm is not None and context is not None
            x_bsh = x_bsh + self.cross_attention(self.pre_cross_attn_layernorm(x_bsh), context)
        y_Th: Tensor = self.mlp(self.pre_mlp_layernorm(x_bsh).flatten(0, 1), keys_T)
        return x_bsh + y_Th.view_as(x_bsh)


class PostNormBlock(nn.Module):
    """The same with each norm after what is added up; without a context."""

    def __init__(self, config: ModelConfig, experts: Experts | None, index: int, place: Place) -> None:
        super().__init__()
        self.self_attention = Attention(config, index, place)
        self.post_attention_layernorm = _norm(config, place)
        self.mlp = make_ffn(config, experts, index, place)
        self.post_mlp_layernorm = _norm(config, place)

    def forward(self, x_bsh: Tensor, view: View, cache: Cache | None = None, keys_T: Tensor | None = None) -> Tensor:
        x_bsh = self.post_attention_layernorm(x_bsh + self.self_attention(x_bsh, view, cache))
        y_Th: Tensor = self.mlp(x_bsh.flatten(0, 1), keys_T)
        normalised: Tensor = self.post_mlp_layernorm(x_bsh + y_Th.view_as(x_bsh))
        return normalised


class Attention(nn.Module):
    """Grouped-query attention over the cache and the new tokens; `index` counts the layers of one cache."""

    def __init__(self, config: ModelConfig, index: int, place: Place) -> None:
        super().__init__()
        self.index, self.groups, self.head_dim = index, place.part(config.num_query_groups), config.head_dim
        self.linear_qkv = Linear(config.hidden_size, qkv_size(config), config.add_bias, place)
        self.linear_proj = OutputLinear(query_size(config), config.hidden_size, config.add_bias, place)

    def forward(self, x_bsh: Tensor, view: View, cache: Cache | None) -> Tensor:
        b, s, _ = x_bsh.shape
        # megatron-core's order: each group's query heads, then its key, then its value.
        heads_bgsrd = self.linear_qkv(x_bsh).view(b, s, self.groups, -1, self.head_dim).transpose(1, 2)
        per_group = heads_bgsrd.size(3) - 2
        query_bgsrd, key_bgsd, value_bgsd = (
            heads_bgsrd[..., :per_group, :],
            heads_bgsrd[..., per_group, :],
            heads_bgsrd[..., per_group + 1, :],
        )
        if view.rotation is not None:
            query_bgsrd, key_bgsd = rotate(query_bgsrd, view.rotation, 2), rotate(key_bgsd, view.rotation, 1)
        if cache is not None:
            key_bgsd, value_bgsd = cache.append(self.index, key_bgsd, value_bgsd)
        if s == 1:
            # A group's heads are queries of one head: nothing has to be repeated for them.
            context_bgrd = F.scaled_dot_product_attention(query_bgsrd[:, :, 0], key_bgsd, value_bgsd, view.mask)
            context_bsh = context_bgrd.reshape(b, 1, -1)
        else:
            query_bnsd = query_bgsrd.transpose(2, 3).flatten(1, 2)
            context_bnsd = F.scaled_dot_product_attention(
                query_bnsd, key_bgsd, value_bgsd, view.mask, is_causal=view.causal, enable_gqa=per_group > 1
            )
            context_bsh = context_bnsd.transpose(1, 2).reshape(b, s, -1)
        projected: Tensor = self.linear_proj(context_bsh)
        return projected


class CrossAttention(nn.Module):
    """Attention of a decoder to its encoder's output."""

    def __init__(self, config: ModelConfig, place: Place) -> None:
        super().__init__()
        h, queries = config.hidden_size, query_size(config)
        self.heads, self.head_dim = place.part(config.num_attention_heads), config.head_dim
        self.linear_q = Linear(h, queries, config.add_bias, place)
        self.linear_kv = Linear(h, 2 * queries, config.add_bias, place)
        self.linear_proj = OutputLinear(queries, h, config.add_bias, place)

    def context(self, encoded_bSh: Tensor, mask: Tensor | None) -> Context:
        """What this layer looks at, computed once for all of a decoder's tokens."""
        b, length, _ = encoded_bSh.shape
        # megatron-core's order: each head's key, then its value.
        pairs_bnSd = self.linear_kv(encoded_bSh).view(b, length, self.heads, 2 * self.head_dim).transpose(1, 2)
        key_bnSd, value_bnSd = pairs_bnSd.chunk(2, dim=-1)
        return Context(key_bnSd.contiguous(), value_bnSd.contiguous(), mask)

    def forward(self, x_bsh: Tensor, context: Context) -> Tensor:
        b, s, _ = x_bsh.shape
        query_bnsd = self.linear_q(x_bsh).view(b, s, self.heads, self.head_dim).transpose(1, 2)
        looked_bnsd = F.scaled_dot_product_attention(query_bnsd, *context)
        projected: Tensor = self.linear_proj(looked_bnsd.transpose(1, 2).reshape(b, s, -1))
        return projected


class Linear(nn.Module):
    """y = x weight^T + bias; each rank has some of the outputs."""

    def __init__(self, inputs: int, outputs: int, bias: bool, place: Place) -> None:
        super().__init__()
        self.weight = place.rows(outputs, inputs)
        self.bias = place.rows(outputs) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return _linear(x, self.weight, self.bias)


class OutputLinear(nn.Module):
    """The same of attention's outputs; each rank has some of the inputs."""

    def __init__(self, inputs: int, outputs: int, bias: bool, place: Place) -> None:
        super().__init__()
        self.place = place
        self.weight = place.parameter(outputs, place.part(inputs))
        self.bias = place.parameter(outputs) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        if self.place.ranks == 1:
            return _linear(x, self.weight, self.bias)
        y = self.place.sum("attention", _linear(x, self.weight, None))
        return y if self.bias is None else y + self.bias


def rotary(positions_bs: Tensor, head_dim: int, base: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines [b, s, d] of rotary position embeddings, halves alike (RoFormer, arXiv 2104.09864)."""
    frequencies = 1.0 / base ** (torch.arange(0, head_dim, 2, device=positions_bs.device).float() / head_dim)
    angles = (positions_bs[..., None].float() * frequencies).repeat(1, 1, 2)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x_bgsxd: Tensor, rotation: tuple[Tensor, Tensor], position_dims: int) -> Tensor:
    """Rotate queries [b, g, s, r, d] (`position_dims` 2) or keys [b, g, s, d] (1) by their positions' angles."""
    cos, sin = (t[:, None] if position_dims == 1 else t[:, None, :, None] for t in rotation)
    first, second = x_bgsxd.chunk(2, dim=-1)
    return x_bgsxd * cos + torch.cat((-second, first), dim=-1) * sin


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if x.numel() == x.size(-1) and x.device.type == "cpu":
        return linear_row(x.flatten(), weight, bias).view(*x.shape[:-1], -1)
    return F.linear(x, weight, bias)


def _norm(config: ModelConfig, place: Place) -> nn.Module:
    return make_norm(config).to(place.device, place.dtype)


def make_ffn(config: ModelConfig, experts: Experts | None, index: int, place: Place) -> FeedForward:
    c = config
    return FeedForward(c.hidden_size, c.ffn_hidden_size, c.activation, c.add_bias, experts, index, place)
