"""Fine-tuning: it learns, the best epoch is kept, the same seed gives the same model; the tool from end to end."""

import json
import runpy
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ssd_megatron.classification.classifier import accuracy
from ssd_megatron.classification.finetune import Epoch, Recipe, finetune
from ssd_megatron.classification.samples import Sample
from ssd_megatron.classification.saved_classifier import Opened, begin_classifier
from ssd_megatron.config.model import ModelConfig
from ssd_megatron.config.schema import DataConfig, SSDConfig
from ssd_megatron.errors import ConfigError
from ssd_megatron.files import locked
from ssd_megatron.parallel.topology import Topology
from ssd_megatron.training.saved_model import Classification, Settings, open_model
from tests.classification.helpers import FAMILIES, TOP_K, write_random_model, write_task
from tests.ranks import run_ranks, start_process

TOOL = Path(__file__).parents[2] / "tools" / "finetune.py"
TASK = Classification(["bright", "dark"], ["sentence", "label"], "train.tsv")
OVERFIT = Recipe(epochs=15, lr=3e-3, batch=8, dropout=0.0)


def silent(batches: Sequence[list[Sample]], _: str) -> Iterable[list[Sample]]:
    return batches


def begun(topology: Topology, root: Path, tokenizer: Path, *settings: Any) -> Opened:
    folder = write_random_model(topology, root, tokenizer, *settings)
    return begin_classifier(folder, topology, TASK, dropout=0.0, seed=1)


def trained(opened: Opened, task: Path, recipe: Recipe) -> tuple[Epoch, list[Epoch], dict[str, Tensor]]:
    """The best epoch, all of them, and the weights."""
    samples, epochs = opened.read(task).samples, list[Epoch]()
    best = finetune(opened.classifier, samples, samples, recipe, silent, epochs.append)
    weights = {name: value.detach().clone() for name, value in opened.classifier.logical_parameters().items()}
    return best, epochs, weights


def learned(
    topology: Topology, root: Path, tokenizer: Path, task: Path, model: dict[str, Any], recipe: Recipe
) -> tuple[float, float, float]:
    """Accuracy before, of the best epoch, and of the weights that were kept."""
    opened = begun(topology, root, tokenizer, model)
    samples = opened.read(task).samples
    before = accuracy(opened.classifier, samples).accuracy
    best, epochs, _ = trained(opened, task, recipe)
    assert len(epochs) == recipe.epochs and best.dev.correct == max(epoch.dev.correct for epoch in epochs)
    return before, best.dev.accuracy, accuracy(opened.classifier, samples).accuracy


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_learns_a_tiny_task(family: str, tmp_path: Path, tokenizer: Path, task: Path) -> None:
    ((before, best, kept),) = run_ranks(1, learned, tmp_path, tokenizer, task, FAMILIES[family], OVERFIT)
    assert before < 0.9 and best == kept == 1.0


@pytest.mark.parametrize("changed", [{"mode": "sparse"}, {"dtype": "bf16"}])
def test_sparse_networks_and_bf16_learn_it_too(
    changed: dict[str, Any], tmp_path: Path, tokenizer: Path, task: Path
) -> None:
    ((_, best, kept),) = run_ranks(1, learned, tmp_path, tokenizer, task, {}, replace(OVERFIT, **changed))
    assert best == kept == 1.0


def changed_tensors(
    topology: Topology, root: Path, tokenizer: Path, task: Path, recipe: Recipe, ssd: dict[str, Any]
) -> set[str]:
    """Parts of the model that training has changed."""
    opened = begun(topology, root, tokenizer, {"tie_embeddings": False}, ssd)
    before = {name: value.detach().clone() for name, value in opened.classifier.logical_parameters().items()}
    _, _, after = trained(opened, task, recipe)
    changed = {name for name in after if not after[name].equal(before[name])}
    return {"router" if ".router." in name else name.partition(".")[0] for name in changed}


