"""A GPT whose feed-forward networks run dense or sparse on the same weights, for transformers.

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    model.set_mode("dense")    # every neuron for every token; "sparse": the experts that a token's router chooses

Needs torch and transformers alone. Source: Exploring the Benefit of Activation Sparsity in Pre-training (SSD, arXiv
2410.03440). Shapes: b batch, s new tokens, S tokens with those before them, T tokens, H hidden, F neurons, E experts, N
neurons per expert, K experts per token, g key/value heads, r query heads of each, d head size.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "squared_relu": lambda x: F.relu(x).square(),
    "reglu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "geglu": F.gelu,
    "geglu_tanh": partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "swiglu": F.silu,
}
GATED = ("reglu", "geglu", "geglu_tanh", "swiglu")


class SsdConfig(PreTrainedConfig):
    """Shape of the model; fields as in ssd_megatron's configuration.

    `experts_per_token` is by layer, `mode` is what the model begins with; `router`: see `FeedForward.score`.
    """

    model_type = "ssd_gpt"

    vocab_size: int = 32000
    num_layers: int = 12
    hidden_size: int = 768
    num_attention_heads: int = 12
    num_query_groups: int = 12
    kv_channels: int | None = None  # of a head; None: hidden_size / num_attention_heads
    ffn_hidden_size: int = 3072
    seq_length: int = 1024
    activation: str = "relu"
    normalization: str = "layernorm"
    norm_epsilon: float = 1e-5
    position_embedding: str = "learned"
    rotary_base: float = 10000.0
    add_bias: bool = True
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    num_experts: int = 16
    experts_per_token: list[int] | None = None
    router: str = "centroid"
    router_update: str = "straight_through"  # of training; nothing here depends on it
    mode: str = "sparse"

    def __post_init__(self, **kwargs):
        # What transformers calls these.
        self.num_hidden_layers = self.num_layers
        self.max_position_embeddings = self.seq_length
        self.head_dim = self.kv_channels or self.hidden_size // self.num_attention_heads
        super().__post_init__(**kwargs)


class FeedForward(nn.Module):
    """`mode` says which neurons a token gets: all, or those of the `top_k` experts that its router scores highest."""

    def __init__(self, config, layer):
        super().__init__()
        hidden, neurons = config.hidden_size, config.ffn_hidden_size
        gated = config.activation in GATED
        self.act = ACTIVATIONS[config.activation]
        self.num_experts, self.top_k, self.mode = config.num_experts, config.experts_per_token[layer], config.mode
        self.w_in = nn.Parameter(torch.empty(neurons, hidden))
        self.w_gate = nn.Parameter(torch.empty(neurons, hidden)) if gated else None
        self.b_in = nn.Parameter(torch.empty(neurons)) if config.add_bias else None
        self.b_gate = nn.Parameter(torch.empty(neurons)) if gated and config.add_bias else None
        self.w_out = nn.Parameter(torch.empty(neurons, hidden))
        self.b_out = nn.Parameter(torch.empty(hidden)) if config.add_bias else None
        self.kind, experts = config.router, config.num_experts
        has_rows, is_mlp = self.kind in ("centroid", "switch", "mlp"), self.kind == "mlp"
        self.router = nn.Parameter(torch.empty(experts, hidden)) if has_rows else None
        self.router_mix = nn.Parameter(torch.empty(experts, experts)) if is_mlp else None

    def forward(self, x):
        x_TH = x.flatten(0, 1)
        y_TH = self._neurons(x_TH, slice(None)) if self.mode == "dense" else self._experts(x_TH)
        return (y_TH if self.b_out is None else y_TH + self.b_out).view_as(x)

    def score(self, x_TH):
        """Scores of the experts [T, E], fp32: bf16 ones would tie.

        Those of a row per expert, its own (`centroid`, `switch`) or the mean of its neurons' (`avg_k`); of two layers
        on normalised inputs (`mlp`, MoEfication, arXiv 2110.01786); or what the neurons will give (`oracle`).
        """
        if self.kind == "oracle":
            outputs_TF = self._outputs(x_TH, slice(None))
            return outputs_TF.abs().view(len(x_TH), self.num_experts, -1).sum(dim=2, dtype=torch.float32)
        if self.router is None:
            rows_FH = self.w_in if self.w_gate is None else self.w_gate
            return F.linear(x_TH.float(), rows_FH.view(self.num_experts, -1, rows_FH.shape[1]).float().mean(dim=1))
        if self.router_mix is not None:
            hidden_TE = F.linear(F.normalize(x_TH.float(), dim=1), self.router.float()).tanh()
            return F.linear(hidden_TE, self.router_mix.float())
        return F.linear(x_TH.float(), self.router.float())

    def _experts(self, x_TH):
        scores_TE, size = self.score(x_TH), len(self.w_in) // self.num_experts
        chosen_TK = scores_TE.topk(self.top_k, dim=1).indices
        # `switch` multiplies what an expert gives by the softmax of its score (arXiv 2101.03961).
        gates_TE = scores_TE.softmax(dim=1).to(x_TH.dtype) if self.kind == "switch" else None
        y_TH = torch.zeros_like(x_TH)
        for expert in chosen_TK.unique().tolist():
            tokens = (chosen_TK == expert).any(dim=1).nonzero().squeeze(1)
            part_TH = self._neurons(x_TH[tokens], slice(expert * size, (expert + 1) * size))
            y_TH = y_TH.index_add(0, tokens, part_TH if gates_TE is None else part_TH * gates_TE[tokens, expert, None])
        return y_TH

    def _neurons(self, x_TH, rows):
        """What the neurons of some rows give together."""
        return self._outputs(x_TH, rows) @ self.w_out[rows]

    def _outputs(self, x_TH, rows):
        up = F.linear(x_TH, self.w_in[rows], None if self.b_in is None else self.b_in[rows])
        if self.w_gate is None:
            return self.act(up)
        return up * self.act(F.linear(x_TH, self.w_gate[rows], None if self.b_gate is None else self.b_gate[rows]))


class Attention(nn.Module):
    """Grouped-query attention; `qkv` has each group's query heads, key and value in turn."""

    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.groups = layer, config.num_query_groups
        self.head_dim = config.head_dim
        queries = config.num_attention_heads * self.head_dim
        self.qkv = nn.Linear(config.hidden_size, queries + 2 * self.groups * self.head_dim, bias=config.add_bias)
        self.output = nn.Linear(queries, config.hidden_size, bias=config.add_bias)

    def forward(self, x, mask, rotation, cache):
        b, s, _ = x.shape
        heads = self.qkv(x).view(b, s, self.groups, -1, self.head_dim)
        repeats = heads.size(3) - 2
        query = heads[:, :, :, :repeats].flatten(2, 3).transpose(1, 2)
        key, value = heads[:, :, :, repeats].transpose(1, 2), heads[:, :, :, repeats + 1].transpose(1, 2)
        if rotation is not None:
            query, key = rotate(query, rotation), rotate(key, rotation)
        if cache is not None:
            key, value = cache.update(key, value, self.layer)
        context = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=repeats > 1)
        return self.output(context.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.input_layernorm, self.pre_mlp_layernorm = make_norm(config), make_norm(config)
        self.attention = Attention(config, layer)
        self.ffn = FeedForward(config, layer)

    def forward(self, x, mask, rotation, cache):
        x = x + self.attention(self.input_layernorm(x), mask, rotation, cache)
        return x + self.ffn(self.pre_mlp_layernorm(x))


class SsdPreTrainedModel(PreTrainedModel):
    config_class = SsdConfig
    base_model_prefix = "model"
    _no_split_modules = ("Layer",)

    @torch.no_grad()
    def _init_weights(self, module):
        std = self.config.initializer_range
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, FeedForward):
            for name, parameter in module.named_parameters():
                nn.init.zeros_(parameter) if name.startswith("b_") else nn.init.normal_(parameter, std=std)


