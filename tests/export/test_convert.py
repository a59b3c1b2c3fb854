"""Exported models as transformers runs them, and the way back."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from sentencepiece import SentencePieceTrainer
from tokenizers import processors
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, dynamic_module_utils

from ssd_megatron.data.tokenizers import load_tokenizer
from ssd_megatron.errors import ConfigError, DataError
from ssd_megatron.export import llama, opt, ssd
from ssd_megatron.export.convert import export_model, import_model
from ssd_megatron.export.hf_tokenizer import from_sentencepiece, write_tokenizer
from ssd_megatron.inference.generate import generate
from ssd_megatron.inference.load import load
from ssd_megatron.inference.sampling import Sampling
from ssd_megatron.training.checkpoint_files import CheckpointError
from ssd_megatron.training.checkpoint_tools import consolidate, describe, verify
from ssd_megatron.training.saved_model import Classification, Settings, open_model, write_model
from tests.layouts import TP2_PP2, run_layout
from tests.saved_models import LEARNED, ROPE, TOP_K, Trained, trained
from tests.small_run import Corpus, small_config
from tools import convert_checkpoint as tool

GATED_WITH_BIAS = ROPE | {"add_bias": True, "activation": "swiglu", "tie_embeddings": True, "num_query_groups": 1}
UNTIED = {"activation": "squared_relu", "tie_embeddings": False, "add_bias": False}
DENSE: dict[str, tuple[Any, dict[str, Any]]] = {
    "opt": (opt, LEARNED),
    "opt, untied, squared relu, no bias": (opt, UNTIED),
    "llama": (llama, ROPE),
    "llama with biases": (llama, GATED_WITH_BIAS),
    "llama, heads of an own size": (llama, ROPE | {"kv_channels": 16}),
    "opt, gelu_tanh": (opt, {"activation": "gelu_tanh"}),
}
WIDE = ROPE | {"activation": "geglu_tanh", "num_attention_heads": 6, "kv_channels": 12}
MIXED = {"position_embedding": "rope", "normalization": "layernorm"}


@pytest.fixture(autouse=True)
def own_modules_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))


def hf_logits(folder: Path, tokens: Tensor, mode: str | None = None) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=mode is not None).eval()
    if mode is not None:
        model.set_mode(mode)
    with torch.no_grad():
        logits: Tensor = model(tokens).logits
    return logits


def dense_tensors(expected: Trained) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in expected.tensors.items() if ".router." not in name}


@pytest.mark.parametrize("name", DENSE)
def test_dense_models_are_stock_ones_and_come_back(tmp_path: Path, name: str) -> None:
    kind, settings = DENSE[name]
    expected = trained(**settings)
    there = kind.to_hf(dense_tensors(expected), expected.settings.model)
    back = kind.from_hf(there, expected.settings.model)
    assert back.keys() == dense_tensors(expected).keys()
    assert all(tensor.equal(expected.tensors[name]) for name, tensor in back.items())

    exported, imported = tmp_path / "hf", tmp_path / "ours"
    export_model(open_model(expected.write(tmp_path / "saved")), exported, "dense")
    assert json.loads((exported / "config.json").read_text())["model_type"] == kind.MODEL_TYPE
    torch.testing.assert_close(hf_logits(exported, expected.tokens), expected.dense, rtol=1e-4, atol=1e-4)
    saved = open_model(import_model(exported, imported))
    assert verify(saved.folder) == [] and len(describe(saved.folder)) == 4
    with pytest.raises(CheckpointError, match="holds no exp_avg, only master"):
        consolidate(saved.folder, tmp_path / "out.safetensors", "exp_avg")
    assert saved.shapes.keys() == back.keys()
    assert all(saved.tensor(name).equal(tensor) for name, tensor in back.items())
    torch.testing.assert_close(load(imported)(expected.tokens), expected.dense, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("settings", [MIXED, ROPE | {"normalization": "layernorm"}, UNTIED, WIDE])
def test_sparse_models_run_in_both_modes_from_their_folder_alone(tmp_path: Path, settings: dict[str, Any]) -> None:
    expected = trained(**settings)
    exported = tmp_path / "hf"
    export_model(open_model(expected.write(tmp_path / "saved")), exported, "sparse")
    for mode in ("dense", "sparse"):
        logits = hf_logits(exported, expected.tokens, mode)
        torch.testing.assert_close(logits, getattr(expected, mode), rtol=1e-4, atol=1e-4)
    there = ssd.to_hf(expected.tensors, expected.settings.model)
    back = ssd.from_hf(there, expected.settings.model)
    assert back.keys() == expected.tensors.keys()
    assert all(tensor.equal(expected.tensors[name]) for name, tensor in back.items())
    saved = open_model(import_model(exported, tmp_path / "ours"))
    assert saved.settings.has_experts and saved.settings.top_k == TOP_K
    torch.testing.assert_close(
        load(saved.folder, mode="sparse")(expected.tokens), expected.sparse, rtol=1e-4, atol=1e-4
    )


def test_avg_k_routers_score_by_the_bank(tmp_path: Path) -> None:
    expected = trained()
    s = expected.settings
    routed = replace(s, ssd=s.ssd.model_copy(update={"router_update": "avg_k"}))
    tensors = {name: tensor for name, tensor in expected.tensors.items() if "router" not in name}
    folder = write_model(tmp_path / "saved", routed, tensors.items())
    ours = load(folder, mode="sparse")(expected.tokens)
    export_model(open_model(folder), tmp_path / "hf", "sparse")
    torch.testing.assert_close(hf_logits(tmp_path / "hf", expected.tokens, "sparse"), ours, rtol=1e-4, atol=1e-4)
    assert float((ours - expected.sparse).abs().max()) > 0.01


@pytest.mark.parametrize("router", ["switch", "mlp", "oracle"])
def test_other_routers_choose_alike(tmp_path: Path, router: str) -> None:
    expected = trained(ssd={"router": router})
    export_model(open_model(expected.write(tmp_path / "saved")), tmp_path / "hf", "sparse")
    torch.testing.assert_close(
        hf_logits(tmp_path / "hf", expected.tokens, "sparse"), expected.sparse, rtol=1e-4, atol=1e-4
    )
    imported = load(import_model(tmp_path / "hf", tmp_path / "ours"), mode="sparse")
    torch.testing.assert_close(imported(expected.tokens), expected.sparse, rtol=1e-4, atol=1e-4)


def test_routers_that_stay_here_are_refused_by_name(tmp_path: Path) -> None:
    folder = trained(ssd={"router": "hash"}).write(tmp_path / "saved")
    with pytest.raises(ConfigError, match=r"ssd.router \(hash\) cannot be exported sparse: export .* --mode dense"):
        export_model(open_model(folder), tmp_path / "hf", "sparse")
    assert export_model(open_model(folder), tmp_path / "hf", "dense") == "OPTForCausalLM, float32"


def test_generate_of_transformers_gives_our_tokens(tmp_path: Path, corpus: Corpus) -> None:
    """From a run on four ranks, through its tokenizer, with prompts of different lengths."""
    config = small_config(corpus, tmp_path)
    section = config["ssd_megatron"]
    section["model"] |= {"vocab_size": 520}  # more than the tokenizer's, and padded
    section["ssd"]["phases"] = [{"start_step": 1, "mode": "dense"}, {"start_step": 4, "mode": "sparse"}]
    section["training"] = {"train_steps": 6, "eval_interval": 3, "eval_steps": 1}
    run_dir = run_layout(tmp_path / "four", TP2_PP2, config)
    tokenizer = load_tokenizer(corpus.tokenizer)
    prompts = ["import", "x", "def f(self):"]
    texts = [list(ids) for ids in map(tokenizer.encode, prompts)]
    assert len({len(ids) for ids in texts}) == 3
    for mode in ("dense", "sparse"):
        exported = tmp_path / mode
        assert tool.main(["export", "--from", str(run_dir), "--to", str(exported), "--mode", mode]) == 0
        their_tokenizer = AutoTokenizer.from_pretrained(exported, padding_side="left")
        inputs = their_tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
        model = AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=mode == "sparse").eval()
        theirs = model.generate(**inputs, max_new_tokens=5, do_sample=False)[:, -5:].tolist()
        ours = load(run_dir, mode=mode)
        steps = generate(
            ours,
            texts,
            Sampling(greedy=True),
            5,
            vocab_size=tokenizer.vocab_size,
        )
        assert [list(text) for text in zip(*steps, strict=True)] == theirs
        card = (exported / "README.md").read_text()
        assert "phases, by step: dense 1-3, sparse 4-6" in card and "validation loss at step 6: " in card


def test_the_tokenizer_gives_the_same_ids(tmp_path: Path, corpus: Corpus) -> None:
    s = trained().settings
    folder = write_model(tmp_path / "saved", replace(s, tokenizer=corpus.tokenizer), trained().tensors.items())
    export_model(open_model(folder), tmp_path / "hf", "dense")
    ours, theirs = load_tokenizer(corpus.tokenizer), AutoTokenizer.from_pretrained(tmp_path / "hf")
    for path in sorted(Path(json.__file__).parent.glob("*.py")):
        text = path.read_text()
        assert theirs.encode(text, add_special_tokens=False) == ours.encode(text)
    for text in ("  naïve\t漢字 🙂\n\n x", "", " ", "a  b   c\u2581d"):
        ids = ours.encode(text)
        assert theirs.encode(text, add_special_tokens=False) == ids
        assert theirs.decode(ids) == ours.decode(ids)
    assert theirs.eos_token_id == ours.eod


def test_texts_of_a_gpt_get_no_tokens_that_training_never_saw(tmp_path: Path, corpus: Corpus) -> None:
    """But one from elsewhere keeps what its tokenizer.json adds."""
    with_start = from_sentencepiece(corpus.tokenizer)
    start = with_start.id_to_token(0)
    with_start.post_processor = processors.TemplateProcessing(single=f"{start} $A", special_tokens=[(start, 0)])
    with_start.add_special_tokens(["<|endoftext|>"])
    with_start.save(str(tmp_path / "tokenizer.json"))
    ours = load_tokenizer(tmp_path / "tokenizer.json")
    plain = ours.encode("import os")
    for was_trained_here, expected in ((True, plain), (False, [0, *plain])):
        folder = tmp_path / str(was_trained_here)
        folder.mkdir()
        model = trained().settings.model
        write_tokenizer(ours, tmp_path / "tokenizer.json", folder, model, was_trained_here=was_trained_here)
        assert AutoTokenizer.from_pretrained(folder).encode("import os") == expected


def test_a_failed_export_leaves_nothing_behind(tmp_path: Path, corpus: Corpus) -> None:
    texts = [path.read_text() for path in sorted(Path(json.__file__).parent.glob("*.py"))]
    SentencePieceTrainer.train(
        sentence_iterator=iter(" ".join(texts).splitlines()),
        model_prefix=str(tmp_path / "unigram"),
        model_type="unigram",
        vocab_size=300,
        minloglevel=2,
    )
    saved = open_model(trained().write(tmp_path / "saved"))
    with pytest.raises(ConfigError, match="is not a BPE model"):
        export_model(saved, tmp_path / "hf", "dense", tokenizer=tmp_path / "unigram.model")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["saved", "unigram.model", "unigram.vocab"]
    (tmp_path / "hf" / ".partial" / "of_a_killed_start").mkdir(parents=True)
    with pytest.raises(ConfigError, match="is not a BPE model"):
        export_model(saved, tmp_path / "hf", "dense", tokenizer=tmp_path / "unigram.model")
    assert not any((tmp_path / "hf").iterdir())
    export_model(saved, tmp_path / "hf", "dense", tokenizer=corpus.tokenizer)
    assert (tmp_path / "hf" / "tokenizer.json").exists() and not (tmp_path / "hf" / ".partial").exists()


def test_a_classifier_is_refused(tmp_path: Path) -> None:
    classification = Classification(["a", "b"], ["text", "label"], "train.tsv")
    settings = replace(trained().settings, classification=classification)
    saved = open_model(write_model(tmp_path / "saved", settings, trained().tensors.items()))
    with pytest.raises(ConfigError, match=r"is of a classifier, .*: export the model that it was fine-tuned from"):
        export_model(saved, tmp_path / "hf", "dense")


def test_large_models_are_cut_into_several_files(tmp_path: Path) -> None:
    expected = trained()
    export_model(open_model(expected.write(tmp_path / "saved")), tmp_path / "hf", "dense", shard_bytes=50_000)
    assert len(list((tmp_path / "hf").glob("model-*-of-*.safetensors"))) > 2
    torch.testing.assert_close(hf_logits(tmp_path / "hf", expected.tokens), expected.dense, rtol=1e-4, atol=1e-4)
    saved = open_model(import_model(tmp_path / "hf", tmp_path / "ours"))
    assert saved.tensor("head.norm.bias").equal(expected.tensors["head.norm.bias"])


def test_registered_models_need_no_remote_code(tmp_path: Path) -> None:
    import ssd_megatron.export.register  # noqa: F401

    expected = trained()
    export_model(open_model(expected.write(tmp_path / "saved")), tmp_path / "hf", "sparse", dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    assert type(model).__module__ == "ssd_megatron.export.modeling_ssd"
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    assert all(value.equal(again.state_dict()[name]) for name, value in model.state_dict().items())
    with pytest.raises(ValueError, match=r"mode \(thin\) must be dense or sparse"):
        model.set_mode("thin")


def test_missing_and_unused_tensors_are_errors() -> None:
    expected = trained()
    tensors = dense_tensors(expected)
    tensors["surplus"] = tensors.pop("head.norm.bias")
    with pytest.raises(ConfigError, match=r"missing: head\.norm\.bias; unused: surplus"):
        opt.to_hf(tensors, expected.settings.model)
    theirs = opt.to_hf(dense_tensors(expected), expected.settings.model)
    del theirs["model.decoder.layers.1.fc1.bias"]
    with pytest.raises(ConfigError, match=r"missing: model\.decoder\.layers\.1\.fc1\.bias"):
        opt.from_hf(theirs, expected.settings.model)


def test_what_has_no_stock_equivalent_is_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = trained(**MIXED)
    folder = expected.write(tmp_path / "saved")
    command = ["export", "--from", str(folder), "--to", str(tmp_path / "hf")]
    assert tool.main(command) == 2
    message = capsys.readouterr().err
    assert "model.activation (relu), model.normalization (layernorm), model.position_embedding (rope): no" in message
    assert "OPT needs position_embedding learned; Llama needs normalization rmsnorm, activation reglu or" in message
    assert "use --mode sparse" in message and not (tmp_path / "hf").exists()
    wide = trained(**WIDE).write(tmp_path / "wide")
    assert tool.main(["export", "--from", str(wide), "--to", str(tmp_path / "hf")]) == 2
    assert "Llama needs num_attention_heads that divides hidden_size (32). Nearest" in capsys.readouterr().err
    s = expected.settings
    never = write_model(tmp_path / "never", Settings(s.model, s.ssd, s.top_k, False, None), expected.tensors.items())
    assert tool.main(["export", "--from", str(never), "--to", str(tmp_path / "hf"), "--mode", "sparse"]) == 2
    assert "never formed experts: export it with --mode dense" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gpt2"}, r"model_type \(gpt2\) cannot be imported: opt, llama, bert, t5, ssd_gpt can"),
        ({"do_layer_norm_before": False}, r"do_layer_norm_before \(False\) of this OPT has no equivalent"),
        ({"activation_function": "mish"}, r"activation_function \(mish\) is none of ours: relu, relu2, gelu"),
    ],
)
def test_what_cannot_be_imported_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    export_model(open_model(trained().write(tmp_path / "saved")), tmp_path / "hf", "dense")
    path = tmp_path / "hf" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ConfigError, match=message):
        import_model(tmp_path / "hf", tmp_path / "ours")


@pytest.mark.parametrize("others", [{}, {"head_dim": 16, "hidden_act": "gelu_new"}])
def test_a_model_made_by_transformers_is_imported(tmp_path: Path, others: dict[str, Any]) -> None:
    """Its own config's defaults, its own names; RoPE with another base; heads of an own size."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=99,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        **others,
    )
    theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path / "hf")
    model = load(import_model(tmp_path / "hf", tmp_path / "ours"))
    tokens = torch.randint(0, 99, (2, 20))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), theirs(tokens).logits, rtol=1e-4, atol=1e-4)


def test_a_tokenizer_that_is_larger_than_the_model_is_not_exported(tmp_path: Path, corpus: Corpus) -> None:
    saved = open_model(trained(vocab_size=200).write(tmp_path / "saved"))
    with pytest.raises(DataError, match=r"has 512 tokens, more than model.vocab_size \(200\)"):
        export_model(saved, tmp_path / "hf", "dense", tokenizer=corpus.tokenizer)
