"""A classifier gets experts, observed and measured on its own task."""

from pathlib import Path
from weakref import WeakSet

import pytest
import torch
from torch import Tensor

from ssd_megatron.classification.classifier import accuracy
from ssd_megatron.classification.finetune import Recipe, finetune
from ssd_megatron.classification.saved_classifier import begin_classifier
from ssd_megatron.inference.load import load
from ssd_megatron.moefication.classification_task import ClassificationTask
from ssd_megatron.parallel.topology import Topology
from ssd_megatron.training.saved_model import Classification, open_model
from tests.classification.helpers import FAMILIES, write_random_model, write_task, write_tokenizer
from tests.classification.test_classifier import begun
from tests.moefication.test_tool import figures, run_tool, said
from tests.ranks import run_ranks


def write_classifier(topology: Topology, folder: Path, family: str) -> None:
    """A model with experts and an order of neurons of its own, which has learnt the task by heart."""
    tokenizer, task = write_tokenizer(folder / "tokenizer.model"), write_task(folder / "train.tsv", 24)
    source = write_random_model(topology, folder / "model", tokenizer, FAMILIES[family])
    classification = Classification(["bright", "dark"], ["sentence", "label"], str(task))
    opened = begin_classifier(source, topology, classification, dropout=0.0, seed=1)
    samples = opened.read(task).samples
    recipe = Recipe(epochs=15, lr=3e-3, batch=8, dropout=0.0)
    finetune(opened.classifier, samples, samples, recipe, lambda batches, _: batches, lambda _: None)
    opened.write(folder / "classifier")


@pytest.mark.parametrize("family", ["gpt", "bert with sentences", "t5"])
def test_a_classifier_keeps_its_accuracy_with_all_experts(family: str, tmp_path: Path) -> None:
    run_ranks(1, write_classifier, tmp_path, family)
    held_out = ("--held_out", str(tmp_path / "train.tsv"))
    assert run_tool(tmp_path / "classifier", tmp_path / "moefied", "--top_k", "8", *held_out) == 0
    found = figures(tmp_path / "moefied")
    assert found["dense"]["accuracy"] == found["sparse"]["accuracy"] == 1.0
    assert found["sparse"]["loss"] == pytest.approx(found["dense"]["loss"], rel=1e-4)
    settings = open_model(tmp_path / "moefied").settings
    assert settings.classification is not None and settings.classification.labels == ["bright", "dark"]
    assert (settings.has_experts, settings.ssd.router) == (True, "mlp")
    load(tmp_path / "moefied", mode="sparse")  # as the language model that it also is


def test_what_it_is_measured_on_is_the_held_out_file_and_nothing_else(tmp_path: Path) -> None:
    run_ranks(1, write_classifier, tmp_path, "gpt")
    assert run_tool(tmp_path / "classifier", tmp_path / "no") == 2
    assert "a classifier needs --held_out" in said(tmp_path / "no")
    held_out = ("--held_out", str(tmp_path / "train.tsv"))
    assert run_tool(tmp_path / "classifier", tmp_path / "no", *held_out, "--eval_tokens", "256") == 2
    assert "eval_tokens (256) has no effect with a classifier, which is measured on all of" in said(tmp_path / "no")


class Kept:
    """A tensor that is kept for a backward pass."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def one_batch(topology: Topology, folder: Path) -> tuple[list[int], list[float], list[int]]:
    """Tensors kept when each part of a batch begins; its loss with gradients, without, and as accuracy has it; numbers
    of parameters that then have gradients, with and without."""
    task = write_task(folder / "train.tsv", 24)
    opened = begun(topology, folder / "model", write_tokenizer(folder / "tokenizer.model"), {})
    classifier, kept, found = opened.classifier, WeakSet[Kept](), list[int]()

    def keep(tensor: Tensor) -> Kept:
        box = Kept(tensor)
        kept.add(box)
        return box

    def gradients() -> int:
        return sum(parameter.grad is not None for parameter in classifier.parameters())

    classification = ClassificationTask(opened, task, task, seed=1, batch_size=24)
    batch = next(classification.batches())
    with torch.no_grad():
        losses, numbers = [classification.forward_backward(batch), accuracy(classifier, batch).loss], [gradients()]
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda box: box.tensor),
        classifier.register_forward_pre_hook(lambda *_: found.append(len(kept))),
    ):
        losses.append(classification.forward_backward(batch))
    return found, losses, [*numbers, gradients()]


def test_parts_of_a_batch_are_computed_one_after_the_other(tmp_path: Path) -> None:
    ((kept, losses, gradients),) = run_ranks(1, one_batch, tmp_path)
    assert len(kept) > 2 and not any(kept)
    assert losses[1:] == pytest.approx([losses[0]] * 2, rel=1e-5)
    assert gradients[0] == 0 < gradients[1]