class SsdModel(SsdPreTrainedModel):
    """Embedding, layers and the last norm."""

    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        learned = config.position_embedding == "learned"
        self.embed_positions = nn.Embedding(config.seq_length, config.hidden_size) if learned else None
        self.layers = nn.ModuleList(Layer(config, layer) for layer in range(config.num_layers))
        self.norm = make_norm(config)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed_tokens

    def set_input_embeddings(self, value):
        self.embed_tokens = value

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = None,
        **_unused_here,
    ) -> BaseModelOutputWithPast:
        """`attention_mask` [b, S] is 0 at padding."""
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        past, new = 0 if past_key_values is None else past_key_values.get_seq_length(), input_ids.size(1)
        device = input_ids.device
        slots_s, slots_S = torch.arange(past, past + new, device=device), torch.arange(past + new, device=device)
        mask = (slots_S <= slots_s[:, None])[None, None]
        if attention_mask is not None:
            # Padding looks at itself: a row without anything to look at would be NaN.
            mask = mask & attention_mask[:, None, None].bool() | (slots_S == slots_s[:, None])
        if position_ids is None:
            position_ids = slots_s[None]
            if attention_mask is not None:
                position_ids = (attention_mask.long().cumsum(1) - 1).clamp(min=0)[:, past:]
        x, rotation = self.embed_tokens(input_ids), None
        if self.embed_positions is not None:
            x = x + self.embed_positions(position_ids)
        else:
            rotation = make_rotation(position_ids, self.config, x.dtype)
        for layer in self.layers:
            x = layer(x, mask, rotation, past_key_values)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(x), past_key_values=past_key_values)


class SsdForCausalLM(SsdPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config):
        super().__init__(config)
        self.model = SsdModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, value):
        self.lm_head = value

    def set_mode(self, mode):
        """`dense` or `sparse`, from the next call on."""
        if mode not in ("dense", "sparse"):
            raise ValueError(f"mode ({mode}) must be dense or sparse")
        self.config.mode = mode
        for module in self.modules():
            if isinstance(module, FeedForward):
                module.mode = mode

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        outputs = self.model(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            use_cache=use_cache,
        )
        logits = self.lm_head(outputs.last_hidden_state[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=outputs.past_key_values)


def make_norm(config):
    norm = nn.LayerNorm if config.normalization == "layernorm" else nn.RMSNorm
    return norm(config.hidden_size, eps=config.norm_epsilon)


def make_rotation(position_ids, config, dtype):
    """Cosines and sines [b, 1, s, d] (RoFormer, arXiv 2104.09864)."""
    d = config.head_dim
    frequencies = 1.0 / config.rotary_base ** (torch.arange(0, d, 2, device=position_ids.device).float() / d)
    angles = (position_ids[..., None].float() * frequencies).repeat(1, 1, 2)[:, None]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x, rotation):
    first, second = x.chunk(2, dim=-1)
    return x * rotation[0] + torch.cat((-second, first), dim=-1) * rotation[1]
