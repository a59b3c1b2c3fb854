"""BERT and T5 as folders that transformers loads, and back."""

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel

from ssd_megatron.data.masking import marker_ids
from ssd_megatron.data.tokenizers import load_tokenizer
from ssd_megatron.errors import ConfigError
from ssd_megatron.export.convert import export_model, import_model
from ssd_megatron.export.hf_folder import read_tensors, write_json, write_tensors
from ssd_megatron.export.model_card import USE
from ssd_megatron.inference.load import load
from ssd_megatron.training.saved_model import is_router, open_model, write_model
from tests.saved_models import BERT, EXACT_T5, T5, T5_11, Trained, trained
from tools import convert_checkpoint as tool

KINDS = {"num_token_types": 2, "tie_embeddings": False, "activation": "gelu"}
PAIRS = {"num_token_types": 2, "sentence_objective": "next"}
MODELS = {
    "bert": BERT,
    "bert, kinds of tokens, untied": BERT | KINDS,
    "bert, sentences": BERT | PAIRS,
    "t5": EXACT_T5,
    "t5 1.1": T5_11 | {"decoder_start_token": 0},
    "t5, gated, untied": EXACT_T5 | {"activation": "reglu", "tie_embeddings": False},
}


def load_theirs(folder: Path) -> PreTrainedModel:
    """As transformers loads it; every tensor must be in the folder, and each of the folder must be used."""
    (architecture,) = json.loads((folder / "config.json").read_text())["architectures"]
    model, info = getattr(transformers, architecture).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    model.eval()
    return model


@torch.no_grad()
def their_logits(folder: Path, expected: Trained) -> Tensor:
    names = {"tokens": "input_ids", "token_types": "token_type_ids", "decoder_tokens": "decoder_input_ids"}
    inputs = {names[name]: tensor for name, tensor in expected.inputs.items() if name in names}
    outputs = load_theirs(folder)(**inputs)
    logits: Tensor = outputs.prediction_logits if "prediction_logits" in outputs else outputs.logits
    return logits


@pytest.mark.parametrize("name", MODELS)
def test_models_load_in_transformers_and_come_back_bit_by_bit(tmp_path: Path, name: str) -> None:
    expected = trained(**MODELS[name])
    export_model(open_model(expected.write(tmp_path / "saved")), tmp_path / "hf", "dense")
    torch.testing.assert_close(their_logits(tmp_path / "hf", expected), expected.dense[..., :500], rtol=1e-4, atol=1e-4)
    saved = open_model(import_model(tmp_path / "hf", tmp_path / "ours"))
    ours, back = expected.settings.model, saved.settings.model
    of_vocabulary = {"make_vocab_size_divisible_by": 4}  # nothing is padded
    unsaid = {"decoder_seq_length": back.decoder_seq_length, "dropout": back.dropout, "init_std": back.init_std}
    assert back == ours.model_copy(update=of_vocabulary | unsaid)
    dense = {name: tensor for name, tensor in expected.tensors.items() if not is_router(name)}
    assert saved.shapes.keys() == dense.keys()
    for tensor_name, tensor in dense.items():
        assert saved.tensor(tensor_name).equal(tensor[:500]), tensor_name


def test_other_sizes_of_t5_come_back_to_the_last_bit(tmp_path: Path) -> None:
    expected = trained(**T5, decoder_start_token=7)
    export_model(open_model(expected.write(tmp_path / "saved")), tmp_path / "hf", "dense")
    torch.testing.assert_close(their_logits(tmp_path / "hf", expected), expected.dense[..., :500], rtol=1e-4, atol=1e-4)
    saved = open_model(import_model(tmp_path / "hf", tmp_path / "ours"))
    for name in saved.shapes:
        torch.testing.assert_close(saved.tensor(name), expected.tensors[name][:500], rtol=2**-23, atol=0)


