"""A trained GPT on one device, for use: no process group, no engine, no gradients; keys and values are kept.

The arithmetic is that of `model/language_model.py` (tests compare their logits). Shapes: b batch, s new tokens, S
tokens seen so far with them, h hidden, n query heads, g key/value heads, r = n / g, d head size, v vocabulary.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssd_megatron.config.schema import ModelConfig
from ssd_megatron.ffn.kernels.decode import linear_row
from ssd_megatron.inference.cache import KeyValueCache, View, view_of
from ssd_megatron.inference.ffn import Experts, FeedForward, Mode
from ssd_megatron.model.cost import qkv_size


class CausalModel(nn.Module):
    """Decoder-only Transformer; values are left uninitialised.

    Attributes:
        config: shape of the model.
        ffns: its feed-forward networks, first layer first.
    """

    def __init__(
        self, config: ModelConfig, experts: Experts | None, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.config, self.dtype, self.device = config, dtype, device

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, dtype=dtype, device=device), requires_grad=False)

        self.word = parameter(config.padded_vocab_size, config.hidden_size)
        learned = config.position_embedding == "learned"
        self.position = parameter(config.seq_length, config.hidden_size) if learned else None
        self.blocks = nn.ModuleList(
            Block(config, experts, index, dtype=dtype, device=device) for index in range(config.num_layers)
        )
        self.norm = _norm(config, dtype, device)
        self.head = self.word if config.tie_embeddings else parameter(config.padded_vocab_size, config.hidden_size)
        self.requires_grad_(False)
        self.eval()

    @property
    def ffns(self) -> list[FeedForward]:
        return [block.mlp for block in self._blocks()]

    def set_mode(self, mode: Mode) -> None:
        for ffn in self.ffns:
            ffn.mode = mode

    def logical_parameters(self) -> dict[str, Tensor]:
        """Where the logical tensors of a checkpoint go, by their names."""
        names = {
            "word": "embedding.word.weight",
            "position": "embedding.position.weight",
            "head": "head.weight",
            "norm.weight": "head.norm.weight",
            "norm.bias": "head.norm.bias",
        }
        found: dict[str, Tensor] = {}
        for name, parameter in self.named_parameters():
            _, number, rest = name.split(".", 2) if name.startswith("blocks.") else ("", "", "")
            if number:
                # Checkpoints have a row for each input, as everything that is sharded.
                is_transposed = rest == "self_attention.linear_proj.weight"
                found[f"blocks.{number}.layer.{rest}"] = parameter.t() if is_transposed else parameter
            else:
                found[names[name]] = parameter
        return found

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
        view = view_of(tokens_bs.size(1), past, padding_b, self.device)
        x_bsh = F.embedding(tokens_bs, self.word)
        rotation = None
        if self.position is not None:
            x_bsh = x_bsh + F.embedding(view.positions_bs, self.position)
        else:
            rotation = rotary(view.positions_bs, self.config.head_dim, self.config.rotary_base, self.dtype)
        keys_T = self._router_keys(tokens_bs, view.positions_bs)
        for block in self._blocks():
            x_bsh = block(x_bsh, view, rotation, cache, keys_T)
        if cache is not None:
            cache.advance(tokens_bs.size(1))
        return _linear(self.norm(x_bsh[:, -1:] if last_only else x_bsh), self.head, None).float()

    def _router_keys(self, tokens_bs: Tensor, positions_bs: Tensor) -> Tensor | None:
        """What routers go by that do not look at inputs."""
        router = self.ffns[0].router
        keys_bs = {"token_ids": tokens_bs, "positions": positions_bs.expand_as(tokens_bs)}
        return None if router is None or router.kind.reads not in keys_bs else keys_bs[router.kind.reads].flatten()

    def _blocks(self) -> Iterator["Block"]:
        for block in self.blocks:
            assert isinstance(block, Block)
            yield block


class Block(nn.Module):
    """One layer: attention and feed-forward network, each behind its norm and added to what came in."""

    def __init__(
        self, config: ModelConfig, experts: Experts | None, index: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        super().__init__()
        self.input_layernorm = _norm(config, dtype, device)
        self.self_attention = Attention(config, index, dtype=dtype, device=device)
        self.pre_mlp_layernorm = _norm(config, dtype, device)
        self.mlp = FeedForward(
            config.hidden_size,
            config.ffn_hidden_size,
            config.activation,
            config.add_bias,
            experts,
            index,
            dtype=dtype,
            device=device,
        )

    def forward(
        self,
        x_bsh: Tensor,
        view: View,
        rotation: tuple[Tensor, Tensor] | None,
        cache: KeyValueCache | None,
        keys_T: Tensor | None,
    ) -> Tensor:
        x_bsh = x_bsh + self.self_attention(self.input_layernorm(x_bsh), view, rotation, cache)
        y_Th: Tensor = self.mlp(self.pre_mlp_layernorm(x_bsh).flatten(0, 1), keys_T)
        return x_bsh + y_Th.view_as(x_bsh)


class Attention(nn.Module):
    """Grouped-query attention over the cache and the new tokens."""

    def __init__(self, config: ModelConfig, index: int, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.index, self.groups, self.head_dim = index, config.num_query_groups, config.head_dim
        self.linear_qkv = Linear(config.hidden_size, qkv_size(config), config.add_bias, dtype=dtype, device=device)
        self.linear_proj = Linear(config.hidden_size, config.hidden_size, config.add_bias, dtype=dtype, device=device)

    def forward(
        self, x_bsh: Tensor, view: View, rotation: tuple[Tensor, Tensor] | None, cache: KeyValueCache | None
    ) -> Tensor:
        b, s, h = x_bsh.shape
        # megatron-core's order: each group's query heads, then its key, then its value.
        heads_bgsrd = self.linear_qkv(x_bsh).view(b, s, self.groups, -1, self.head_dim).transpose(1, 2)
        per_group = heads_bgsrd.size(3) - 2
        query_bgsrd, key_bgsd, value_bgsd = (
            heads_bgsrd[..., :per_group, :],
            heads_bgsrd[..., per_group, :],
            heads_bgsrd[..., per_group + 1, :],
        )
        if rotation is not None:
            query_bgsrd, key_bgsd = rotate(query_bgsrd, rotation, 2), rotate(key_bgsd, rotation, 1)
        if cache is not None:
            key_bgsd, value_bgsd = cache.append(self.index, key_bgsd, value_bgsd)
        if s == 1:
            # A group's heads are queries of one head: nothing has to be repeated for them.
            context_bgrd = F.scaled_dot_product_attention(query_bgsrd[:, :, 0], key_bgsd, value_bgsd, view.mask)
            context_bsh = context_bgrd.reshape(b, 1, h)
        else:
            query_bnsd = query_bgsrd.transpose(2, 3).flatten(1, 2)
            context_bnsd = F.scaled_dot_product_attention(
                query_bnsd, key_bgsd, value_bgsd, view.mask, is_causal=view.causal, enable_gqa=per_group > 1
            )
            context_bsh = context_bnsd.transpose(1, 2).reshape(b, s, h)
        projected: Tensor = self.linear_proj(context_bsh)
        return projected


class Linear(nn.Module):
    """y = x weight^T + bias."""

    def __init__(self, inputs: int, outputs: int, bias: bool, *, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, dtype=dtype, device=device))
        self.bias = nn.Parameter(torch.empty(outputs, dtype=dtype, device=device)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return _linear(x, self.weight, self.bias)


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


def _norm(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> nn.Module:
    norm = nn.LayerNorm if config.normalization == "layernorm" else nn.RMSNorm
    return norm(config.hidden_size, eps=config.norm_epsilon, dtype=dtype, device=device)
