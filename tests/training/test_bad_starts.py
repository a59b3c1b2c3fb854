"""Starts with a config or data that cannot be used: status 2, one message, and a run folder that the next good start
can use."""

import copy
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from pretrain_ssd import main
from ssd_megatron.data import corpus
from ssd_megatron.data.tokenizers import train_sentencepiece
from ssd_megatron.switching.partition import save_partition
from tests.small_run import Corpus, Ranks, curve, small_config, train, write_config


@dataclass
class Start:
    """A start that is about to be spoilt: everything in `folder`, the config still a dict, the corpus a copy."""

    folder: Path
    config: dict[str, Any]
    overrides: list[str] = field(default_factory=list)
    text: str | None = None  # of the file, instead of the config

    @property
    def file(self) -> Path:
        return self.folder / "run.json"

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"

    def set(self, path: str, value: Any) -> None:
        *parents, name = path.split(".")
        section = self.config
        for step in parents:
            section = section.setdefault(step, {})
        section[name] = value

    def ranks(self, world_size: int = 1, prepare: Callable[[int], None] | None = None) -> Ranks:
        if self.text is None:
            write_config(self.config, self.file)
        else:
            self.file.write_text(self.text)
        return Ranks(self.file, *self.overrides, world_size=world_size, prepare=prepare)


@pytest.fixture
def start(corpus: Corpus, tmp_path: Path) -> Start:
    for path in corpus.prefix.parent.glob(f"{corpus.prefix.name}.*"):
        shutil.copy(path, tmp_path)
    config = small_config(Corpus(tmp_path / corpus.prefix.name, corpus.tokenizer), tmp_path / "run")
    config["ssd_megatron"]["training"]["train_steps"] = 15
    config["ssd_megatron"]["parallel"] = {"timeout_seconds": 60}
    return Start(tmp_path, config)


Spoil = Callable[[Start], None]
MODEL, DATA, SSD, TRAINING = (f"ssd_megatron.{name}" for name in ("model", "data", "ssd", "training"))


def setting(path: str, value: Any) -> Spoil:
    return lambda start: start.set(path, value)


def override(assignment: str) -> Spoil:
    return lambda start: start.overrides.append(assignment)


def text_of_config(text: str) -> Spoil:
    def put(start: Start) -> None:
        start.text = text

    return put


def several(*spoils: Spoil) -> Spoil:
    def spoil(start: Start) -> None:
        for one in spoils:
            one(start)

    return spoil


def without(suffix: str) -> Spoil:
    return lambda start: (start.folder / f"corpus{suffix}").unlink()


def damaged(suffix: str, change: Callable[[bytes], bytes]) -> Spoil:
    def damage(start: Start) -> None:
        path = start.folder / f"corpus{suffix}"
        path.write_bytes(change(path.read_bytes()))

    return damage


def empty_corpus(start: Start) -> None:
    """What preprocessing no documents gives: a sound index of nothing."""
    (start.folder / "corpus.bin").write_bytes(b"")
    index = bytearray((start.folder / "corpus.idx").read_bytes()[:34])
    index[18:34] = (0).to_bytes(8, "little") + (1).to_bytes(8, "little")
    (start.folder / "corpus.idx").write_bytes(bytes(index) + (0).to_bytes(8, "little"))


def small_tokenizer(start: Start) -> None:
    """A tokenizer of 300 tokens, with the record of which tokenizer made the corpus gone."""
    path = start.folder / "small.model"
    words = (f"word{i} other{i % 7}" for i in range(300))
    train_sentencepiece(words, path, 300)
    start.set(f"{DATA}.tokenizer", str(path))
    info(start).unlink()


def info(start: Start) -> Path:
    return next(path for path in start.folder.glob("corpus.*") if path.suffix not in (".bin", ".idx"))


def partition_of(*sizes: int) -> Spoil:
    """A recorded partition of two layers whose 8 experts have these numbers of neurons."""

    def record(start: Start) -> None:
        labels = torch.cat([torch.full((size,), expert) for expert, size in enumerate(sizes)])
        save_partition(start.folder / "experts.safetensors", [labels, labels.clone()])
        start.set(f"{SSD}.partition", str(start.folder / "experts.safetensors"))

    return record


