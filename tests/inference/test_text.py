"""Texts: whole characters, stop strings, batches of prompts of different lengths, and the tool."""

import json
from pathlib import Path

import pytest
import torch

from ssd_megatron.data.tokenizers import Tokenizer, load_tokenizer
from ssd_megatron.errors import ConfigError
from ssd_megatron.inference.generate import generate
from ssd_megatron.inference.load import load
from ssd_megatron.inference.model import CausalModel
from ssd_megatron.inference.sampling import Sampling
from ssd_megatron.inference.text import TextStream, complete
from ssd_megatron.training.saved_model import Settings, write_model
from tests.saved_models import trained
from tests.small_run import Corpus
from tools import generate as tool

GREEDY = Sampling(greedy=True)
PROMPTS = [[5, 9, 300], [17], [400, 3, 8, 8, 1]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, corpus: Corpus) -> Path:
    s = trained().settings
    settings = Settings(s.model, s.ssd, s.top_k, True, corpus.tokenizer)
    return write_model(tmp_path_factory.mktemp("model"), settings, trained().tensors.items())


@pytest.fixture(scope="module")
def model(folder: Path) -> CausalModel:
    return load(folder, mode="sparse")


@pytest.fixture(scope="module")
def tokenizer(corpus: Corpus) -> Tokenizer:
    return load_tokenizer(corpus.tokenizer)


def test_batches_give_the_tokens_of_each_prompt_alone(model: CausalModel) -> None:
    together = list(generate(model, PROMPTS, GREEDY, 8))
    for text, prompt in enumerate(PROMPTS):
        tokens = list(prompt)
        for _ in range(8):  # without a cache
            tokens.append(int(model(torch.tensor([tokens]), last_only=True)[0, 0, :512].argmax()))
        assert [step[text] for step in together] == tokens[len(prompt) :]


def test_a_seed_gives_the_same_text_and_the_penalty_new_tokens(model: CausalModel) -> None:
    first, again, other = (list(generate(model, PROMPTS, Sampling(seed=seed), 6)) for seed in (1, 1, 2))
    assert first == again != other
    penalized = [step[0] for step in generate(model, PROMPTS[:1], Sampling(greedy=True, repetition_penalty=100.0), 10)]
    assert len(set(penalized) | set(PROMPTS[0])) == 10 + 3


def test_texts_end_at_their_last_token(model: CausalModel) -> None:
    free = [step[0] for step in generate(model, PROMPTS[:1], GREEDY, 6)]
    assert list(generate(model, PROMPTS[:1], GREEDY, 6, eod=free[2])) == [
        [token] for token in free[: free.index(free[2]) + 1]
    ]
    both = list(generate(model, PROMPTS[:2], GREEDY, 6, eod=free[0]))
    assert both[0][0] == free[0] and all(step[0] is None for step in both[1:])


def test_no_token_beyond_the_vocabulary_is_chosen(model: CausalModel) -> None:
    for sampling in (Sampling(), Sampling(repetition_penalty=1.5)):
        steps = list(generate(model, [[400, 1]], sampling, 10, vocab_size=3))
        assert all(step[0] is not None and step[0] < 3 for step in steps)


def test_prompts_must_fit_learned_positions(model: CausalModel) -> None:
    with pytest.raises(ConfigError, match=r"max_new_tokens \(12\) after a prompt of 5 tokens.*use at most 11"):
        next(generate(model, PROMPTS, GREEDY, 12))


def test_pieces_are_whole_characters_and_make_up_the_text(tokenizer: Tokenizer) -> None:
    text = "naïve 漢字 🙂 x\n\ty  z"
    ids = tokenizer.encode(text)
    assert len(ids) > len(text)  # characters out of the vocabulary are several bytes
    stream = TextStream(tokenizer, tokenizer.encode("é"))
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) + stream.finish() == text
    assert not any("\ufffd" in piece for piece in pieces)
    cut = TextStream(tokenizer)
    assert "".join(cut.push(token) for token in tokenizer.encode("a🙂")[:-1]) + cut.finish() == tokenizer.decode(
        tokenizer.encode("a🙂")[:-1]
    )


def test_stop_strings_end_the_text_and_are_never_shown_in_part(tokenizer: Tokenizer) -> None:
    stream, shown = TextStream(tokenizer, stop=["END", "##"]), ""
    for token in tokenizer.encode("an E, an EN, a #, the END of it"):
        shown += stream.push(token)
        assert "an E, an EN, a #, the ".startswith(shown)
        if stream.stopped:
            break
    assert stream.stopped and shown == "an E, an EN, a #, the " and stream.finish() == ""
    unfinished = TextStream(tokenizer, stop=["END"])
    assert "".join(unfinished.push(token) for token in tokenizer.encode("the EN")) == "the "
    assert unfinished.finish() == "EN"


