"""Models of any settings with random weights, as the training module computes them and as a checkpoint holds them."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssd_megatron.ffn.routers import router_weights_from_bank
from ssd_megatron.model.init import named_normal
from ssd_megatron.model.language_model import LanguageModel
from ssd_megatron.parallel.topology import Topology
from ssd_megatron.training.saved_model import Settings, write_model
from tests.ranks import run_ranks
from tests.small_engine import run_config

TOP_K = [2, 4]  # of the small run's two layers, 8 experts each
LEARNED: dict[str, Any] = {}
ROPE = {
    "position_embedding": "rope",
    "normalization": "rmsnorm",
    "activation": "reglu",
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "tie_embeddings": False,
    "add_bias": False,
}


@dataclass(frozen=True)
class Trained:
    """Settings, weights by logical name, tokens [b, s], and their logits [b, s, v] in both modes."""

    settings: Settings
    tensors: dict[str, Tensor]
    tokens: Tensor
    dense: Tensor
    sparse: Tensor

    def write(self, root: Path) -> Path:
        """As a checkpoint in `root`."""
        return write_model(root, self.settings, self.tensors.items())


def trained(**model: Any) -> Trained:
    """A model of the small run's settings but for some, as it computes in training; two samples of its tokens."""
    return _trained(tuple(sorted(model.items())))


@cache
def _trained(items: tuple[tuple[str, Any], ...]) -> Trained:
    model = dict(items)
    (tensors, tokens, dense, sparse) = run_ranks(1, _compute, model)[0]
    section = run_config(**model).ssd_megatron
    settings = Settings(section.model, section.ssd, TOP_K, has_experts=True, tokenizer=None)
    return Trained(settings, tensors, tokens, dense, sparse)


@torch.no_grad()
def _compute(topology: Topology, settings: dict[str, Any]) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor]:
    model = LanguageModel(run_config(**settings).ssd_megatron, "torch", topology).eval()
    parameters = model.logical_parameters()
    for name, parameter in parameters.items():
        # Not initial values, which hide what they leave at 0 or 1; attention must look at something, too.
        noise = named_normal(f"noise {name}", tuple(parameter.shape), 0)
        parameter.add_(noise, alpha=0.3 if "linear_qkv" in name else 0.1)
    for ffn, top_k in zip(model.ffns.values(), TOP_K, strict=True):
        ffn.router.weight.copy_(router_weights_from_bank(ffn.bank.rows(), ffn.settings.num_experts))
        ffn.router.top_k = top_k
    tokens = torch.randint(0, 512, (2, 16), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(16).expand(2, -1)
    logits = {}
    for mode in ("dense", "sparse"):
        for ffn in model.ffns.values():
            ffn.mode = "sparse" if mode == "sparse" else "dense"
        logits[mode] = model.logits((tokens, positions)).transpose(0, 1).contiguous()
    return {name: p.clone() for name, p in parameters.items()}, tokens, logits["dense"], logits["sparse"]