def run_dir_below_a_file(start: Start) -> None:
    (start.folder / "file").write_text("")
    start.set("ssd_megatron.run_dir", str(start.folder / "file" / "run"))


# Name, what is spoilt, and everything that the message must say; {folder} is where the files lie.
BEFORE_ANYTHING: list[tuple[str, Spoil, tuple[str, ...]]] = [
    ("no json", text_of_config('{"train_batch_size": 8,}'), ("{folder}/run.json, line 1, column 24: not JSON",)),
    ("no object", text_of_config("[]"), ("{folder}/run.json must be a JSON object",)),
    (
        "misspelt key",
        setting("gradient_cliping", 1.0),
        ("gradient_cliping (1.0) is not a known key: did you mean gradient_clipping?",),
    ),
    (
        "unknown key in a section",
        setting(f"{SSD}.topk", 2),
        ("ssd.topk (2) is not a known key: did you mean top_k?",),
    ),
    (
        "wrong type",
        setting(f"{MODEL}.num_layers", "2"),
        ('model.num_layers ("2") must be a whole number',),
    ),
    (
        "missing section",
        lambda start: start.config["ssd_megatron"].pop("model"),
        ("ssd_megatron.model is missing: Shape of the Transformer.",),
    ),
    (
        "several problems",
        several(
            setting(f"{SSD}.num_experts", 7),
            setting(f"{MODEL}.num_attention_heads", 5),
            setting("optimizer.params.lr", 0),
            setting("zero_optimization.stage", 0),
        ),
        (
            "4 problems in {folder}/run.json",
            "ssd.num_experts (7) must divide model.ffn_hidden_size (64): try 4 or 8",
            "model.num_attention_heads (5) must divide model.hidden_size (32): try 4 or 8",
            "optimizer.params.lr (0) must be above 0",
            "zero_optimization.stage (0) is not supported: use 1",
        ),
    ),
    ("top_k", setting(f"{SSD}.top_k", 9), ("ssd.top_k (9) must be at most ssd.num_experts (8): try 2",)),
    (
        "tensor parallel",
        setting("ssd_megatron.parallel.tensor_parallel_size", 2),
        ("parallel.tensor_parallel_size (2) * pipeline_parallel_size (1) = 2 must divide the number of processes (1)",),
    ),
    (
        "zero 3",
        setting("zero_optimization.stage", 3),
        ("zero_optimization.stage (3) is not supported yet: use 1 or 2",),
    ),
    (
        "offload",
        setting("zero_optimization.offload_optimizer", {"device": "cpu"}),
        ("zero_optimization.offload_optimizer", "offload is not supported yet: use ZeRO stage 1 or 2"),
    ),
    ("fp8", setting("fp8", {"enabled": True}), ('fp8 ({{"enabled": true}}) is not accepted', "use bf16")),
    (
        "batch arithmetic",
        setting("gradient_accumulation_steps", 3),
        (
            "train_batch_size (8) must be train_micro_batch_size_per_gpu (2) * gradient_accumulation_steps (3) * "
            "data parallel size (1) = 6: try train_batch_size 6",
        ),
    ),
    (
        "phase after the end",
        setting(f"{TRAINING}.train_steps", 14),
        ("ssd.phases[4].start_step (15) must be at most training.train_steps (14)",),
    ),
    (
        "setting without effect",
        setting(f"{SSD}.sparse_fraction", 0.3),
        ('ssd.sparse_fraction (0.3) has no effect: leave it out, or set ssd.schedule "adaptive"',),
    ),
    (
        "--set of an unknown path",
        override("ssd_megatron.ssd.topk=2"),
        ("--set ssd_megatron.ssd.topk: no such field: did you mean ssd_megatron.ssd.top_k?",),
    ),
    (
        "--set without a value",
        override("train_batch_size"),
        ("--set train_batch_size: must be path=value: try --set train_batch_size=64",),
    ),
    (
        "recorded partition missing",
        setting(f"{SSD}.partition", "nowhere.safetensors"),
        ('ssd.partition ("nowhere.safetensors") is no file: record it first, or use kmeans',),
    ),
    (
        "validation without a share",
        setting(f"{DATA}.split", "100,0,0"),
        ('data.split ("100,0,0") must be three weights', 'the first two above 0: try "969,30,1"'),
    ),
]