def test_models_made_by_transformers_come_back(tmp_path: Path) -> None:
    """With their defaults, and the names of older folders."""
    torch.manual_seed(0)
    bert = transformers.BertConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48
    )
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 48, "num_layers": 1, "num_decoder_layers": 2, "num_heads": 4}
    t5 = transformers.T5Config(vocab_size=99, decoder_start_token_id=0, **sizes)
    old = {
        "bert": {"bert.embeddings.position_ids": torch.arange(512)},
        "t5": {"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight": torch.zeros(32, 4)},
    }
    for model in (transformers.BertForPreTraining(bert), transformers.T5ForConditionalGeneration(t5)):
        kind = model.config.model_type
        first, again = tmp_path / kind, tmp_path / f"{kind} again"
        model.save_pretrained(first)
        theirs = read_tensors(first)
        older = {name.replace("LayerNorm.weight", "LayerNorm.gamma"): tensor for name, tensor in theirs.items()}
        write_tensors(first, older | old[kind])
        export_model(open_model(import_model(first, tmp_path / f"our {kind}")), again, "dense")
        back = load_theirs(again).state_dict()
        assert all(tensor.equal(back[name]) for name, tensor in theirs.items())


def test_t5_11_as_it_was_published_comes_and_goes(tmp_path: Path) -> None:
    """Heads that are not as wide as the model together, the approximate gated GELU, a head of its own."""
    torch.manual_seed(0)
    said: dict[str, Any] = {"d_model": 32, "d_kv": 64, "d_ff": 48, "num_layers": 2, "num_heads": 3, "vocab_size": 99}
    said |= {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "decoder_start_token_id": 0}
    theirs = transformers.T5ForConditionalGeneration(transformers.T5Config(**said)).eval()
    theirs.lm_head.weight = nn.Parameter(torch.randn(99, 32))  # this version of transformers ties them all the same
    (tmp_path / "hf").mkdir()
    write_tensors(tmp_path / "hf", {name: t for name, t in theirs.state_dict().items() if "embed_tokens" not in name})
    write_json(tmp_path / "hf" / "config.json", said | {"model_type": "t5"})
    imported = import_model(tmp_path / "hf", tmp_path / "ours")
    model = open_model(imported).settings.model
    assert (model.kv_channels, model.activation, model.tie_embeddings) == (64, "geglu_tanh", False)
    tokens, decoder_tokens = torch.randint(0, 99, (2, 20)), torch.randint(0, 99, (2, 8))
    with torch.no_grad():
        expected = theirs(input_ids=tokens, decoder_input_ids=decoder_tokens).logits
        torch.testing.assert_close(load(imported)(tokens, decoder_tokens), expected, rtol=1e-4, atol=1e-4)
    export_model(open_model(imported), tmp_path / "again", "dense")
    back = read_tensors(tmp_path / "again")
    assert all(tensor.equal(back[name]) for name, tensor in read_tensors(tmp_path / "hf").items())
    assert json.loads((tmp_path / "again" / "config.json").read_text()).items() >= said.items()


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        (BERT, {"is_decoder": True}, r"is_decoder \(True\) of this BERT has no equivalent here: False has"),
        (
            BERT,
            {"hidden_act": "gelu_10"},
            r"hidden_act \(gelu_10\) is none of ours: relu, relu2, gelu, gelu_pytorch_tanh, silu, gelu_new are",
        ),
        (
            EXACT_T5,
            {"feed_forward_proj": "gated-gelu_10"},
            r"feed_forward_proj \(gated-gelu_10\) is none of ours: relu, gelu",
        ),
        (
            EXACT_T5,
            {"decoder_start_token_id": None},
            r"decoder_start_token_id \(missing or null\) of this T5 must be the token that its decoder begins with",
        ),
        (EXACT_T5, {"decoder_start_token_id": 500}, r"decoder_start_token_id \(500\) .* below vocab_size \(500\)"),
        (BERT, {"num_hidden_layers": 3}, r"missing: bert.encoder.layer.2.attention.self.query.weight"),
        (EXACT_T5, {"num_layers": 1}, r"unused: encoder.block.1.layer.0.SelfAttention.k.weight"),
    ],
)
def test_what_cannot_be_imported_is_refused_by_name(
    tmp_path: Path, family: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    export_model(open_model(trained(**family).write(tmp_path / "saved")), tmp_path / "hf", "dense")
    path = tmp_path / "hf" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ConfigError, match=message):
        import_model(tmp_path / "hf", tmp_path / "ours")