@pytest.mark.parametrize(
    ("mode", "router_update", "learns"),
    [("dense", "straight_through", False), ("sparse", "straight_through", True), ("sparse", "frozen", False)],
)
def test_routers_learn_where_they_would_in_training(
    mode: str, router_update: str, learns: bool, tmp_path: Path, tokenizer: Path, task: Path
) -> None:
    recipe = replace(OVERFIT, epochs=1, mode=mode)  # type: ignore[arg-type]
    (changed,) = run_ranks(1, changed_tensors, tmp_path, tokenizer, task, recipe, {"router_update": router_update})
    assert changed - {"head"} == {"embedding", "blocks", "classifier"} | ({"router"} if learns else set())


def repeated(topology: Topology, root: Path, tokenizer: Path, task: Path) -> tuple[bool, bool]:
    """Whether the same recipe, and one with another seed, give the same weights."""
    recipe = replace(OVERFIT, epochs=2, dropout=0.1)
    found = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        opened = begun(topology, root / name, tokenizer, {"dropout": 0.1})
        found.append(trained(opened, task, replace(recipe, seed=seed))[2])
    same = [all(found[0][name].equal(other[name]) for name in other) for other in found[1:]]
    return same[0], same[1]


def test_the_same_seed_gives_the_same_model(tmp_path: Path, tokenizer: Path, task: Path) -> None:
    assert run_ranks(1, repeated, tmp_path, tokenizer, task) == [(True, False)]


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (Recipe(epochs=0), r"epochs \(0\) must be at least 1"),
        (Recipe(lr=0.0), r"lr \(0.0\) must be above 0"),
        (Recipe(warmup=1.0), r"warmup \(1.0\) must be at least 0 and below 1"),
        (Recipe(mode="sparse"), r"mode \(sparse\) needs experts, which this model never formed: use dense"),
    ],
)
def test_recipes_that_cannot_be_are_refused(recipe: Recipe, message: str) -> None:
    model = ModelConfig(num_layers=1, hidden_size=8, num_attention_heads=2, seq_length=16, vocab_size=20)
    with pytest.raises(ConfigError, match=message):
        recipe.check(Settings(model, SSDConfig(), [4], False, None))


def test_sparse_mode_is_fp32() -> None:
    model = ModelConfig(num_layers=1, hidden_size=8, num_attention_heads=2, seq_length=16, vocab_size=20)
    with pytest.raises(ConfigError, match=r"dtype \(bf16\) cannot go with mode sparse"):
        Recipe(mode="sparse", dtype="bf16").check(Settings(model, SSDConfig(), [4], True, None))


def write_source(topology: Topology, root: Path, tokenizer: Path, has_experts: bool) -> None:
    write_random_model(topology, root, tokenizer, FAMILIES["bert"], None, has_experts)


def tool(output: Path, *arguments: str) -> None:
    sys.argv = [str(TOOL), *arguments]
    with output.open("w") as sys.stderr:
        runpy.run_path(str(TOOL), run_name="__main__")


def run_tool(output: Path, *arguments: str | Path) -> tuple[int | None, str]:
    """Exit status, and what went to standard error."""
    process = start_process(tool, output, *map(str, arguments))
    process.join(240)
    return process.exitcode, output.read_text()


