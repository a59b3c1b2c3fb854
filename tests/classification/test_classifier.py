"""Classifiers on models of all families: what their logits depend on, both modes, and checkpoints."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ssd_megatron.classification.classifier import Classifier, accuracy
from ssd_megatron.classification.finetune import forward_backward
from ssd_megatron.classification.samples import Sample, unpadded_batches
from ssd_megatron.classification.saved_classifier import Opened, begin_classifier, open_classifier
from ssd_megatron.errors import ConfigError
from ssd_megatron.parallel.topology import Topology
from ssd_megatron.switching.statistics import observed
from ssd_megatron.training.checkpoint_tools import verify
from ssd_megatron.training.saved_model import Classification, open_model
from tests.classification.helpers import FAMILIES, TOP_K, write_random_model
from tests.ranks import run_ranks

TASK = Classification(["bright", "dark"], ["sentence", "label"], "train.tsv")
CPU = torch.device("cpu")

# By router: settings of its experts.
ROUTERS: dict[str, dict[str, Any]] = {
    "centroid": {},
    "centroid, frozen": {"router": "centroid", "router_update": "frozen"},
    "avg_k": {},
    "switch": {"balance_bias": True},
    "pkm": {"num_experts": 16},
    "mlp": {},
    "hash": {},
    "rand_hash": {"num_experts": 64},
    "vanilla": {"num_experts": 64},
    "oracle": {},
    "random": {},
}


def begun(topology: Topology, root: Path, tokenizer: Path, *model: Any, **other: Any) -> Opened:
    """A new classifier, its weights such that classes differ, on a random model."""
    folder = write_random_model(topology, root, tokenizer, *model, **other)
    opened = begin_classifier(folder, topology, TASK, dropout=0.0, seed=1)
    with torch.no_grad():
        opened.classifier.classifier.weight.mul_(10)
    return opened


def logits(classifier: Classifier, samples: list[Sample]) -> Tensor:
    """[samples, classes], in their order."""
    found = torch.empty(len(samples), 2)
    numbered = [sample | {"number": torch.tensor(n)} for n, sample in enumerate(samples)]
    with torch.no_grad():
        for batch in unpadded_batches(numbered, CPU):
            found[batch["number"]] = classifier(batch)
    return found


def compared(
    topology: Topology, root: Path, tokenizer: Path, task: Path, model: dict[str, Any]
) -> dict[str, list[float] | float]:
    opened = begun(topology, root, tokenizer, model)
    classifier, samples = opened.classifier, opened.read(task).samples
    together = logits(classifier, samples)
    alone = torch.cat([logits(classifier, [sample]) for sample in samples])
    classifier.use("sparse", [8] * len(classifier.model.ffns))
    everything = logits(classifier, samples)
    classifier.use("sparse", [TOP_K] * len(classifier.model.ffns))
    few = logits(classifier, samples)
    classifier.use("dense")
    loss = forward_backward(classifier, samples)
    whole = {name: p.grad for name, p in classifier.logical_parameters().items() if p.grad is not None}
    for parameter in classifier.parameters():
        parameter.grad = None
    losses = [forward_backward(classifier, [sample]) for sample in samples]
    single = {name: p.grad / len(samples) for name, p in classifier.logical_parameters().items() if p.grad is not None}
    assert whole.keys() == single.keys() and "classifier.bias" in whole
    return {
        "spread": float(together.std(0).min()),
        "mates": float((together - alone).abs().max()),
        "all experts": float((together - everything).abs().max()),
        "few experts": float((together - few).abs().max()),
        "loss": abs(loss - sum(losses) / len(losses)),
        "gradients": max(float((whole[name] - single[name]).abs().max()) for name in whole),
        "size of gradients": max(float(gradient.abs().max()) for gradient in whole.values()),
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_do_not_depend_on_batch_mates(
    family: str, tmp_path: Path, tokenizer: Path, task: Path
) -> None:
    (found,) = run_ranks(1, compared, tmp_path, tokenizer, task, FAMILIES[family])
    assert found["mates"] < 1e-5 and found["loss"] < 1e-6 and found["gradients"] < 1e-5, found
    assert found["spread"] > 1e-3 and found["size of gradients"] > 1e-3, found
    assert found["all experts"] < 1e-5 and found["few experts"] > 1e-4, found


def scored(topology: Topology, root: Path, tokenizer: Path, task: Path, ssd: dict[str, Any]) -> dict[int, float]:
    """Loss by experts per token, and of dense mode as 0."""
    opened = begun(topology, root, tokenizer, {}, ssd)
    samples = opened.read(task).samples
    found = {0: accuracy(opened.classifier, samples).loss}
    experts = opened.settings.ssd.num_experts
    for top_k in (1, experts):
        opened.classifier.use("sparse", [top_k] * 2)
        found[top_k] = accuracy(opened.classifier, samples).loss
    return found


@pytest.mark.parametrize("router", ROUTERS)
def test_every_router_runs_with_any_number_of_experts(router: str, tmp_path: Path, tokenizer: Path, task: Path) -> None:
    ssd = {"router": router, **ROUTERS[router]}
    (found,) = run_ranks(1, scored, tmp_path, tokenizer, task, ssd)
    dense, one, everything = found.values()
    assert abs(one - dense) > 1e-5
    assert (abs(everything - dense) < 1e-5) == (router != "switch")  # whose gates scale the outputs


def round_trip(topology: Topology, root: Path, tokenizer: Path, task: Path) -> dict[str, Any]:
    opened = begun(topology, root / "source", tokenizer, FAMILIES["t5"])
    folder = opened.write(root / "written")
    again = open_classifier(root / "written", topology)
    samples, samples_again = opened.read(task).samples, again.read(task).samples
    opened.classifier.use("sparse")
    again.classifier.use("sparse")
    source, written = open_model(root / "source"), open_model(folder)
    ids, ids_again = source.neuron_ids(), written.neuron_ids()
    return {
        "damages": verify(folder),
        "classifier": sorted(written.index.shapes.keys() - source.shapes.keys()),
        "changed": [name for name in source.shapes if not source.tensor(name).equal(written.tensor(name))],
        "settings": again.settings == opened.settings and again.settings.classification == TASK,
        "ids": [len(ids), all(ids[name].equal(ids_again[name]) for name in ids)],
        "moved": all(ids[name].tolist() != sorted(ids[name].tolist()) for name in ids),
        "logits": logits(opened.classifier, samples).equal(logits(again.classifier, samples_again)),
    }


def test_a_checkpoint_gives_the_classifier_back_bit_for_bit(tmp_path: Path, tokenizer: Path, task: Path) -> None:
    (found,) = run_ranks(1, round_trip, tmp_path, tokenizer, task)
    assert found == {
        "damages": [],
        "classifier": ["classifier.bias", "classifier.weight"],
        "changed": [],
        "settings": True,
        "ids": [4, True],
        "moved": True,
        "logits": True,
    }


def routers_of_now(topology: Topology, root: Path, tokenizer: Path) -> tuple[float, float]:
    """Largest change of a router by recomputation: with the weights of the switch, and with others."""
    opened = begun(topology, root, tokenizer, {})
    ffns = opened.classifier.model.ffns.values()
    saved = [ffn.router.weight.detach().clone() for ffn in ffns]

    def change() -> float:
        opened.classifier.recompute_routers()
        return max(float((f.router.weight - old).abs().max()) for f, old in zip(ffns, saved, strict=True))

    same = change()
    with torch.no_grad():
        for ffn in ffns:
            ffn.bank.w_in[:32].neg_()
    return same, change()


def test_recomputed_routers_are_those_of_a_switch(tmp_path: Path, tokenizer: Path) -> None:
    ((same, other),) = run_ranks(1, routers_of_now, tmp_path, tokenizer)
    assert same < 1e-6 and other > 0.01


def observed_tokens(topology: Topology, root: Path, tokenizer: Path, task: Path) -> tuple[int, dict[str, int]]:
    """Tokens of the task, and those that each network was seen to compute."""
    opened = begun(topology, root, tokenizer, {})
    samples, ffns = opened.read(task).samples, opened.classifier.model.ffns
    seen = dict.fromkeys(ffns, 0)

    def count(name: str) -> Any:
        return lambda x_TH, _: seen.update({name: seen[name] + len(x_TH)})

    with observed(ffns, {name: count(name) for name in ffns}):
        accuracy(opened.classifier, samples)
    return sum(len(sample["tokens"]) for sample in samples), seen


def test_observers_see_the_tokens_of_the_texts_and_no_others(tmp_path: Path, tokenizer: Path, task: Path) -> None:
    ((tokens, seen),) = run_ranks(1, observed_tokens, tmp_path, tokenizer, task)
    assert set(seen.values()) == {tokens} and tokens > 24 * 4


def refusals(topology: Topology, root: Path, tokenizer: Path) -> list[str]:
    folder = write_random_model(topology, root / "model", tokenizer, {}, {"router": "oracle"})
    opened = begin_classifier(folder, topology, TASK, dropout=0.0, seed=1)
    found = []
    for attempt in (
        lambda: open_classifier(folder, topology),
        lambda: opened.write(root / "model"),
        opened.classifier.recompute_routers,
    ):
        with pytest.raises(ConfigError) as caught:
            attempt()
        found.append(str(caught.value))
    return found


def test_what_cannot_be_is_refused(tmp_path: Path, tokenizer: Path) -> None:
    (found,) = run_ranks(1, refusals, tmp_path, tokenizer)
    assert found[0].endswith("is of a model without a classifier: fine-tune it first")
    assert found[1].endswith("model is not empty: give a folder that is not there yet")
    assert found[2] == "router (recomputed) has no meaning for ssd.router oracle: use as_saved"
