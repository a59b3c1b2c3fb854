"""A study of a run's checkpoints against what the run itself measured on its way."""

import csv
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.image import imread
from torch import Tensor

from ssd_megatron.errors import ConfigError, DataError
from ssd_megatron.parallel.topology import Topology
from ssd_megatron.study.activations import OTHER_SAMPLE, LayerLook, Look, fired_tokens, look, overlaps, similarities
from ssd_megatron.study.pictures import draw_structure
from ssd_megatron.study.subject import find_checkpoints, prepare
from ssd_megatron.switching.statistics import observed, pack_bits
from tests.ranks import run_ranks, start_process
from tests.small_run import Corpus, records, small_config, train, write_config

TOOL = Path(__file__).parents[2] / "tools" / "study_activations.py"
PROBE_SAMPLES = 8


@pytest.fixture(scope="module")
def run_dir(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 steps on two tensor-parallel ranks, with the checkpoints of steps 4, 8, 12 and 16."""
    folder = tmp_path_factory.mktemp("study")
    config = small_config(corpus, folder / "run")
    config["ssd_megatron"]["checkpoint"]["interval"] = 4
    config["ssd_megatron"]["parallel"] = {"tensor_parallel_size": 2}
    train(write_config(config, folder / "ds.json"), world_size=2)
    return folder / "run"


def tool(*arguments: str) -> None:
    sys.argv = [str(TOOL), *arguments]
    runpy.run_path(str(TOOL), run_name="__main__")


def table(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_the_tool_finds_what_the_run_s_checks_found(run_dir: Path, tmp_path: Path) -> None:
    process = start_process(tool, str(run_dir), "--out", str(tmp_path), "--samples", str(PROBE_SAMPLES))
    process.join(120)
    assert process.exitcode == 0
    layers = table(tmp_path / "layers.csv")
    assert [(row["step"], row["layer"]) for row in layers] == [(s, n) for s in ("4", "8", "12", "16") for n in "01"]
    (check,) = [record for record in records(run_dir, "check") if record["step"] == 12]
    assert [float(row["active"]) for row in layers[4:6]] == pytest.approx(check["active_fraction"], abs=1e-3)
    rates = [float(row["rate"]) for row in table(tmp_path / "neuron_rates.csv")]
    assert len(rates) == 4 * 2 * 101 and rates[:101] == sorted(rates[:101])
    rows = table(tmp_path / "structure.csv")
    structure = {(row["layer"], row["step_a"], row["step_b"]): row["similarity"] for row in rows}
    assert len(structure) == 2 * 4 * 4 and 0 < float(structure["0", "8", "8"]) <= 1
    assert structure["1", "4", "16"] == structure["1", "16", "4"] != "1"
    distances = [row["distance"] for row in table(tmp_path / "expert_overlap.csv")][:5]
    assert distances == ["1", "2", "4", "8", "other sample"]
    for name in ("active_neurons", "neurons", "structure", "expert_overlap"):
        assert imread(tmp_path / f"{name}.png").std() > 0.05


def measured(topology: Topology, run_dir: Path) -> tuple[list[float], list[tuple[Tensor, Tensor]]]:
    """Dense probe losses at steps 4 and 8; of step 8, where neurons have moved, rates as studied and as counted."""
    subject = prepare(run_dir, topology, PROBE_SAMPLES)
    losses = []
    for folder in find_checkpoints(run_dir)[:2]:
        step = subject.load(folder)
        losses.append(subject.probe.loss())
    counts: dict[str, Any] = {}
    ffns = subject.model.ffns

    def count(name: str) -> Any:
        return lambda _x_TH, pre_TF: counts.update({name: (pre_TF > 0).double().mean(0)})

    batches = subject.probe.batches
    with observed(ffns, {name: count(name) for name in ffns}):
        subject.probe.mean_loss([{field: torch.cat([batch[field] for batch in batches]) for field in batches[0]}])
    found = look(subject, step, None)
    pairs = []
    for layer, (name, ffn) in zip(found.layers, ffns.items(), strict=True):
        by_identity = torch.empty_like(counts[name])
        by_identity[ffn.bank.neuron_ids] = counts[name]
        assert ffn.bank.neuron_ids.tolist() != list(range(64))
        pairs.append((layer.rates, by_identity))
    return losses, pairs


def test_weights_are_those_of_the_checkpoint_and_rates_go_by_neuron(run_dir: Path) -> None:
    ((losses, pairs),) = run_ranks(1, measured, run_dir)
    switches = {record["step"]: record["loss_before"] for record in records(run_dir, "switch")}
    assert losses == pytest.approx([switches[5], switches[9]], abs=1e-5)
    for studied, counted in pairs:
        assert studied.tolist() == pytest.approx(counted.tolist(), abs=1e-9)


def test_bits_are_counted_by_row() -> None:
    bits = torch.rand(5, 21, generator=torch.Generator().manual_seed(1)) > 0.5
    assert fired_tokens(pack_bits(bits)).tolist() == bits.sum(1).tolist()


def test_overlap_is_taken_at_distances_within_samples_and_across_them() -> None:
    ids = torch.tensor([[0, 1], [0, 2], [0, 1], [6, 7], [6, 5], [6, 7]])  # two samples of three tokens
    assert overlaps(ids, 2, 8) == {1: 0.5, 2: 1.0, OTHER_SAMPLE: 0.0}
    assert overlaps(ids[:3], 1, 8) == {1: 0.5, 2: 1.0}


def of_labels(step: int, *labels: int) -> Look:
    rates = torch.tensor([0.0, 0.5, 0.995, 1.0], dtype=torch.float64)
    return Look(step, [LayerLook(rates, torch.tensor(labels), 0.75, {1: 0.5})])


def test_structures_are_alike_whatever_the_names_of_experts() -> None:
    looks = [of_labels(10, 0, 0, 1, 1), of_labels(20, 1, 1, 0, 0), of_labels(30, 0, 1, 0, 1)]
    found = [value for row in similarities(looks, 0) for value in row]
    assert found == pytest.approx([0.75, 1.0, -0.5, 1.0, 0.75, -0.5, -0.5, -0.5, 0.75])
    axes = draw_structure(looks, [similarities(looks, 0)]).axes[0]
    assert axes.get_title() == "mean of the layers" and axes.get_images()[0].get_array().shape == (3, 3)


def test_dead_and_always_on_neurons_are_shares() -> None:
    (layer,) = of_labels(10, 0, 0, 1, 1).layers
    assert (layer.dead, layer.always_on, layer.active) == (0.25, 0.5, pytest.approx(2.495 / 4))


def test_a_folder_without_checkpoints_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no checkpoints/: give the run_dir of a run that has saved one"):
        find_checkpoints(tmp_path)


def probed(topology: Topology, run_dir: Path) -> tuple[float, list[float]]:
    """Probe loss, and the mean of each part of it."""
    with pytest.raises(ConfigError, match=r"samples \(0\) must be at least 1"):
        prepare(run_dir, topology, 0)
    subject = prepare(run_dir, topology, PROBE_SAMPLES)
    parts: dict[str, list[Tensor]] = {}
    with torch.no_grad():
        for batch in subject.probe.batches:
            for mask, losses in subject.model(batch).items():
                parts.setdefault(mask, []).append(losses[batch[mask] > 0])
    return subject.probe.loss(), [float(torch.cat(losses).mean()) for losses in parts.values()]


def test_the_probe_loss_has_the_parts_that_training_has(marked_corpus: Corpus, tmp_path: Path) -> None:
    config = small_config(marked_corpus, tmp_path) | {"gradient_accumulation_steps": 4}
    pairs = {"family": "bert", "num_token_types": 2, "sentence_objective": "next", "dropout": 0.0}
    config["ssd_megatron"]["model"] |= pairs
    write_config(config, tmp_path / "config.json")
    ((loss, parts),) = run_ranks(1, probed, tmp_path)
    assert len(parts) == 2 and loss == pytest.approx(sum(parts), rel=1e-6)
