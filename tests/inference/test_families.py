"""BERT and T5 in use: logits of training, tokens and losses of transformers on the exported folder, the tools."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    T5Config,
    T5ForConditionalGeneration,
    pipeline,
)

from ssd_megatron.config.span_sizes import span_sizes
from ssd_megatron.data.tokenizers import load_tokenizer
from ssd_megatron.export.convert import export_model, import_model
from ssd_megatron.inference.bert import fill
from ssd_megatron.inference.evaluate import Variant, evaluate, masked_samples, objective_of
from ssd_megatron.inference.load import load
from ssd_megatron.inference.marks import MarkedTokenizer, bert_tokenizer, t5_tokenizer
from ssd_megatron.inference.sampling import Sampling
from ssd_megatron.inference.text import answer
from ssd_megatron.training.saved_model import open_model, write_model
from tests.saved_models import BERT, T5, T5_11, trained
from tests.small_run import Corpus, small_config, train, write_config
from tools import convert_checkpoint as convert_tool
from tools import evaluate as evaluate_tool
from tools import generate as generate_tool

LENGTH = 24  # of texts, so that prompts fit
MODELS: dict[str, dict[str, Any]] = {
    "bert": BERT,
    "bert, kinds of tokens, sentences, untied, gelu": BERT
    | {"num_token_types": 2, "sentence_objective": "next", "tie_embeddings": False, "activation": "gelu"},
    "bert, rope, norms before": BERT | {"position_embedding": "rope", "norm_position": "pre"},
    "bert, hashed": BERT | {"ssd": {"router": "hash"}},
    "gpt, norms after": {"norm_position": "post"},
    "t5": T5,
    "t5, gated, untied, four decoder layers": T5
    | {"activation": "reglu", "tie_embeddings": False, "num_decoder_layers": 4, "relative_attention_num_buckets": 8},
    "t5 1.1": T5_11,
    "t5, random": T5 | {"ssd": {"router": "random"}},
}


def read(inputs: dict[str, Tensor]) -> list[Tensor]:
    return [tensor for name, tensor in inputs.items() if name != "position_ids"]


@pytest.mark.parametrize("mode", ["dense", "sparse"])
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_training(tmp_path: Path, name: str, mode: Any) -> None:
    expected = trained(**MODELS[name])
    model = load(expected.write(tmp_path), mode=mode)
    torch.testing.assert_close(model(*read(expected.inputs)), getattr(expected, mode), rtol=1e-4, atol=1e-4)
    assert float((expected.dense - expected.sparse).abs().max()) > 0.1


def test_padding_changes_nothing(tmp_path: Path) -> None:
    bert, t5 = trained(**BERT), trained(**T5)
    padding_b = torch.tensor([0, 5])

    def padded(tokens: Tensor) -> Tensor:
        return torch.stack([tokens[0], torch.cat([torch.full((5,), 7), tokens[1, :11]])])

    model = load(bert.write(tmp_path / "bert"), mode="sparse")
    logits = model(padded(bert.tokens), padding_b=padding_b)
    torch.testing.assert_close(logits[0], bert.sparse[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits[1, 5:], model(bert.tokens[1:, :11])[0], rtol=1e-4, atol=1e-4)
    model = load(t5.write(tmp_path / "t5"), mode="sparse")
    decoder_tokens = t5.inputs["decoder_tokens"]
    logits = model.encode(padded(t5.tokens), padding_b)(decoder_tokens)
    torch.testing.assert_close(logits[0], t5.sparse[0], rtol=1e-4, atol=1e-4)
    alone = model(t5.tokens[1:, :11], decoder_tokens[1:])[0]
    torch.testing.assert_close(logits[1], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("settings", [BERT, T5])
def test_bf16_is_near(tmp_path: Path, settings: dict[str, Any]) -> None:
    expected = trained(**settings)
    logits = load(expected.write(tmp_path), dtype=torch.bfloat16, mode="dense")(*read(expected.inputs))
    assert float((logits - expected.dense).norm() / expected.dense.norm()) < 0.03


def test_the_decoder_goes_on_from_its_cache(tmp_path: Path) -> None:
    expected = trained(**T5)
    decoder = load(expected.write(tmp_path), mode="sparse").encode(expected.tokens)
    cache = decoder.new_cache(2, 8)
    parts = [decoder(part, cache) for part in expected.inputs["decoder_tokens"].split([3, 1, 1, 3], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected.sparse, rtol=1e-4, atol=1e-4)


def written(folder: Path, tokenizer: Path, settings: dict[str, Any]) -> Path:
    """A checkpoint with a tokenizer."""
    expected = trained(**settings, seq_length=LENGTH)
    return write_model(folder, replace(expected.settings, tokenizer=tokenizer), expected.tensors.items())


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory, marked_tokenizer: Path) -> Path:
    return written(tmp_path_factory.mktemp("bert"), marked_tokenizer, BERT)


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory, marked_tokenizer: Path) -> Path:
    return written(tmp_path_factory.mktemp("t5"), marked_tokenizer, T5)


def test_masks_are_filled_as_by_transformers(tmp_path: Path, bert: Path, marked_tokenizer: Path) -> None:
    export_model(open_model(bert), tmp_path / "hf", "dense")
    theirs = pipeline("fill-mask", model=str(tmp_path / "hf"), top_k=3)
    tokenizer = bert_tokenizer(load_tokenizer(marked_tokenizer), marked_tokenizer)
    texts = ["import [MASK]", "def f(x): return [MASK] + 1"]
    for text, filled in zip(texts, fill(load(bert, mode="dense"), tokenizer, texts, 3), strict=True):
        expected = theirs(text)
        (guesses,) = filled.guesses
        assert [guess.text.strip() for guess in guesses] == [guess["token_str"].strip() for guess in expected]
        # Theirs has a share for ids that are no tokens.
        ratios = [
            guess.probability / theirs_guess["score"] for guess, theirs_guess in zip(guesses, expected, strict=True)
        ]
        assert ratios == pytest.approx([ratios[0]] * 3, rel=1e-3) and 1 <= ratios[0] < 1.2
        assert filled.text == text.replace(" [MASK]", guesses[0].text)


@pytest.mark.parametrize("start", [None, 7])
def test_generate_of_transformers_gives_our_tokens(tmp_path: Path, marked_tokenizer: Path, start: int | None) -> None:
    t5 = written(tmp_path / "saved", marked_tokenizer, T5 | {"decoder_start_token": start})
    export_model(open_model(t5), tmp_path / "hf", "dense")
    theirs = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "hf").eval()
    their_tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    texts = ["import <extra_id_0> for", "x", "def f(<extra_id_0>): return <extra_id_1>"]
    inputs = their_tokenizer(texts, return_tensors="pt", padding=True)
    outputs = theirs.generate(**inputs, max_new_tokens=8, do_sample=False)
    model = load(t5, mode="dense")
    tokenizer = t5_tokenizer(load_tokenizer(marked_tokenizer), marked_tokenizer, model.config)
    assert outputs[:, 0].tolist() == [tokenizer.eod if start is None else start] * 3
    pieces = list(answer(model, tokenizer, texts, Sampling(greedy=True), 8))
    for number, tokens in enumerate(outputs.tolist()):
        assert "".join(piece.text for piece in pieces if piece.number == number) == answered(tokenizer, tokens)


def answered(tokenizer: MarkedTokenizer, tokens: list[int]) -> str:
    """The text of a decoder's tokens, between its first one and the end of document."""
    said = [*tokens[1:], tokenizer.eod]
    return tokenizer.decode(said[: said.index(tokenizer.eod)])


