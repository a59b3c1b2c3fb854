"""BERT against Hugging Face's, on the same weights, in both directions."""

from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, BertForPreTraining

from ssd_megatron.config.model import ModelConfig
from ssd_megatron.errors import ConfigError
from ssd_megatron.export import bert
from ssd_megatron.parallel.topology import Topology
from tests.export.parity import load, logical_tensors, random_model, used_rows
from tests.ranks import run_ranks

DECODER = "cls.predictions.decoder.weight"
BERT = {"family": "bert", "num_attention_heads": 4, "vocab_size": 500}
SETTINGS: dict[str, dict[str, Any]] = {
    "relu": {},
    "gelu, kinds of tokens, untied": {"activation": "gelu", "num_token_types": 2, "tie_embeddings": False},
    "gelu_tanh": {"activation": "gelu_tanh", "kv_channels": 8},
    "sentences": {"num_token_types": 2, "sentence_objective": "next"},
}


def differences(topology: Topology, settings: dict[str, Any]) -> tuple[list[float], float]:
    """Largest difference of logits, ours exported; and of any tensor that was exported and came back."""
    ours, model = random_model(topology, BERT | settings)
    kind = BertForPreTraining if model.predicts_sentences else BertForMaskedLM
    theirs = kind(BertConfig(**bert.config_of(model)))
    tensors = logical_tensors(ours)
    load(theirs, bert.to_hf(tensors, model))
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, model.vocab_size, (3, 11), generator=generator)
    types = torch.randint(0, model.num_token_types or 1, (3, 11), generator=generator)
    inputs = [tokens, torch.arange(11).expand(3, -1), types][: len(ours.fields.inputs)]
    with torch.no_grad():
        mine, expected = ours.logits(tuple(inputs)), theirs(input_ids=tokens, token_type_ids=types)
        outputs = ours.run_stage(tuple(inputs))
    if model.predicts_sentences:
        pairs = [(mine, expected.prediction_logits), (outputs[1], expected.seq_relationship_logits)]
    else:
        pairs = [(mine, expected.logits)]
    pairs[0] = (pairs[0][0].transpose(0, 1)[..., : model.vocab_size], pairs[0][1])
    back = bert.from_hf(theirs.state_dict(), model)
    kept = used_rows(tensors, model)
    assert back.keys() == kept.keys()
    lost = max(float((back[name] - tensor).abs().max()) for name, tensor in kept.items())
    return [float((a - b).abs().max()) for a, b in pairs], lost


@pytest.mark.parametrize("name", SETTINGS)
def test_logits_are_those_of_hugging_face(name: str) -> None:
    ((logits, lost),) = run_ranks(1, differences, SETTINGS[name])
    assert max(logits) < 1e-4 and lost == 0.0, (logits, lost)


def config(**settings: Any) -> ModelConfig:
    sizes = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "seq_length": 8, "vocab_size": 20}
    return ModelConfig(**{"family": "bert", **sizes, **settings})


@pytest.mark.parametrize(
    ("settings", "needed"),
    [
        ({"norm_position": "pre"}, "norm_position post"),
        ({"activation": "reglu"}, "activation relu or squared_relu or gelu or gelu_tanh or silu"),
        ({"num_query_groups": 1}, "num_query_groups 2"),
        ({"kv_channels": 6}, "kv_channels None or 4"),
    ],
)
def test_models_that_are_no_bert_are_known(settings: dict[str, Any], needed: str) -> None:
    assert bert.conflicts(config()) == bert.conflicts(config(kv_channels=4)) == []
    assert bert.conflicts(config(**settings)) == [needed]


def test_tensors_that_are_missing_or_superfluous_are_named() -> None:
    model = config()
    theirs = BertForMaskedLM(BertConfig(**bert.config_of(model))).state_dict()
    theirs["bert.embeddings.token_type_embeddings.weight"] *= 0
    tensors = bert.from_hf(theirs, model)
    with pytest.raises(ConfigError, match=r"missing: blocks.0.layer.mlp.bank.b_in$"):
        bert.to_hf({name: t for name, t in tensors.items() if not name.endswith("b_in")}, model)
    with pytest.raises(ConfigError, match=r"unused: blocks.1.x$"):
        bert.to_hf(tensors | {"blocks.1.x": torch.zeros(1)}, model)
    with pytest.raises(ConfigError, match=r"missing: cls.predictions.bias$"):
        bert.from_hf({name: t for name, t in theirs.items() if name != "cls.predictions.bias"}, model)
    with pytest.raises(ConfigError, match=r"decoder.weight differs from .*word_embeddings.weight, whose copy it is"):
        bert.from_hf(theirs | {DECODER: torch.ones(20, 8)}, model)
    with pytest.raises(ConfigError, match=r"is not 0 throughout"):
        bert.from_hf(theirs | {"bert.embeddings.token_type_embeddings.weight": torch.ones(1, 8)}, model)
    words = torch.ones(21, 8)
    with pytest.raises(ConfigError, match=r"has 21 rows, but model.vocab_size is 20"):
        bert.from_hf(theirs | dict.fromkeys(("bert.embeddings.word_embeddings.weight", DECODER), words), model)
