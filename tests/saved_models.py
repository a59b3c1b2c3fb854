"""Models of any settings with random weights, as the training module computes them and as a checkpoint holds them."""

import itertools
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssd_megatron.config.model import ModelConfig
from ssd_megatron.ffn.routers import expert_directions
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
BERT: dict[str, Any] = {"family": "bert", "vocab_size": 500}
T5: dict[str, Any] = {"family": "t5", "vocab_size": 500, "decoder_seq_length": 8}
# Whose constants are powers of 2; it begins as transformers' do.
EXACT_T5 = T5 | {"hidden_size": 64, "num_attention_heads": 4, "decoder_start_token": 0}

# As T5 1.1 in small: heads that are not as wide as the model together, the approximate gated GELU, an untied head.
T5_11 = T5 | {"num_attention_heads": 6, "kv_channels": 16, "activation": "geglu_tanh", "tie_embeddings": False}


@dataclass(frozen=True)
class Trained:
    """Settings, weights by logical name, neuron at each position by network, what the family reads of two samples, and
    logits [b, s, v] in both modes."""

    settings: Settings
    tensors: dict[str, Tensor]
    neuron_ids: dict[str, Tensor]
    inputs: dict[str, Tensor]
    dense: Tensor
    sparse: Tensor

    @property
    def tokens(self) -> Tensor:
        return self.inputs["tokens"]

    def write(self, root: Path) -> Path:
        """As a checkpoint in `root`."""
        return write_model(root, self.settings, self.tensors.items(), self.neuron_ids)


def trained(**model: Any) -> Trained:
    """A model of the small run's settings but for some (those of `ssd` in a dict), as it computes in training."""
    return _trained(json.dumps(model, sort_keys=True))


@cache
def _trained(changes: str) -> Trained:
    section = run_config(**json.loads(changes)).ssd_megatron
    top_k = TOP_K * (section.model.total_layers // 2)
    settings = Settings(section.model, section.ssd, top_k, has_experts=True, tokenizer=None)
    return Trained(settings, *run_ranks(1, _compute, json.loads(changes))[0])


@torch.no_grad()
def _compute(
    topology: Topology, settings: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor], Tensor, Tensor]:
    config = run_config(**settings).ssd_megatron
    model = LanguageModel(config, "torch", topology).eval()
    parameters = model.logical_parameters()
    for name, parameter in parameters.items():
        # Not initial values, which hide what they leave at 0 or 1; attention must look at something, too.
        noise = named_normal(f"noise {name}", tuple(parameter.shape), 0)
        parameter.add_(noise, alpha=0.3 if "linear_qkv" in name else 0.1)
    for ffn, top_k in zip(model.ffns.values(), itertools.cycle(TOP_K)):
        values = ffn.router.initial_values(*expert_directions(ffn.bank.rows(), ffn.settings.num_experts))
        for name, parameter in ffn.router.named_parameters():
            parameter.copy_(values[name] + (0 if name == "weight" else 0.5 * named_normal(name, parameter.shape, 0)))
        ffn.router.top_k = top_k
        if ffn.router.kind.by_identity:
            ids = torch.randperm(len(ffn.bank.neuron_ids), generator=torch.Generator().manual_seed(top_k))
            ffn.bank.neuron_ids.copy_(ids)
    neuron_ids = {name: ffn.bank.neuron_ids.clone() for name, ffn in model.ffns.items()}
    fields = _random_fields(config.model)
    inputs = {name: fields[name] for name in model.fields.inputs}
    logits = {}
    for mode in ("dense", "sparse"):
        for ffn in model.ffns.values():
            ffn.mode = "sparse" if mode == "sparse" else "dense"
        logits[mode] = model.logits(tuple(inputs.values())).transpose(0, 1).contiguous()
    tensors = {name: p.clone() for name, p in parameters.items()}
    return tensors, neuron_ids, inputs, logits["dense"], logits["sparse"]


def _random_fields(model: ModelConfig) -> dict[str, Tensor]:
    generator, length = torch.Generator().manual_seed(1), model.seq_length
    return {
        "tokens": torch.randint(0, model.vocab_size, (2, length), generator=generator),
        "position_ids": torch.arange(length).expand(2, -1),
        "token_types": torch.randint(0, max(model.num_token_types, 1), (2, length), generator=generator),
        "decoder_tokens": torch.randint(0, model.vocab_size, (2, model.decoder_seq_length), generator=generator),
    }