def test_complete_gives_every_text_once(model: CausalModel, tokenizer: Tokenizer) -> None:
    prompts = ["def f(", "", "import os"]
    pieces = list(complete(model, tokenizer, prompts, GREEDY, 5))
    assert sorted(piece.number for piece in pieces if piece.ended) == [0, 1, 2]
    for index, prompt in enumerate(prompts):
        ids = tokenizer.encode(prompt) or [tokenizer.eod]
        tokens = [step[0] for step in generate(model, [ids], GREEDY, 5, eod=tokenizer.eod)]
        kept = [token for token in tokens if token is not None and token != tokenizer.eod]
        text = tokenizer.decode([*ids[-1:], *kept])[len(tokenizer.decode(ids[-1:])) :]
        assert "".join(piece.text for piece in pieces if piece.number == index) == text


def test_the_tool_streams_and_writes_json(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.json"
    common = ["--checkpoint", str(folder), "--max_new_tokens", "4", "--greedy", "--dtype", "fp32"]
    assert tool.main([*common, "--prompt", "def", "--mode", "sparse", "--json", str(out)]) == 0
    printed = capsys.readouterr()
    record = json.loads(out.read_text())[0]
    assert printed.out == f"def{record['texts'][0]}\n" and record["tokens"] == [4]
    assert "4 tokens," in printed.err and record["seconds"] >= record["seconds_to_first_text"] > 0

    lines = tmp_path / "prompts.txt"
    lines.write_text("def\nimport os\n")
    assert tool.main([*common, "--prompts", str(lines), "--mode", "sparse"]) == 0
    assert f"def{record['texts'][0]}\n" in capsys.readouterr().out
    answers = iter(["def"])
    monkeypatch.setattr("builtins.input", lambda _: next(answers, None) or (_ for _ in ()).throw(EOFError))
    assert tool.main([*common, "--mode", "sparse"]) == 0
    assert capsys.readouterr().out == printed.out
    for wrong, message in (
        (["--prompt", "x", "--top_p", "0.5"], "top_p (0.5) has no effect with greedy"),
        (["--prompt", "x", "--mode", "dense", "--top_k", "2"], "top_k (2.0) has no effect without mode sparse"),
        (["--prompt", "x", "--no_graphs"], "no_graphs (True) has no effect on a CPU"),
        (["--prompts", str(lines), "--batch_size", "0"], "batch_size (0) must be at least 1"),
    ):
        assert tool.main([*common, *wrong]) == 2
        assert message in capsys.readouterr().err


def test_the_tool_checks_all_prompts_of_a_file_before_the_first(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines, out = tmp_path / "prompts.txt", tmp_path / "out.json"
    command = ["--checkpoint", str(folder), "--greedy", "--prompts", str(lines), "--batch_size", "1"]
    lines.write_text("def\n" + "漢字" * 9 + "\n")
    assert tool.main(command) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and "learned positions: use a shorter prompt" in printed.err
    lines.write_bytes(b"def\n\xff\n")
    assert tool.main(command) == 2
    assert f"error: {lines} is not UTF-8: invalid start byte" in capsys.readouterr().err
    lines.write_text("a\x0cb\u2028c\r\n\nx", newline="")
    assert tool.main([*command, "--max_new_tokens", "1", "--json", str(out)]) == 0
    assert [record["prompts"] for record in json.loads(out.read_text())] == [["a\x0cb\u2028c"], [""], ["x"]]


def test_a_typed_prompt_that_is_refused_does_not_end_the_session(
    folder: Path,
    tokenizer: Tokenizer,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    typed, out = iter(["漢字" * 9, "def"]), tmp_path / "out.json"
    monkeypatch.setattr("builtins.input", lambda _: next(typed, None) or (_ for _ in ()).throw(EOFError))
    assert tool.main(["--checkpoint", str(folder), "--seed", "1", "--json", str(out)]) == 0
    printed = capsys.readouterr()
    assert printed.err.startswith("error: max_new_tokens (1) after a prompt of") and printed.out.startswith("def")
    (record,) = json.loads(out.read_text())
    ended = record["tokens"][0] + len(tokenizer.encode("def"))
    assert ended == 16  # all positions; with this seed no document ends before


def test_the_tool_refuses_a_tokenizer_that_is_larger_than_the_model(
    tmp_path: Path, corpus: Corpus, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--checkpoint", str(trained(vocab_size=200).write(tmp_path)), "--tokenizer", str(corpus.tokenizer)]
    assert tool.main([*command, "--prompt", "def"]) == 2
    assert "has 512 tokens, more than model.vocab_size (200)" in capsys.readouterr().err


def test_the_tool_says_what_is_wrong_with_a_launch_in_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert tool.main(["--checkpoint", str(folder), "--prompt", "x"]) == 2
    assert "error: LOCAL_RANK is missing" in capsys.readouterr().err
