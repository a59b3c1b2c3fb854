"""lm-evaluation-harness on our checkpoint against its own model of transformers on the exported one."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import dynamic_module_utils

from ssd_megatron.errors import DataError
from ssd_megatron.export.convert import export_model
from ssd_megatron.training.saved_model import open_model, write_model
from tests.saved_models import trained
from tests.small_run import Corpus

pytest.importorskip("lm_eval", reason="lm_eval is not installed: pip install -e '.[eval]'")

import datasets
from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from ssd_megatron.inference import harness

TEXTS = ["import os\n", "def f(x):", "for line in", "x = [1, 2", "class A:\n    def", "return"]
TASKS = {
    "choice": """output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: [" self", "\\n", " = 1 + 2", "import"]
doc_to_target: 1
metric_list: [{metric: acc}]
""",
    "rolling": """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}} {{text}} and {{text}} {{text}}"
metric_list: [{metric: bits_per_byte}]
""",
    "continued": """output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{text}}"
generation_kwargs: {until: ["e", "\\n\\n"], max_gen_toks: 8, do_sample: false}
metric_list: [{metric: exact_match}]
""",
}


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of tasks on a file, without anything to download."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "tasks"
    folder.mkdir()
    data = folder / "texts.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    for name, settings in TASKS.items():
        where = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
        (folder / f"{name}.yaml").write_text(f"task: {name}\n{where}{settings}")
    return folder


@pytest.fixture
def checkpoint(tmp_path: Path, corpus: Corpus) -> Path:
    settings = replace(trained().settings, tokenizer=corpus.tokenizer)
    return write_model(tmp_path / "saved", settings, trained().tensors.items())


def responses(tasks: Path, model: str, batch_size: int, **arguments: Any) -> dict[str, list[Any]]:
    """What a model answers to each document of each task, in the order of the documents."""
    found = simple_evaluate(
        model=model,
        model_args=arguments,
        tasks=list(TASKS),
        batch_size=batch_size,
        device="cpu",
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
    )["samples"]
    by_task = {name: sorted(found[name], key=lambda sample: int(sample["doc_id"])) for name in TASKS}
    return {name: [sample["resps"] for sample in samples] for name, samples in by_task.items()}


@pytest.mark.parametrize("mode", ["dense", "sparse"])
def test_answers_are_those_of_the_exported_model(tmp_path: Path, tasks: Path, checkpoint: Path, mode: str) -> None:
    harness.register()
    ours = responses(tasks, "ssd_megatron", 4, path=str(checkpoint), mode=mode)
    export_model(open_model(checkpoint), tmp_path / "hf", "sparse" if mode == "sparse" else "dense")
    theirs = responses(
        tasks,
        "hf",
        3,
        pretrained=str(tmp_path / "hf"),
        dtype="float32",
        trust_remote_code=mode == "sparse",
        backend="causal",
    )
    # Libraries show bytes that are no whole characters differently.
    texts = [[text.partition("\ufffd")[0] for ((text,),) in answers["continued"]] for answers in (ours, theirs)]
    assert texts[0] == texts[1] and len(set(texts[0])) > 3
    for name in ("choice", "rolling"):
        for our_answers, their_answers in zip(ours[name], theirs[name], strict=True):
            assert _numbers(our_answers) == pytest.approx(_numbers(their_answers), rel=1e-5, abs=1e-4)


def test_the_command_runs_the_harness(
    tmp_path: Path,
    tasks: Path,
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["harness", "run", "--model", "ssd_megatron", "--tasks", "choice", "--include_path", str(tasks)]
    arguments = f"path={checkpoint},mode=sparse,top_k=3,dtype=bf16"
    monkeypatch.setattr(sys, "argv", [*command, "--model_args", arguments, "--batch_size", "2"])
    assert harness.main() == 0
    assert "|choice|" in capsys.readouterr().out
    for wrong, message in (
        ("mode=auto", "mode (auto) of --model_args must be one of dense, sparse"),
        ("dtype=int8", "dtype (int8) of --model_args must be one of fp32, bf16, fp16"),
        ("top_k=4", "top_k (4) has no effect without mode sparse"),
        ("top_k=9,mode=sparse", "top_k (9) must be between 1 and the model's 8 experts"),
    ):
        monkeypatch.setattr(sys, "argv", [*command, "--model_args", f"path={checkpoint},{wrong}"])
        assert harness.main() == 2
        assert f"error: {message}" in capsys.readouterr().err


def test_a_tokenizer_that_is_larger_than_the_model_is_refused(tmp_path: Path, corpus: Corpus) -> None:
    folder = trained(vocab_size=200).write(tmp_path)
    with pytest.raises(DataError, match=r"has 512 tokens, more than model.vocab_size \(200\)"):
        harness.HarnessModel(str(folder), tokenizer=str(corpus.tokenizer))


@pytest.mark.parametrize("device", ["cuda:31", "gpu"])
def test_a_device_that_is_not_here_is_refused(
    tasks: Path, checkpoint: Path, device: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["harness", "run", "--model", "ssd_megatron", "--tasks", "choice", "--include_path", str(tasks)]
    monkeypatch.setattr(sys, "argv", [*command, "--model_args", f"path={checkpoint}", "--device", device])
    assert harness.main() == 2
    assert f"error: device ({device}) is not on this machine: leave it out, or use cpu" in capsys.readouterr().err


def _numbers(answer: Any) -> list[float]:
    """All numbers of nested lists, booleans as 0 and 1."""
    if isinstance(answer, list | tuple):
        return [number for part in answer for number in _numbers(part)]
    return [float(answer)]