def test_the_tool_fine_tunes_and_evaluates(tmp_path: Path, tokenizer: Path, task: Path) -> None:
    run_ranks(1, write_source, tmp_path / "source", tokenizer, True)
    dev = write_task(tmp_path / "dev.tsv", 16, seed=1)
    out, log = tmp_path / "out.json", tmp_path / "log"
    recipe = ["--epochs", "15", "--lr", "3e-3", "--batch", "8", "--dropout", "0", "--json", out]
    files = ["--train", task, "--dev", dev, "--to", tmp_path / "tuned"]
    assert run_tool(log, "--from", tmp_path / "source", *files, *recipe) == (0, "")
    result = json.loads(out.read_text())
    assert result["labels"] == ["bright", "dark"] and result["examples"] == {"train": 24, "dev": 16}
    assert len(result["epochs"]) == 15 and result["recipe"]["lr"] == 3e-3
    assert result["accuracy"] == max(epoch["dev_accuracy"] for epoch in result["epochs"]) > 0.8
    settings = open_model(tmp_path / "tuned").settings
    assert settings.classification == Classification(["bright", "dark"], ["sentence", "label"], str(task))

    again = ["--evaluate", tmp_path / "tuned", "--dev", dev, "--json", out]
    assert run_tool(log, *again, "--top_k", "2", "8", "--router", "recomputed") == (0, "")
    results = json.loads(out.read_text())["results"]
    assert [line["name"] for line in results] == ["dense", "sparse, top_k 2", "sparse, top_k 8"]
    assert results[0]["accuracy"] == results[2]["accuracy"] == result["accuracy"]
    assert results[2]["loss"] == pytest.approx(results[0]["loss"], abs=1e-5) != results[1]["loss"]
    assert results[1]["top_k"] == [TOP_K] * 2

    code, message = run_tool(log, *again, "--epochs", "3")
    assert (code, message) == (2, "error: epochs has no effect with --evaluate: leave it out\n")
    code, message = run_tool(log, *again, "--mode", "dense", "--top_k", "4")
    assert (code, message) == (2, "error: top_k ([4.0]) has no effect without mode sparse\n")


def test_a_model_without_experts_is_dense(tmp_path: Path, tokenizer: Path, task: Path) -> None:
    run_ranks(1, write_source, tmp_path / "source", tokenizer, False)
    log = tmp_path / "log"
    files = ["--train", task, "--dev", task, "--to", tmp_path / "tuned"]
    code, message = run_tool(log, "--from", tmp_path / "source", *files, "--mode", "sparse")
    assert (code, message) == (2, "error: mode (sparse) needs experts, which this model never formed: use dense\n")
    assert run_tool(log, "--from", tmp_path / "source", *files, "--epochs", "1") == (0, "")
    saved = open_model(tmp_path / "tuned")
    assert not saved.settings.has_experts and not [name for name in saved.shapes if ".router." in name]
    code, message = run_tool(log, "--evaluate", tmp_path / "tuned", "--dev", task, "--mode", "sparse")
    assert (code, message) == (2, "error: mode (sparse) needs experts, which this model never formed: use dense\n")
    assert run_tool(log, "--evaluate", tmp_path / "tuned", "--dev", task) == (0, "")


def test_where_it_cannot_write_it_does_not_train(tmp_path: Path, tokenizer: Path, task: Path) -> None:
    run_ranks(1, write_source, tmp_path / "source", tokenizer, False)
    log, file = tmp_path / "log", tmp_path / "file"
    file.touch()
    files = ["--from", tmp_path / "source", "--train", task, "--dev", task]
    assert run_tool(log, *files, "--to", file / "tuned") == (1, f"error: [Errno 20] Not a directory: '{file}/tuned'\n")
    with locked(tmp_path / "tuned", "--to"):
        code, message = run_tool(log, *files, "--to", tmp_path / "tuned")
    assert (code, "is in use by another running process" in message) == (2, True)


def test_fine_tuning_may_begin_with_a_classifier(tmp_path: Path, tokenizer: Path, task: Path) -> None:
    assert run_ranks(1, begun_twice, tmp_path, tokenizer) == [(3, True)]


def begun_twice(topology: Topology, root: Path, tokenizer: Path) -> tuple[int, bool]:
    data = DataConfig(paths=("corpus",), tokenizer=tokenizer, mask_fraction=0.4)
    first = replace(begun(topology, root / "source", tokenizer, {}), data=data)
    with torch.no_grad():
        first.classifier.model.logical_parameters()["embedding.word.weight"].add_(1)
    first.write(root / "first")
    three = Classification(["a", "b", "c"], ["sentence", "label"], "other.tsv")
    second = begin_classifier(root / "first", topology, three, dropout=0.0, seed=1)
    assert second.data == first.data
    name = "embedding.word.weight"
    word, word_again = (c.classifier.model.logical_parameters()[name] for c in (first, second))
    return len(second.classifier.logical_parameters()["classifier.bias"]), word.equal(word_again)
