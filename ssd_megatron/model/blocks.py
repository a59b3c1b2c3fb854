"""The Transformer block: megatron-core's TransformerLayer, or the same with normalisation after its networks, with our
feed-forward network and attention core."""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.attention import CrossAttention, CrossAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ssd_megatron.config.model import ModelConfig
from ssd_megatron.config.schema import HASH_ROUTERS, SSDConfig
from ssd_megatron.ffn.homes import Homes
from ssd_megatron.ffn.switchable import FFNSettings, SwitchableFFN
from ssd_megatron.model.attention import OutputProjection, ScaledDotProductCore
from ssd_megatron.model.compiled import compile_block
from ssd_megatron.model.norms import make_norm
from ssd_megatron.parallel.sharding import shard_rows
from ssd_megatron.parallel.topology import Topology

NORMALIZATION = {"layernorm": "LayerNorm", "rmsnorm": "RMSNorm"}


def transformer_config(model: ModelConfig, topology: Topology) -> TransformerConfig:
    """What megatron-core needs to know of the model. Initial values are set afterwards, by name."""
    return TransformerConfig(
        tensor_model_parallel_size=topology.tensor.size,
        pipeline_model_parallel_size=topology.pipeline.size,
        pipeline_dtype=torch.float32,
        num_layers=model.total_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.head_dim,
        ffn_hidden_size=model.ffn_hidden_size,
        normalization=NORMALIZATION[model.normalization],
        layernorm_epsilon=model.norm_epsilon,
        add_bias_linear=model.add_bias,
        hidden_dropout=model.dropout,
        attention_dropout=model.dropout,
        use_cpu_initialization=True,
        perform_initialization=False,
        params_dtype=torch.float32,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
    )


def ffn_settings(model: ModelConfig, ssd: SSDConfig, backend: str) -> FFNSettings:
    return FFNSettings(
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        activation=model.activation,
        add_bias=model.add_bias,
        num_experts=ssd.num_experts,
        top_k=ssd.top_k,
        router_update=ssd.router_update,
        backend=backend,
        routing_granularity=ssd.routing_granularity,
        router=ssd.router,
        load_balance=ssd.load_balance,
        z_loss=ssd.z_loss,
        balance_bias=ssd.balance_bias,
    )


class TransformerBlock(nn.Module):
    """One layer: attention and a feed-forward network that switches between dense and sparse. The last of an encoder
    also normalises what the decoder looks at.

    Attributes:
        looks_at_context: a decoder's layer, with attention to the encoder's output.

    Args:
        layer_index: position in the whole model, from 0.
        recompute: run forward again in backward instead of keeping its activations.
        gather_once: see Homes.once_per_step.
        compiled: train with what torch.compile makes of it; see compiled.py.
    """

    def __init__(
        self,
        config: TransformerConfig,
        model: ModelConfig,
        ffn: FFNSettings,
        layer_index: int,
        recompute: bool,
        gather_once: bool,
        topology: Topology,
        compiled: bool = False,
    ) -> None:
        super().__init__()
        ffn = replace(ffn, hash_salt=layer_index)
        self.router_reads_token_ids = ffn.router in HASH_ROUTERS
        homes = Homes(topology, gather_again=not recompute, once_per_step=gather_once)
        layer: Any = TransformerLayer if model.norm_position == "pre" else PostNormLayer
        self.looks_at_context = layer_index >= model.num_layers
        submodules = _submodules(model, ffn, homes, self.looks_at_context)
        self.layer = layer(config, submodules, layer_number=layer_index + 1)
        for projection in self._projections():
            for parameter in projection.parameters():
                shard_rows(parameter, topology.tensor.rank, topology.tensor.size)
        is_last_of_encoder = model.family == "t5" and layer_index == model.num_layers - 1
        self.final_norm = make_norm(model) if is_last_of_encoder else None
        self.dropout = model.dropout
        self.recompute = recompute
        self.rotary = None
        if model.position_embedding == "rope":
            self.rotary = RotaryEmbedding(
                kv_channels=model.head_dim,
                rotary_percent=1.0,
                rotary_base=model.rotary_base,
                use_cpu_initialization=True,
            )
        self._training_forward = compile_block(self.layer, self._forward, topology) if compiled else self._forward

    @property
    def ffn(self) -> SwitchableFFN:
        ffn = self.layer.mlp
        assert isinstance(ffn, SwitchableFFN)
        return ffn

    def forward(
        self,
        x_sbh: Tensor,
        bias: Tensor | None = None,
        context_sbh: Tensor | None = None,
        token_ids_bs: Tensor | None = None,
    ) -> Tensor:
        """The layer's output, of x's shape.

        Args:
            bias: of the attention's scores (see ScaledDotProductCore).
            context_sbh: the encoder's output, for a decoder's layer.
            token_ids_bs: for routers that hash them, where they are known.
        """
        inputs = (x_sbh, bias, context_sbh, token_ids_bs)
        if not (self.training and torch.is_grad_enabled()):
            return self._forward(*inputs)
        if self.recompute:
            recomputed: Tensor = checkpoint(self._training_forward, *inputs, use_reentrant=False)
            return recomputed
        return self._training_forward(*inputs)

    def _forward(
        self, x_sbh: Tensor, bias: Tensor | None, context_sbh: Tensor | None, token_ids_bs: Tensor | None
    ) -> Tensor:
        if self.router_reads_token_ids:
            # Here, so that a recomputed forward has them too; megatron-core's layer would not hand them on.
            self.ffn.token_ids = token_ids_bs
        if x_sbh.size(1) == 0:
            # megatron-core's attention takes no empty batch; expert-parallel ranks meet in the network.
            nothing_sbh: Tensor = self.ffn(x_sbh)[0]
            return nothing_sbh
        rotary_pos_emb = None if self.rotary is None else self.rotary(x_sbh.size(0)).to(x_sbh.device)
        context = {} if context_sbh is None else {"context": context_sbh}
        y_sbh: Tensor = self.layer(x_sbh, rotary_pos_emb=rotary_pos_emb, attention_bias=bias, **context)[0]
        if self.final_norm is not None:
            y_sbh = F.dropout(self.final_norm(y_sbh), self.dropout, self.training)
        return y_sbh

    def _projections(self) -> list[nn.Module]:
        """Linear layers whose outputs are split over tensor-parallel ranks by heads."""
        attention: Any = self.layer.self_attention
        cross: Any = self.layer.cross_attention if self.looks_at_context else None
        return [attention.linear_qkv, *(() if cross is None else (cross.linear_q, cross.linear_kv))]


