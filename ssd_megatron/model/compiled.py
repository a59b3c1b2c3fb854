"""torch.compile of Transformer blocks: a graph for each mode, the same for all layers.

What ranks exchange, and sparse mode, whose sizes depend on the data, stay as they are and part the graphs. Evaluation
and probes are not compiled: their batches have other sizes.
"""

from collections.abc import Callable

import torch
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from ssd_megatron.parallel.topology import Topology


def compile_block(layer: TransformerLayer, forward: Callable[..., Tensor], topology: Topology) -> Callable[..., Tensor]:
    """The forward of a block around `layer`, compiled at its first call in each mode."""
    # One more graph than modes would mean one for each layer, and that most of them are not compiled at all.
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    parts = [layer.self_attention.linear_qkv, layer.self_attention.linear_proj] if topology.tensor.size > 1 else []
    for part in [*parts, *([layer.mlp] if topology.homes > 1 else [])]:
        part.forward = torch.compiler.disable(part.forward)  # type: ignore[no-untyped-call]
    compiled: Callable[..., Tensor] = torch.compile(forward)
    return compiled