def test_what_cannot_be_exported_is_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = trained(**BERT, activation="reglu").write(tmp_path / "saved")
    command = ["export", "--from", str(folder), "--to", str(tmp_path / "hf")]
    assert tool.main(command) == 2
    message = capsys.readouterr().err
    assert "model.activation (reglu): no stock model" in message and "Nearest that works: train with" in message
    assert tool.main([*command, "--mode", "sparse"]) == 2
    message = capsys.readouterr().err
    assert "model.family (bert), model.norm_position (post) cannot be exported sparse: export" in message


@pytest.mark.parametrize(("family", "start"), [("gpt", "Once upon a time"), ("bert", "0."), ("t5", "</s>")])
def test_the_card_of_a_folder_runs(
    tmp_path: Path,
    family: str,
    start: str,
    marked_tokenizer: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    expected = trained(**{"gpt": {"seq_length": 32}, "bert": BERT, "t5": T5}[family])
    settings = replace(expected.settings, tokenizer=marked_tokenizer)
    folder = write_model(tmp_path / "saved", settings, expected.tensors.items())
    assert tool.main(["export", "--from", str(folder), "--to", str(tmp_path / "hf")]) == 0
    card = (tmp_path / "hf" / "README.md").read_text()
    assert USE[family, "dense"] in card
    monkeypatch.chdir(tmp_path / "hf")
    capsys.readouterr()
    exec(USE[family, "dense"].replace("max_new_tokens=50", "max_new_tokens=5"), {})
    assert capsys.readouterr().out.startswith(start)


def test_texts_get_the_markers_of_training(tmp_path: Path, marked_tokenizer: Path) -> None:
    ours = load_tokenizer(marked_tokenizer)
    mask, cls, sep = marker_ids(ours, marked_tokenizer).values()
    ids = {}
    for family, settings in (("bert", BERT | PAIRS), ("t5", T5)):
        saved = open_model(trained(**settings).write(tmp_path / f"saved {family}"))
        export_model(saved, tmp_path / family, "dense", tokenizer=marked_tokenizer)
        theirs = AutoTokenizer.from_pretrained(tmp_path / family)
        text = "import [MASK] for" if family == "bert" else "import <extra_id_0> for"
        ids[family] = [theirs(text), theirs(text, "x")]
    # The space before a mark belongs to what it stands for.
    before, after, second = ours.encode("import"), ours.encode(" for"), ours.encode("x")
    first = [cls, *before, mask, *after, sep]
    assert ids["bert"][0]["input_ids"] == first and ids["bert"][1]["input_ids"] == [*first, *second, sep]
    assert ids["bert"][1]["token_type_ids"] == [0] * len(first) + [1] * (len(second) + 1)
    first = [*before, ours.find("<extra_id_0>"), *after, ours.eod]
    assert ids["t5"][0] == {"input_ids": first, "attention_mask": [1] * len(first)}
    assert ids["t5"][1]["input_ids"] == [*first, *second, ours.eod]


@pytest.mark.parametrize("start", [None, 0])
def test_t5_keeps_its_first_decoder_token(tmp_path: Path, marked_tokenizer: Path, start: int | None) -> None:
    """Or, without one of its own, says the one that training and generation take: the end of document."""
    expected = trained(**EXACT_T5 | {"decoder_start_token": start})
    saved = open_model(expected.write(tmp_path / "saved"))
    export_model(saved, tmp_path / "hf", "dense", tokenizer=marked_tokenizer)
    token = load_tokenizer(marked_tokenizer).eod if start is None else start
    imported = open_model(import_model(tmp_path / "hf", tmp_path / "ours"))
    assert imported.settings.model.decoder_start_token == token
    export_model(imported, tmp_path / "again", "dense")
    for folder, file in itertools.product(("hf", "again"), ("config.json", "generation_config.json")):
        assert json.loads((tmp_path / folder / file).read_text())["decoder_start_token_id"] == token


def test_sentinels_without_names_get_them(tmp_path: Path, corpus: Any) -> None:
    """The first is the last id of the model's vocabulary, as in training."""
    expected = trained(**T5 | {"vocab_size": 515})
    saved = open_model(expected.write(tmp_path / "saved"))
    export_model(saved, tmp_path / "hf", "dense", tokenizer=corpus.tokenizer)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert [tokenizer.convert_tokens_to_ids(f"<extra_id_{n}>") for n in range(3)] == [514, 513, 512]
