"""T5 against Hugging Face's, on the same weights, in both directions."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

from ssd_megatron.config.model import ModelConfig
from ssd_megatron.export import t5
from ssd_megatron.parallel.topology import Topology
from tests.export.parity import load, logical_tensors, random_model, used_rows
from tests.ranks import run_ranks

T5 = {"family": "t5", "num_attention_heads": 4, "vocab_size": 500, "seq_length": 40, "decoder_seq_length": 12}
SETTINGS: dict[str, dict[str, Any]] = {
    "relu, tied": {},
    "gated, untied, three decoder layers": {"activation": "reglu", "tie_embeddings": False, "num_decoder_layers": 3},
    "heads of an own size, gated-gelu, untied": {
        "num_attention_heads": 6,
        "kv_channels": 16,
        "activation": "geglu_tanh",
        "tie_embeddings": False,
    },
    "gelu_tanh, tied": {"activation": "gelu_tanh", "kv_channels": 4},
    "few buckets": {"relative_attention_num_buckets": 8, "relative_attention_max_distance": 20},
}


def differences(topology: Topology, settings: dict[str, Any]) -> tuple[float, float]:
    """Largest difference of logits, ours exported; and of any tensor that was exported and came back."""
    ours, model = random_model(topology, T5 | settings)
    theirs = T5ForConditionalGeneration(T5Config(**t5.config_of(model)))
    tensors = logical_tensors(ours)
    if not model.tie_embeddings:  # this version of transformers ties them all the same
        theirs.lm_head.weight = nn.Parameter(theirs.lm_head.weight.detach().clone())
    load(theirs, t5.to_hf(tensors, model))
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, model.vocab_size, (3, 40), generator=generator)
    decoder_tokens = torch.randint(0, model.vocab_size, (3, 12), generator=generator)
    with torch.no_grad():
        mine = ours.logits((tokens, decoder_tokens))
        expected = theirs(input_ids=tokens, decoder_input_ids=decoder_tokens).logits
    back = t5.from_hf(theirs.state_dict(), model)
    kept = used_rows(tensors, model)
    assert back.keys() == kept.keys()
    lost = max(float((back[name] - tensor).abs().max()) for name, tensor in kept.items())
    return float((mine.transpose(0, 1)[..., : model.vocab_size] - expected).abs().max()), lost


@pytest.mark.parametrize("name", SETTINGS)
def test_logits_are_those_of_hugging_face(name: str) -> None:
    ((logits, lost),) = run_ranks(1, differences, SETTINGS[name])
    assert logits < 1e-4 and lost < 1e-6, (logits, lost)


@pytest.mark.parametrize("activation", ["squared_relu", "geglu"])
def test_models_that_are_no_t5_are_known(activation: Any) -> None:
    """Exact GELU with a gate among them: T5's gated-gelu is the approximate one."""
    sizes = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "seq_length": 16, "vocab_size": 20}
    model = ModelConfig(family="t5", activation=activation, **sizes)
    assert t5.conflicts(model) == ["activation relu or gelu or gelu_tanh or silu or reglu or geglu_tanh or swiglu"]
