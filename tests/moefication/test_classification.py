"""A classifier gets experts, observed and measured on its own task."""

from pathlib import Path

import pytest

from ssd_megatron.classification.finetune import Recipe, finetune
from ssd_megatron.classification.saved_classifier import begin_classifier
from ssd_megatron.inference.load import load
from ssd_megatron.parallel.topology import Topology
from ssd_megatron.training.saved_model import Classification, open_model
from tests.classification.helpers import FAMILIES, write_random_model, write_task, write_tokenizer
from tests.moefication.test_tool import figures, moefy, said
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
    assert moefy(tmp_path / "classifier", tmp_path / "moefied", "--top_k", "8", *held_out) == 0
    found = figures(tmp_path / "moefied")
    assert found["dense"]["accuracy"] == found["sparse"]["accuracy"] == 1.0
    assert found["sparse"]["loss"] == pytest.approx(found["dense"]["loss"], rel=1e-4)
    settings = open_model(tmp_path / "moefied").settings
    assert settings.classification is not None and settings.classification.labels == ["bright", "dark"]
    assert (settings.has_experts, settings.ssd.router) == (True, "mlp")
    load(tmp_path / "moefied", mode="sparse")  # as the language model that it also is


def test_it_must_be_said_what_it_is_measured_on(tmp_path: Path) -> None:
    run_ranks(1, write_classifier, tmp_path, "gpt")
    assert moefy(tmp_path / "classifier", tmp_path / "no") == 2
    assert "a classifier needs --held_out" in said(tmp_path / "no")