def test_t5s_made_by_transformers_answer_as_there(tmp_path: Path, marked_tokenizer: Path) -> None:
    """Their decoder begins with the padding, and a text ends with another token."""
    torch.manual_seed(0)
    inner = load_tokenizer(marked_tokenizer)
    sizes = {"vocab_size": 480, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
    theirs = T5ForConditionalGeneration(T5Config(**sizes, eos_token_id=inner.eod, decoder_start_token_id=0)).eval()
    with torch.no_grad():
        theirs.shared.weight.mul_(0.1)  # else a token's own embedding says what follows it: the same token
    theirs.save_pretrained(tmp_path / "hf")
    model = load(import_model(tmp_path / "hf", tmp_path / "ours", marked_tokenizer))
    tokenizer = t5_tokenizer(inner, marked_tokenizer, model.config)
    texts = ["import <extra_id_0> for", "def f(<extra_id_0>): return <extra_id_1>"]
    ours, expected, others = ["", ""], [], []
    for piece in answer(model, tokenizer, texts, Sampling(greedy=True), 8):
        ours[piece.number] += piece.text
    for text in texts:
        tokens = torch.tensor([tokenizer.encode(text)])
        for start, found in ((0, expected), (inner.eod, others)):
            (output,) = theirs.generate(tokens, decoder_start_token_id=start, max_new_tokens=8, do_sample=False)
            found.append(answered(tokenizer, output.tolist()))
    assert theirs.generation_config.decoder_start_token_id == 0
    assert ours == expected and expected != others


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_losses_are_those_of_transformers(tmp_path: Path, family: str, marked_tokenizer: Path) -> None:
    # Without padding of the vocabulary, which has a share of our probabilities.
    settings = (BERT if family == "bert" else T5) | {"vocab_size": 512}
    folder = written(tmp_path / "saved", marked_tokenizer, settings)
    saved, tokenizer = open_model(folder), load_tokenizer(marked_tokenizer)
    tokens = torch.randint(3, 480, (100,), generator=torch.Generator().manual_seed(0)).tolist()
    parts = list(masked_samples(tokens, objective_of(saved, tokenizer, marked_tokenizer)))
    assert len(parts) == 100 // (LENGTH - 2) if family == "bert" else len(parts) > 2
    (score,) = evaluate(load(folder, mode="dense"), parts, [Variant("dense", [], "dense")])
    export_model(saved, tmp_path / "hf", "dense")
    kind = AutoModelForMaskedLM if family == "bert" else AutoModelForSeq2SeqLM
    theirs = kind.from_pretrained(tmp_path / "hf").eval()
    batch = {name: torch.stack([part.fields[name] for part in parts]) for name in parts[0].fields}
    labels = batch["labels"].masked_fill(batch["loss_mask"] == 0, -100)
    inputs = {"input_ids": batch["tokens"], "labels": labels}
    if family == "t5":
        inputs["decoder_input_ids"] = batch["decoder_tokens"]
    with torch.no_grad():
        assert score.loss == pytest.approx(float(theirs(**inputs).loss), rel=1e-5)


def test_marks_are_tokens_that_take_the_space_before_them(marked_tokenizer: Path) -> None:
    inner = load_tokenizer(marked_tokenizer)
    tokenizer = MarkedTokenizer(inner, {"<a>": 7, "<b>": 500}, before=[1], after=[2])
    assert tokenizer.encode("x <a> y<b>") == [1, *inner.encode("x"), 7, *inner.encode(" y"), 500, 2]
    assert tokenizer.decode([*inner.encode("x"), 7, 7, *inner.encode(" y"), 500]) == "x<a><a> y<b>"
    assert tokenizer.vocab_size == 501


def test_the_generate_tool_fills_masks(bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out.json"
    command = ["--checkpoint", str(bert), "--dtype", "fp32", "--mode", "sparse", "--json", str(out)]
    assert generate_tool.main([*command, "--prompt", "import [MASK], x [MASK]", "--guesses", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (record,) = json.loads(out.read_text())
    assert lines[0] == record["filled"][0]["text"] and [len(m) for m in record["filled"][0]["guesses"]] == [2, 2]
    for arguments, message in (
        (["--prompt", "no mask"], "there is nothing to fill in, no [MASK], in 'no mask'"),
        (["--prompt", "[MASK]", "--greedy"], "greedy (True) has no effect with model.family (bert)"),
        (["--prompt", "[MASK]", "--guesses", "0"], "the number of guesses (0) must be between 1 and the"),
        (["--prompt", "[MASK]" * 30], "a text has 32 tokens, but the model's have at most 24"),
    ):
        assert generate_tool.main([*command, *arguments]) == 2
        assert f"error: {message}" in capsys.readouterr().err


def test_all_masked_prompts_are_checked_before_the_first_is_filled_in(
    bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = tmp_path / "prompts.txt"
    lines.write_text("import [MASK]\nno mask\n")
    assert generate_tool.main(["--checkpoint", str(bert), "--prompts", str(lines), "--batch_size", "1"]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and "there is nothing to fill in, no [MASK], in 'no mask'" in printed.err


def test_the_generate_tool_answers(t5: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, lines = tmp_path / "out.json", tmp_path / "prompts.txt"
    lines.write_text("import <extra_id_0>\nx\n")
    command = ["--checkpoint", str(t5), "--dtype", "fp32", "--max_new_tokens", "4", "--json", str(out)]
    assert generate_tool.main([*command, "--prompts", str(lines), "--greedy"]) == 0
    (record,) = json.loads(out.read_text())
    shown = capsys.readouterr().out
    assert len(record["texts"]) == 2 and shown == "".join(f"{text}\n\n" for text in record["texts"])
    assert generate_tool.main([*command, "--prompt", "x", "--top_p", "0.9", "--seed", "3"]) == 0
    assert generate_tool.main([*command, "--prompt", "x", "--guesses", "3"]) == 2
    assert "guesses (3) has no effect with model.family (t5)" in capsys.readouterr().err


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_what_a_run_has_trained_can_be_used(
    tmp_path: Path, family: str, marked_corpus: Corpus, capsys: pytest.CaptureFixture[str]
) -> None:
    """With experts that a switch has formed, and samples as in training; of T5s, such a one as 1.1."""
    run_dir, out = tmp_path / "run", tmp_path / "out.json"
    config = small_config(marked_corpus, run_dir)
    section = config["ssd_megatron"]
    section["model"] |= {"seq_length": LENGTH} | (BERT if family == "bert" else T5_11)
    section["data"] |= {"mask_fraction": 0.2} | ({"whole_words": False} if family == "bert" else {})
    section["ssd"]["phases"] = [{"start_step": 1, "mode": "dense"}, {"start_step": 3, "mode": "sparse"}]
    section["training"] = {"train_steps": 4, "eval_interval": 4, "eval_steps": 1}
    train(write_config(config, tmp_path / "ds.json"))
    command = ["--checkpoint", str(run_dir), "--json", str(out)]
    assert evaluate_tool.main([*command, "--data", str(marked_corpus.prefix), "--max_tokens", "200"]) == 0
    result = json.loads(out.read_text())
    assert [line["mode"] for line in result["results"]] == ["dense", "sparse"]
    per_sample = round(0.2 * (LENGTH - 2)) if family == "bert" else span_sizes(LENGTH, 0.2, 3.0).targets
    assert result["tokens"] == per_sample * result["samples"] > 0
    text = "import [MASK]" if family == "bert" else "import <extra_id_0>"
    options = [] if family == "bert" else ["--max_new_tokens", "5", "--greedy"]
    assert generate_tool.main([*command, "--prompt", text, "--mode", "sparse", "--dtype", "fp32", *options]) == 0
    assert convert_tool.main(["export", "--from", str(run_dir), "--to", str(tmp_path / "hf")]) == 0
    card = (tmp_path / "hf" / "README.md").read_text()
    assert f"A {family.upper()} trained" in card and "phases, by step: dense 1-2, sparse 3-4" in card


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_the_evaluate_tool_masks_texts(
    family: str, bert: Path, t5: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, text = tmp_path / "out.json", tmp_path / "text.txt"
    text.write_text("def f(x):\n    return x + 1\n" * 9)
    command = ["--checkpoint", str(bert if family == "bert" else t5), "--text", str(text), "--json", str(out)]
    assert evaluate_tool.main([*command, "--top_k", "2,8"]) == 0
    result = json.loads(out.read_text())
    dense, two, eight = result["results"]
    assert result["samples"] > 3 and result["tokens"] > result["samples"] and result["bytes"] is None
    assert eight["loss"] == pytest.approx(dense["loss"], rel=1e-5) and abs(two["loss"] - dense["loss"]) > 1e-3
    assert dense["bits_per_byte"] is None and two["loss_above_first_error"] > 0
    capsys.readouterr()
    assert evaluate_tool.main([*command, "--stride", "4"]) == 2
    assert f"stride (4) has no effect with model.family ({family})" in capsys.readouterr().err
    text.write_text("x")
    assert evaluate_tool.main(command) == 2
    assert "tokens to evaluate on, but a sample has" in capsys.readouterr().err
