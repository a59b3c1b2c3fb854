"""The tool on a run's checkpoint and on a transformers folder: what it writes is a model like any other."""

import json
import runpy
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from ssd_megatron.export.convert import export_model, import_model
from ssd_megatron.ffn.kernels.trial import fastest_right
from ssd_megatron.moefication.layers import LayerJob, read_result, run_jobs
from ssd_megatron.parallel.topology import Topology
from ssd_megatron.training.model_alone import load_alone
from ssd_megatron.training.saved_model import SavedModel, is_router, open_model, write_model
from tests.layouts import TP2_EP2, Layout, run_layout
from tests.ranks import run_ranks, start_process
from tests.saved_models import T5_11, trained
from tests.small_run import Corpus, records, small_config, train, write_config

TOOL = Path(__file__).parents[2] / "tools" / "moefy.py"
SMALL = ("--num_experts", "8", "--tokens", "512", "--batch", "4", "--processes", "1")


@pytest.fixture(scope="module")
def config(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("dense")
    config = small_config(corpus, folder / "run")
    config["ssd_megatron"]["model"]["dropout"] = 0.0
    config["ssd_megatron"]["ssd"] = {"schedule": "dense", "num_experts": 8, "backend": "torch"}
    config["ssd_megatron"]["training"]["train_steps"] = 30
    return config


@pytest.fixture(scope="module")
def dense(config: dict[str, Any]) -> Path:
    """The folder of a dense run."""
    run_dir = Path(config["ssd_megatron"]["run_dir"])
    train(write_config(config, run_dir.with_suffix(".json")))
    return run_dir


@pytest.fixture(scope="module")
def moefied(dense: Path) -> Path:
    to = dense.parent / "moefied"
    calibration = ("--calibrate_steps", "20", "--calibrate_lr", "0.003")
    assert moefy(dense, to, "--compare", "--top_k", "3", "--top_k_allocation", "equal", *calibration) == 0
    return to


def moefy(source: Path, to: Path, *arguments: str) -> int | None:
    """Exit status of the tool on a language model; what it prints goes to <to>.log."""
    return run_tool(source, to, "--eval_tokens", "256", *arguments)


def run_tool(source: Path, to: Path, *arguments: str) -> int | None:
    """On any model."""
    process = start_process(_tool, to.with_suffix(".log"), "--from", str(source), "--to", str(to), *SMALL, *arguments)
    process.join(240)
    return process.exitcode


def _tool(log: Path, *arguments: str) -> None:
    sys.stdout = sys.stderr = log.open("w", buffering=1)
    sys.argv = [str(TOOL), *arguments]
    runpy.run_path(str(TOOL), run_name="__main__")


def said(to: Path) -> str:
    return " ".join(to.with_suffix(".log").read_text().split())


def figures(to: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((to / "moefication.json").read_text())
    return found


def neurons(saved: SavedModel, network: str) -> set[tuple[float, ...]]:
    """Each neuron's input weights."""
    return {tuple(row) for row in saved.tensor(f"{network}.bank.w_in").tolist()}


def test_neurons_are_regrouped_and_only_w_out_is_calibrated(dense: Path, moefied: Path) -> None:
    before, after = open_model(dense), open_model(moefied)
    assert after.settings.has_experts and after.settings.top_k == [3, 3]
    assert (after.settings.ssd.router, after.settings.ssd.num_experts) == ("mlp", 8)
    for layer in range(2):
        network = f"blocks.{layer}.layer.mlp"
        assert neurons(before, network) == neurons(after, network)
        assert after.shapes[f"{network}.router.weight"] == (8, 32)
    others = [name for name in after.shapes if ".bank." not in name and not is_router(name)]
    assert others and all(before.tensor(name).equal(after.tensor(name)) for name in others)
    assert {p.name for p in moefied.iterdir()} == {"comparison.png", "moefication.json", "step_00000000", ".lock"}


def test_the_figures_are_those_of_the_ladder_of_routers(moefied: Path) -> None:
    found = figures(moefied)
    points = {(p["split"], p["router"], p["top_k"]): p for p in found["comparison"]}
    assert len(points) == 3 * 4 * len({p["top_k"] for p in found["comparison"]})
    for split in ("clustering", "graph", "random"):
        assert points[split, "mlp", 8]["loss"] == pytest.approx(found["dense"]["loss"], rel=1e-5)
        for few in (1, 2, 3):
            oracle, mlp, chance = (points[split, router, few]["recall"] for router in ("oracle", "mlp", "random"))
            assert 1 > oracle >= mlp > chance > 0
    assert found["sparse"]["loss"] == pytest.approx(points["clustering", "mlp", 3]["loss"], rel=1e-5)
    assert found["calibrated"]["loss"] < found["sparse"]["loss"]
    assert imread(moefied / "comparison.png").std() > 0.05


def test_experts_are_dealt_out_to_layers_that_need_them(dense: Path, tmp_path: Path) -> None:
    """The last layer's network gives nothing, so that it needs no more than one."""
    saved, useless = open_model(dense), "blocks.1.layer.mlp.bank.w_out"
    tensors = ((name, saved.tensor(name) * (name != useless)) for name in saved.shapes if not is_router(name))
    write_model(tmp_path / "changed", saved.settings, tensors, data=saved.data)
    asked = ("--top_k", "3", "--router", "similarity", "--top_k_allocation")
    for allocation, expected in (("equal", [3, 3]), ("measured", [5, 1])):
        to = tmp_path / allocation
        assert moefy(tmp_path / "changed", to, *asked, allocation) == 0
        assert open_model(to).settings.top_k == figures(to)["top_k"] == expected
    losses = [figures(tmp_path / allocation)["sparse"]["loss"] for allocation in ("equal", "measured")]
    assert losses[0] != losses[1]


@pytest.mark.parametrize("layout", [Layout(), pytest.param(TP2_EP2, marks=pytest.mark.layouts)], ids=str)
def test_training_goes_on_with_its_experts(
    config: dict[str, Any], moefied: Path, tmp_path: Path, layout: Layout
) -> None:
    """At next to no learning rate: the losses are the tool's."""
    section = config["ssd_megatron"] | {"checkpoint": {"start_from": str(moefied)}}
    section["ssd"] = {"schedule": "sparse", "num_experts": 8, "top_k": 3, "router": "mlp", "partition": "kept"}
    section["ssd"] |= {"top_k_allocation": "equal", "backend": "torch"}
    section["training"] = {"train_steps": 3, "eval_interval": 3, "eval_steps": 2}  # the tool's 16 samples
    still = config | {"ssd_megatron": section, "optimizer": {"type": "AdamW", "params": {"lr": 1e-12}}}
    run_dir = run_layout(tmp_path, layout, still)
    (evaluation,) = records(run_dir, "eval")
    found = figures(moefied)
    assert evaluation["loss_sparse"] == pytest.approx(found["calibrated"]["loss"], rel=1e-5)
    saved, kept = open_model(moefied), open_model(run_dir)
    for name in (name for name in saved.shapes if is_router(name)):
        assert torch.allclose(saved.tensor(name), kept.tensor(name), atol=1e-9)


def test_networks_that_are_done_are_not_done_again(dense: Path, tmp_path: Path) -> None:
    inputs = tmp_path / "inputs.npy"
    np.save(inputs, np.random.default_rng(0).standard_normal((256, 32), dtype=np.float32))
    folder = open_model(dense).folder
    jobs = [
        LayerJob(folder, f"blocks.{i}.layer.mlp", inputs, "graph", 8, ("similarity",), 1, tmp_path / f"{i}.safetensors")
        for i in range(2)
    ]
    assert list(run_jobs(jobs[:1], 1)) == jobs[:1]
    written = jobs[0].result.stat().st_mtime_ns
    assert list(run_jobs(jobs, 2)) == jobs
    assert jobs[0].result.stat().st_mtime_ns == written
    assert not read_result(jobs[0]).labels.equal(read_result(jobs[1]).labels)


def test_another_activation_is_refused_or_adapted(tmp_path: Path, marked_corpus: Corpus) -> None:
    """That of T5 1.1, whose folder of transformers' has heads of an own size, too."""
    prefix, tokenizer = str(marked_corpus.prefix), str(marked_corpus.tokenizer)
    folder = trained(**T5_11 | {"seq_length": 32}).write(tmp_path / "saved")
    export_model(open_model(folder), tmp_path / "hf", "dense", tokenizer=marked_corpus.tokenizer)
    arguments = ("--data", prefix, "--tokenizer", tokenizer, "--router", "similarity")
    assert moefy(tmp_path / "hf", tmp_path / "no", *arguments) == 2
    assert "model.activation (geglu_tanh) lets every neuron fire" in said(tmp_path / "no")
    assert moefy(tmp_path / "hf", tmp_path / "yes", *arguments, "--relu_adapt_steps", "10") == 0
    model = open_model(tmp_path / "yes").settings.model
    assert (model.activation, model.head_dim, model.tie_embeddings) == ("reglu", 16, False)


def test_a_transformers_folder_is_taken_with_data_of_its_own(dense: Path, corpus: Corpus, tmp_path: Path) -> None:
    export_model(open_model(dense), tmp_path / "hf", "dense")
    ours = ("--router", "oracle", "--partition", "random")
    assert moefy(tmp_path / "hf", tmp_path / "without", *ours) == 2
    assert "give --data" in said(tmp_path / "without")
    data = ("--data", str(corpus.prefix), "--tokenizer", str(corpus.tokenizer))
    assert moefy(tmp_path / "hf", tmp_path / "with", *ours, *data) == 0
    assert open_model(tmp_path / "with").settings.ssd.router == "oracle"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--num_experts", "0"), "num_experts (0) must be at least 1"),
        (("--num_experts", "7"), "num_experts (7) must divide the 64 neurons: try 4 or 8"),
        (("--top_k", "9"), "top_k (9) must be between 1 and num_experts (8)"),
        (("--processes", "0"), "processes (0) must be at least 1"),
        (("--tokens", "1"), "tokens (1) must be at least 2"),
        (("--calibrate_steps", "1", "--calibrate_lr", "0"), "calibrate_lr (0.0) must be above 0"),
        (("--calibrate_lr", "0.1"), "calibrate_lr (0.1) has no effect with calibrate_steps (0): leave it out"),
        (("--relu_adapt_lr", "0.1"), "relu_adapt_lr (0.1) has no effect with relu_adapt_steps (0): leave it out"),
        (("--relu_adapt_steps", "9"), "relu_adapt_steps (9) has no effect with model.activation (relu): leave it out"),
        (("--held_out", "dev.tsv"), "held_out (dev.tsv) has no effect with a language model, which is measured on"),
    ],
)
def test_what_cannot_be_or_has_no_effect_is_refused(
    dense: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    assert moefy(dense, tmp_path / "no", *arguments) == 2
    assert message in said(tmp_path / "no")


def test_what_an_interrupted_start_left_is_no_hindrance(dense: Path, tmp_path: Path) -> None:
    (tmp_path / "moefied" / ".tmp-step_00000000").mkdir(parents=True)
    assert moefy(dense, tmp_path / "moefied", "--router", "random") == 2  # somebody's, for all that is known
    (tmp_path / "moefied" / ".moefy").mkdir()
    assert moefy(dense, tmp_path / "moefied", "--router", "random") == 0


def test_a_finished_folder_is_not_written_again(dense: Path, moefied: Path) -> None:
    log = said(moefied)
    assert moefy(dense, moefied) == 2
    assert "is not empty" in said(moefied)
    moefied.with_suffix(".log").write_text(log)


def test_a_corpus_of_another_tokenizer_is_refused(corpus: Corpus, marked_corpus: Corpus, tmp_path: Path) -> None:
    model = trained()
    source = write_model(tmp_path / "saved", replace(model.settings, has_experts=False), model.tensors.items())
    data, tokenizer = ("--data", str(marked_corpus.prefix)), ("--tokenizer", str(corpus.tokenizer))
    assert moefy(source, tmp_path / "no", *data, *tokenizer) == 2
    assert f"was made with the tokenizer {marked_corpus.tokenizer} (480 tokens), not with" in said(tmp_path / "no")


def test_a_tokenizer_that_is_not_where_it_was_can_be_given(tmp_path: Path) -> None:
    model = trained()
    settings = replace(model.settings, has_experts=False, tokenizer=Path("data/own.model"))
    assert moefy(write_model(tmp_path / "saved", settings, model.tensors.items()), tmp_path / "no") == 2
    assert "tokenizer data/own.model, which is not found" in said(tmp_path / "no")


def test_losses_and_data_are_those_of_the_run(marked_corpus: Corpus, tmp_path: Path) -> None:
    """Of a BERT whose loss has two parts, with masks of its own."""
    config = small_config(marked_corpus, tmp_path / "run")
    section = config["ssd_megatron"]
    section["model"] |= {"family": "bert", "num_token_types": 2, "sentence_objective": "next"}
    section["data"] |= {"mask_fraction": 0.4, "whole_words": False}
    section["ssd"] = {"schedule": "dense", "num_experts": 8, "backend": "torch"}
    section["training"] = {"train_steps": 3, "eval_interval": 3, "eval_steps": 2}  # the tool's 16 samples
    train(write_config(config, tmp_path / "ds.json"))
    cheap = ("--router", "random", "--partition", "random")
    assert moefy(tmp_path / "run", tmp_path / "moefied", *cheap) == 0
    (evaluation,) = records(tmp_path / "run", "eval")
    assert figures(tmp_path / "moefied")["dense"]["loss"] == pytest.approx(evaluation["loss_dense"], rel=1e-5)
    data = open_model(tmp_path / "moefied").data
    assert data is not None and (data.mask_fraction, data.whole_words) == (0.4, False)
    assert data == open_model(tmp_path / "run").data
    assert moefy(tmp_path / "moefied", tmp_path / "again", *cheap) == 0  # without --data


def test_a_run_without_a_checkpoint_is_no_folder_of_transformers(tmp_path: Path, corpus: Corpus) -> None:
    (tmp_path / "run").mkdir()
    write_config(small_config(corpus, tmp_path / "run"), tmp_path / "run" / "config.json")
    assert moefy(tmp_path / "run", tmp_path / "no") == 2
    assert f"error: {tmp_path / 'run'} has no checkpoint: give a run_dir" in said(tmp_path / "no")


def kernels(topology: Topology, folder: Path, num_experts: int) -> tuple[set[str], str]:
    """Of an imported model that is going to have so many experts, and those that such experts need."""
    saved = open_model(folder)
    model, few = saved.settings.model, saved.settings.model.ffn_hidden_size // num_experts
    found = {ffn.settings.backend for ffn in load_alone(saved, topology, num_experts).ffns.values()}
    return found, fastest_right(topology.device, torch.float32, model.activation, (few, model.hidden_size))


def test_networks_of_any_size_are_imported_and_get_kernels_for_their_experts(tmp_path: Path) -> None:
    """1000 neurons are no 16 experts; as one they are too large for the kernels that 100 experts have."""
    wide = {"hidden_size": 512, "num_attention_heads": 4, "ffn_hidden_size": 1000}
    export_model(open_model(trained(**wide).write(tmp_path / "saved")), tmp_path / "hf", "dense")
    folder = import_model(tmp_path / "hf", tmp_path / "ours")
    assert (open_model(folder).settings.ssd.num_experts, open_model(folder).settings.top_k) == (1, [1, 1])
    ((found, needed),) = run_ranks(1, kernels, folder, 100)
    assert found == {needed}
