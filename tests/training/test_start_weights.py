"""Runs that start from another model's weights: an imported one, or another run's."""

from pathlib import Path
from typing import Any

import pytest

from ssd_megatron.export.convert import export_model, import_model
from ssd_megatron.inference.load import load
from ssd_megatron.training.saved_model import open_model
from tests.layouts import ONE, TP2_PP2, Layout, oracle_config, run_layout
from tests.small_run import Ranks, records, write_config

PHASES = [(1, "dense"), (4, "sparse")]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    optimizer = {"type": "AdamW", "params": {"lr": 0.01}}  # learns in six steps
    return oracle_config(tmp_path_factory.mktemp("corpus"), PHASES, 6) | {"optimizer": optimizer}


@pytest.fixture(scope="module")
def imported(config: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense run's model, exported as OPT and imported; and the run itself beside it."""
    folder = tmp_path_factory.mktemp("start")
    section = config["ssd_megatron"]
    dense = config | {"ssd_megatron": section | {"ssd": {"schedule": "dense"}}}
    export_model(open_model(run_layout(folder / "dense", ONE, dense)), folder / "hf", "dense")
    import_model(folder / "hf", folder / "imported")
    return folder / "imported"


def losses(folder: Path, config: dict[str, Any], start_from: Path | None, layout: Layout = ONE) -> list[float]:
    section = config["ssd_megatron"] | {"checkpoint": {"start_from": None if start_from is None else str(start_from)}}
    run_dir = run_layout(folder, layout, config | {"ssd_megatron": section})
    return [record["loss"] for record in records(run_dir, "train")]


def test_training_starts_with_the_imported_weights_loss(tmp_path: Path, config: dict[str, Any], imported: Path) -> None:
    from_run = losses(tmp_path / "a", config, imported.parent / "dense" / "run")
    from_import = losses(tmp_path / "b", config, imported, TP2_PP2)
    anew = losses(tmp_path / "c", config, None)
    # Also after the switch to sparse, which makes experts of the dense model.
    assert from_import == pytest.approx(from_run, rel=1e-5) and len(from_import) == 6
    last = records(imported.parent / "dense" / "run", "train")[-1]["loss"]
    assert abs(from_import[0] - last) < 0.25 * (anew[0] - last)
    model = load(tmp_path / "b" / "run", mode="sparse")
    assert all(ffn.router is not None for ffn in model.ffns)


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