class PostNormLayer(nn.Module):
    """Attention and feed-forward network, each normalised after its residual (arXiv 1706.03762); called as
    megatron-core's TransformerLayer, whose networks have the norms before them."""

    def __init__(self, config: TransformerConfig, submodules: TransformerLayerSubmodules, layer_number: int) -> None:
        super().__init__()
        self.self_attention = build_module(
            submodules.self_attention,
            config=config,
            layer_number=layer_number,
            pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
        )
        self.post_attention_layernorm, self.post_mlp_layernorm = (
            build_module(norm, config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)
            for norm in (submodules.input_layernorm, submodules.pre_mlp_layernorm)
        )
        self.mlp = build_module(submodules.mlp, config=config)
        self.dropout = config.hidden_dropout

    def forward(
        self, x_sbh: Tensor, rotary_pos_emb: Tensor | None = None, attention_bias: Tensor | None = None
    ) -> tuple[Tensor, None]:
        add = get_bias_dropout_add(self.training, fused=False)
        attended = self.self_attention(
            x_sbh, attention_mask=None, rotary_pos_emb=rotary_pos_emb, attention_bias=attention_bias
        )
        x_sbh = self.post_attention_layernorm(add(attended, x_sbh, self.dropout))
        return self.post_mlp_layernorm(add(self.mlp(x_sbh), x_sbh, self.dropout)), None


def _submodules(model: ModelConfig, ffn: FFNSettings, homes: Homes, cross: bool) -> TransformerLayerSubmodules:
    core, projection = ModuleSpec(module=ScaledDotProductCore), ModuleSpec(module=OutputProjection)
    submodules = get_gpt_layer_local_spec(normalization=NORMALIZATION[model.normalization]).submodules
    causal = model.family == "gpt" or cross
    submodules.self_attention.params = {"attn_mask_type": AttnMaskType.causal if causal else AttnMaskType.no_mask}
    submodules.self_attention.submodules.core_attention = core
    submodules.self_attention.submodules.linear_proj = projection
    if cross:
        submodules.pre_cross_attn_layernorm = submodules.input_layernorm
        submodules.cross_attention = ModuleSpec(
            module=CrossAttention,
            params={"attn_mask_type": AttnMaskType.no_mask},
            submodules=CrossAttentionSubmodules(
                linear_q=ColumnParallelLinear,
                linear_kv=ColumnParallelLinear,
                core_attention=core,
                linear_proj=projection,
            ),
        )
        submodules.cross_attn_bda = get_bias_dropout_add
    submodules.mlp = ModuleSpec(module=SwitchableFFN, params={"settings": ffn, "homes": homes})
    return submodules
