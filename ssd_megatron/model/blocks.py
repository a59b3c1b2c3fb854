"""The Transformer block: megatron-core's TransformerLayer with our feed-forward network and attention core."""

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ssd_megatron.config.schema import ModelConfig, SSDConfig
from ssd_megatron.ffn.homes import Homes
from ssd_megatron.ffn.switchable import FFNSettings, SwitchableFFN
from ssd_megatron.model.attention import OutputProjection, ScaledDotProductCore
from ssd_megatron.model.compiled import compile_block
from ssd_megatron.parallel.sharding import shard_rows
from ssd_megatron.parallel.topology import Topology

NORMALIZATION = {"layernorm": "LayerNorm", "rmsnorm": "RMSNorm"}


def transformer_config(model: ModelConfig, topology: Topology) -> TransformerConfig:
    """What megatron-core needs to know of the model. Initial values are set afterwards, by name."""
    return TransformerConfig(
        tensor_model_parallel_size=topology.tensor.size,
        pipeline_model_parallel_size=topology.pipeline.size,
        pipeline_dtype=torch.float32,
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
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
    )


class TransformerBlock(nn.Module):
    """One layer: attention and a feed-forward network that switches between dense and sparse.

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
        homes = Homes(topology, gather_again=not recompute, once_per_step=gather_once)
        self.layer = TransformerLayer(config, _submodules(model, ffn, homes), layer_number=layer_index + 1)
        for parameter in self.layer.self_attention.linear_qkv.parameters():
            shard_rows(parameter, topology.tensor.rank, topology.tensor.size)
        self.recompute = recompute
        self.rotary = None
        if model.position_embedding == "rope":
            self.rotary = RotaryEmbedding(
                kv_channels=model.hidden_size // model.num_attention_heads,
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

    def forward(self, x_sbh: Tensor) -> Tensor:
        if not (self.training and torch.is_grad_enabled()):
            return self._forward(x_sbh)
        if self.recompute:
            recomputed: Tensor = checkpoint(self._training_forward, x_sbh, use_reentrant=False)
            return recomputed
        return self._training_forward(x_sbh)

    def _forward(self, x_sbh: Tensor) -> Tensor:
        if x_sbh.size(1) == 0:
            # megatron-core's attention takes no empty batch; expert-parallel ranks meet in the network.
            nothing_sbh: Tensor = self.ffn(x_sbh)[0]
            return nothing_sbh
        rotary_pos_emb = None if self.rotary is None else self.rotary(x_sbh.size(0)).to(x_sbh.device)
        y_sbh: Tensor = self.layer(x_sbh, rotary_pos_emb=rotary_pos_emb)[0]
        return y_sbh


def _submodules(model: ModelConfig, ffn: FFNSettings, homes: Homes) -> TransformerLayerSubmodules:
    submodules = get_gpt_layer_local_spec(normalization=NORMALIZATION[model.normalization]).submodules
    submodules.self_attention.submodules.core_attention = ModuleSpec(module=ScaledDotProductCore)
    submodules.self_attention.submodules.linear_proj = ModuleSpec(module=OutputProjection)
    submodules.mlp = ModuleSpec(module=SwitchableFFN, params={"settings": ffn, "homes": homes})
    return submodules