IN_THE_DATA: list[tuple[str, Spoil, tuple[str, ...]]] = [
    (
        "missing .bin",
        without(".bin"),
        ("{folder}/corpus.bin not found: tools/preprocess_data.py --output {folder}/corpus makes them",),
    ),
    (
        "missing .idx",
        without(".idx"),
        ("{folder}/corpus.idx not found: tools/preprocess_data.py --output {folder}/corpus makes them",),
    ),
    (
        "truncated .bin",
        damaged(".bin", lambda content: content[:-1000]),
        ("{folder}/corpus.bin is truncated: ", "corpus.idx says ", "copy both files again, or preprocess again"),
    ),
    (
        "damaged .idx header",
        damaged(".idx", lambda content: b"X" + content[1:]),
        ("{folder}/corpus.idx is damaged: it has no IndexedDataset header",),
    ),
    (
        "truncated .idx",
        damaged(".idx", lambda content: content[:-8]),
        ("{folder}/corpus.idx is damaged: ", "but its header says ", "sequences"),
    ),
    ("empty corpus", empty_corpus, ("{folder}/corpus is empty: 0 documents, 0 tokens",)),
    (
        "no tokenizer",
        setting(f"{DATA}.tokenizer", "nowhere.model"),
        ("tokenizer nowhere.model does not exist: tools/train_tokenizer.py makes one",),
    ),
    (
        "vocabulary too small",
        setting(f"{MODEL}.vocab_size", 500),
        ("has 512 tokens, more than model.vocab_size (500): give", "set model.vocab_size to 512 or more"),
    ),
    (
        "another tokenizer's data",
        small_tokenizer,
        (
            "{folder}/corpus.bin has token ids from ",
            "but the tokenizer has only the ids 0 to 299: it was made with another tokenizer",
        ),
    ),
    (
        "too little to validate on",
        setting(f"{TRAINING}.eval_steps", 1_000_000),
        (
            "data.paths: {folder}/corpus has ",
            "validation samples of 16 tokens",
            "validation needs training.eval_steps 1,000,000 x train_batch_size 8 = 8,000,000",
            "lower training.eval_steps or train_batch_size, give it a larger share in data.split, or add data",
        ),
    ),
    (
        "no document for validation",
        setting(f"{DATA}.split", "1000000,1,0"),
        ("data.paths has no documents for validation", "give it a larger share in data.split"),
    ),
]


def names(cases: list[tuple[str, Spoil, tuple[str, ...]]]) -> list[Any]:
    return [pytest.param(spoil, said, id=name) for name, spoil, said in cases]


def assert_one_message(ranks: Ranks, start: Start, said: tuple[str, ...]) -> None:
    assert ranks.wait() == [2]
    output = ranks.output()
    for text in said:
        assert text.format(folder=start.folder) in output
    assert output.count("error: ") == 1 and "Traceback" not in output


@pytest.mark.parametrize(("spoil", "said"), names(BEFORE_ANYTHING))
def test_an_unusable_config_is_answered_and_nothing_is_made(start: Start, spoil: Spoil, said: tuple[str, ...]) -> None:
    spoil(start)
    ranks = start.ranks()
    assert_one_message(ranks, start, said)
    assert ranks.output().startswith("error: ")
    assert not start.run_dir.exists()


@pytest.mark.parametrize(("spoil", "said"), names(IN_THE_DATA))
def test_unusable_data_is_answered_before_anything_is_made(start: Start, spoil: Spoil, said: tuple[str, ...]) -> None:
    spoil(start)
    ranks = start.ranks()
    assert_one_message(ranks, start, said)
    assert ranks.output().startswith("error: ")
    assert {path.name for path in start.run_dir.glob("*")} <= {"data_cache", ".lock"}


def test_a_missing_config_is_named(start: Start) -> None:
    ranks = Ranks(start.folder / "nowhere.json")
    assert_one_message(ranks, start, ("{folder}/nowhere.json cannot be read: ", "No such file or directory"))


