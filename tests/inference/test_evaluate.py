"""Loss on texts: every token once, all modes on the same windows, intervals that hold."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from ssd_megatron.data.tokenizers import load_tokenizer
from ssd_megatron.inference.evaluate import Variant, evaluate, half_interval, windows
from ssd_megatron.inference.load import load
from ssd_megatron.training.saved_model import write_model
from tests.saved_models import TOP_K, trained
from tests.small_run import Corpus
from tools import evaluate as tool


@pytest.mark.parametrize(
    ("number", "length", "stride"), [(40, 17, 8), (17, 17, 8), (18, 17, 16), (2, 17, 8), (33, 5, 1)]
)
def test_every_token_but_the_first_counts_once(number: int, length: int, stride: int) -> None:
    parts = list(windows(range(number), length, stride))
    assert [token for part in parts for token in part.tokens[part.first :]] == list(range(1, number))
    assert all(part.first >= length - stride for part in parts[1:])
    assert all(len(part.tokens) <= length for part in parts)


def test_nothing_to_predict_gives_no_window() -> None:
    assert list(windows([5], 17, 8)) == []


def test_scores_are_the_losses_of_training(tmp_path: Path) -> None:
    expected = trained()
    model = load(expected.write(tmp_path))
    variants = [Variant("dense", [], "dense"), Variant("sparse", TOP_K, "sparse"), Variant("sparse", [8, 8], "all")]
    parts = [part for tokens in expected.tokens.tolist() for part in windows(tokens, 16, 8)]
    dense, sparse, everything = evaluate(model, parts, variants)
    for score, logits in ((dense, expected.dense), (sparse, expected.sparse), (everything, expected.dense)):
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), expected.tokens[:, 1:].flatten())
        assert score.loss == pytest.approx(float(loss), rel=1e-5)
    assert sparse.difference(dense)[0] == pytest.approx(sparse.loss - dense.loss)
    assert everything.difference(dense)[0] == pytest.approx(0.0, abs=1e-5)


def test_intervals_hold_the_mean_in_95_of_100_draws() -> None:
    generator = torch.Generator().manual_seed(0)
    hits, draws = 0, 400
    for _ in range(draws):
        counts = torch.randint(5, 50, (60,), generator=generator).double()
        sums = counts * (3.0 + torch.randn(60, generator=generator, dtype=torch.float64))
        hits += abs(float(sums.sum() / counts.sum()) - 3.0) < half_interval(sums, counts)
    assert 0.91 < hits / draws < 0.99
    assert math.isnan(half_interval(torch.ones(1), torch.ones(1)))


def test_the_tool_compares_modes_and_top_k(
    tmp_path: Path, corpus: Corpus, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    s = replace(trained().settings, tokenizer=corpus.tokenizer)
    folder = write_model(tmp_path / "saved", s, trained().tensors.items())
    text = tmp_path / "text.txt"
    text.write_text("def naïve(x):\n    return x + 1\n" * 5)
    out = tmp_path / "out.json"
    command = ["--checkpoint", str(folder), "--json", str(out)]
    assert tool.main([*command, "--text", str(text), "--top_k", "2,8"]) == 0
    shown, result = capsys.readouterr().out, json.loads(out.read_text())
    assert "sparse, top_k 2" in shown and "loss above dense" in shown
    dense, two, eight = result["results"]
    ids = load_tokenizer(corpus.tokenizer).encode(text.read_text())
    assert result["tokens"] == len(ids) and result["bytes"] == len(text.read_text().encode())
    assert eight["loss"] == pytest.approx(dense["loss"], rel=1e-5) and abs(two["loss"] - dense["loss"]) > 1e-3
    assert dense["bits_per_byte"] == pytest.approx(dense["loss"] * len(ids) / result["bytes"] / math.log(2))
    assert two["perplexity"] == pytest.approx(math.exp(two["loss"]))
    low, high = two["perplexity_interval"]
    assert math.log(high / low) == pytest.approx(2 * two["loss_error"])

    assert tool.main([*command, "--data", str(corpus.prefix), "--max_tokens", "100", "--mode", "sparse"]) == 0
    result = json.loads(out.read_text())
    assert result["tokens"] == 100 and [r["top_k"] for r in result["results"]] == [TOP_K]
    for wrong, message in (
        (["--window", "17"], "window (17) exceeds the model's learned positions: use at most model.seq_length (16)"),
        (["--mode", "dense", "--top_k", "2"], "top_k (2) has no effect without mode sparse"),
        (["--top_k", "2,"], "top_k (2,) must be numbers with commas between them"),
        (["--window", "0"], "window (0) must be at least 1"),
    ):
        assert tool.main([*command, "--text", str(text), *wrong]) == 2
        assert message in capsys.readouterr().err


def test_the_tool_wants_the_tokenizer_of_the_model_and_of_the_corpus(
    tmp_path: Path, corpus: Corpus, marked_corpus: Corpus, capsys: pytest.CaptureFixture[str]
) -> None:
    s = replace(trained().settings, tokenizer=corpus.tokenizer)
    command = ["--checkpoint", str(write_model(tmp_path / "saved", s, trained().tensors.items()))]
    few = ["--max_tokens", "64"]
    assert tool.main([*command, *few, "--data", str(marked_corpus.prefix)]) == 2
    assert f"{marked_corpus.prefix} was made with the tokenizer {marked_corpus.tokenizer}" in capsys.readouterr().err
    prefix = tmp_path / "c"
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)  # by others, without a record
    builder.add_document(np.array([5, 512], dtype=np.uint16), [2])
    builder.finalize(f"{prefix}.idx")
    assert tool.main([*command, "--data", str(prefix)]) == 2
    assert (
        f"{prefix}.bin has token ids from 5 to 512, but the tokenizer has only the ids 0 to" in capsys.readouterr().err
    )
    small = trained(vocab_size=200)
    folder = write_model(tmp_path / "small", small.settings, small.tensors.items())
    tokenizer = ["--tokenizer", str(corpus.tokenizer)]
    assert tool.main(["--checkpoint", str(folder), *tokenizer, *few, "--data", str(corpus.prefix)]) == 2
    assert "has 512 tokens, more than model.vocab_size (200)" in capsys.readouterr().err


def test_the_tool_runs_tiles_dense(tmp_path: Path, corpus: Corpus, capsys: pytest.CaptureFixture[str]) -> None:
    tiles = trained(ssd={"routing_granularity": 4})
    folder = write_model(tmp_path, replace(tiles.settings, tokenizer=corpus.tokenizer), tiles.tensors.items())
    out = tmp_path / "out.json"
    command = ["--checkpoint", str(folder), "--data", str(corpus.prefix), "--max_tokens", "64", "--json", str(out)]
    assert tool.main(command) == 0
    assert [line["mode"] for line in json.loads(out.read_text())["results"]] == ["dense"]
    for mode in ("sparse", "dense,sparse"):
        assert tool.main([*command, "--mode", mode]) == 2
        message = "mode (sparse) cannot run this model's ssd.routing_granularity (4): use dense"
        assert message in capsys.readouterr().err
