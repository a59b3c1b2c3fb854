"""Runs that start from another model's weights: an imported one, or another run's."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from ssd_megatron.export.convert import export_model, import_model
from ssd_megatron.training.saved_model import open_model
from tests.layouts import ONE, TP2_PP2, oracle_config, run_layout
from tests.small_run import Ranks, records, write_config

PHASES = [(1, "dense"), (4, "sparse")]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return oracle_config(tmp_path_factory.mktemp("corpus"), PHASES, 6)


@pytest.fixture(scope="module")
def imported(config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense run's model, exported as OPT and imported; and the run itself beside it."""
    folder = tmp_path_factory.mktemp("start")
    section = config["ssd_megatron"]
    dense = with_rate(config, 0.01) | {"ssd_megatron": section | {"ssd": {"schedule": "dense"}}}
    export_model(open_model(run_layout(folder / "dense", ONE, dense)), folder / "hf", "dense")
    import_model(folder / "hf", folder / "imported")
    return folder / "imported"


def with_rate(config: dict[str, Any], rate: float) -> dict[str, Any]:
    return config | {"optimizer": {"type": "AdamW", "params": {"lr": rate}}}


def test_training_starts_with_the_imported_weights_loss(tmp_path: Path, config: dict[str, Any], imported: Path) -> None:
    """At next to no learning rate, so that weights stay; then a switch makes experts of the dense model."""
    found = {}
    for name, start_from, layout in (("run", imported.parent / "dense" / "run", ONE), ("import", imported, TP2_PP2)):
        section = config["ssd_megatron"] | {"checkpoint": {"start_from": str(start_from)}}
        run_dir = run_layout(tmp_path / name, layout, with_rate(config, 1e-12) | {"ssd_megatron": section})
        found[name] = [record["loss"] for record in records(run_dir, "train")]
        evaluations = records(run_dir, "eval")
        expected = records(imported.parent / "dense" / "run", "eval")[-1]["loss_dense"]
        assert [record["loss_dense"] for record in evaluations] == pytest.approx([expected] * 2, rel=1e-5)
        assert evaluations[1]["loss_sparse"] != pytest.approx(expected, rel=1e-5)
    assert found["import"] == pytest.approx(found["run"], rel=1e-5) and len(found["run"]) == 6


def test_damaged_weights_are_refused(tmp_path: Path, config: dict[str, Any], imported: Path) -> None:
    damaged = shutil.copytree(imported, tmp_path / "damaged")
    (file,) = damaged.glob("*/rank_00000.safetensors")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    path = write_config(config, tmp_path / "run.json")
    sets = [f"ssd_megatron.run_dir={tmp_path / 'run'}", f"ssd_megatron.checkpoint.start_from={damaged}"]
    ranks = Ranks(path, *sets)
    assert ranks.wait() == [1]
    said = f"{file.parent} is damaged (rank_00000.safetensors does not have its checksum). Name another checkpoint"
    assert f"error: checkpoint.start_from ({damaged}): {said}" in ranks.output()


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("model.activation", "gelu", "is of another model: model.activation is 'gelu', there 'relu'"),
        ("model.seq_length", 8, "of another shape: embedding.position.weight ([16, 32] instead of [8, 32])"),
        ("checkpoint.start_from", "nowhere", "checkpoint.start_from (nowhere) cannot be used: nowhere is no folder"),
    ],
)
def test_weights_of_another_model_are_refused(
    tmp_path: Path, config: dict[str, Any], imported: Path, field: str, value: object, said: str
) -> None:
    path = write_config(config, tmp_path / "run.json")
    sets = [f"ssd_megatron.run_dir={tmp_path / 'run'}", f"ssd_megatron.checkpoint.start_from={imported}"]
    ranks = Ranks(path, *sets, f"ssd_megatron.{field}={value}")
    assert ranks.wait()[0] in (1, 2)
    assert said in ranks.output()