def test_a_run_dir_that_cannot_be_written_is_named(start: Start) -> None:
    run_dir_below_a_file(start)
    assert_one_message(start.ranks(), start, ("ssd_megatron.run_dir ({folder}/file/run) cannot be written",))


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ([9, 7, 8, 8, 8, 8, 8, 8], "labels of layers.0 give 8 experts between 7 and 9 neurons, not the same number"),
        ([4] * 8, "has 2 layers of [32] neurons; the model has 2 of 64"),
        ([4] * 16, "labels of layers.0 reach from 0 to 15, and 8 experts are 0 to 7"),
    ],
)
def test_a_recorded_partition_that_does_not_fit_is_answered(start: Start, sizes: list[int], said: str) -> None:
    partition_of(*sizes)(start)
    assert_one_message(start.ranks(), start, ("ssd.partition ({folder}/experts.safetensors)", said))


def test_a_rank_without_local_rank_is_told_so(
    start: Start, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert main(["--ds_config", str(write_config(start.config, start.file))]) == 2
    assert capsys.readouterr().err.startswith("error: LOCAL_RANK is missing: RANK (1) and WORLD_SIZE (2) are set")


def test_only_the_first_of_two_ranks_speaks_and_both_end_alike(start: Start) -> None:
    start.set("train_batch_size", 9)
    ranks = start.ranks(world_size=2)
    assert ranks.wait() == [2, 2]
    assert "train_batch_size (9) must be a multiple of the data parallel size (2" in ranks.output()
    assert ranks.output(rank=1) == ""


def no_others_read(rank: int) -> None:
    """Reading a corpus fails on all ranks but the first."""
    if rank > 0:
        corpus.SCAN_CHUNK = 0


def test_one_rank_reads_the_corpora_for_all(start: Start) -> None:
    start.set(f"{TRAINING}.stop_after_step", 1)
    assert start.ranks(world_size=2, prepare=no_others_read).wait() == [0, 0]


def test_what_the_first_rank_finds_in_them_ends_all(start: Start) -> None:
    small_tokenizer(start)
    ranks = start.ranks(world_size=2, prepare=no_others_read)
    assert ranks.wait() == [2, 2]
    assert ranks.output().startswith("error: rank 0: ")
    assert "but the tokenizer has only the ids 0 to 299" in ranks.output()
    assert ranks.output(rank=1) == ""


def test_a_good_start_follows_bad_ones_in_the_same_folder(start: Start) -> None:
    """Failures at every depth, of the config, of the data, of the model, then the run itself."""
    start.set(f"{TRAINING}.train_steps", 16)
    good = copy.deepcopy(start.config)
    corpus = (start.folder / "corpus.bin").read_bytes()
    for spoil in (setting(f"{SSD}.top_k", 9), without(".bin"), partition_of(*[4] * 8)):
        spoil(start)
        assert start.ranks().wait() == [2]
        start.config = copy.deepcopy(good)
        (start.folder / "corpus.bin").write_bytes(corpus)
    output = train(write_config(good, start.file))
    assert "resuming" not in output
    assert [step for step, _, _ in curve(start.run_dir)] == list(range(1, 17))


def test_a_refused_start_leaves_the_config_that_the_run_was_made_with(start: Start) -> None:
    start.overrides.append(f"{TRAINING}.stop_after_step=1")
    assert start.ranks().wait() == [0]
    made_with = (start.run_dir / "config.json").read_text()
    start.overrides.append("optimizer.params.lr=0.5")
    assert_one_message(start.ranks(), start, ("optimizer.params.lr was 0.01 and is 0.5",))
    assert (start.run_dir / "config.json").read_text() == made_with


def test_compiled_blocks_need_a_compiler(start: Start, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    start.set(f"{TRAINING}.compile", "blocks")
    write_config(start.config, start.file)
    assert main(["--ds_config", str(start.file)]) == 2
    message = 'training.compile ("blocks") needs a C++ compiler, and no-such-compiler is not installed: install it, or'
    assert message in capsys.readouterr().err
