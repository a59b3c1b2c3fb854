"""benchmarks.quality on two tiny runs: a line for each model and router, which ends at the dense loss."""

from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.image import imread

from benchmarks import quality
from ssd_megatron.errors import ConfigError
from ssd_megatron.training.saved_model import open_model
from tests.benchmarks.helpers import run_benchmark
from tests.small_run import Corpus, small_config, train, write_config


@pytest.fixture(scope="module")
def runs(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Run folders by arm."""
    folder = tmp_path_factory.mktemp("quality")
    for name, ssd in (("dense", {"schedule": "dense", "phases": None}), ("ssd", {})):
        config = small_config(corpus, folder / name)
        config["ssd_megatron"]["ssd"] |= ssd
        config["ssd_megatron"]["model"]["init_std"] = 0.2  # so that networks matter from the first step on
        train(write_config(config, folder / f"{name}.json"))
    return {name: folder / name for name in ("dense", "ssd")}


def test_lines_lead_to_the_dense_loss(runs: dict[str, Path], tmp_path: Path) -> None:
    sizes = ("--tokens", "512", "--eval_tokens", "256", "--threads", "1")
    arguments = ("--dense", str(runs["dense"]), "--ssd", str(runs["ssd"]), "--out", str(tmp_path / "out"))
    rows = run_benchmark("quality", tmp_path, *arguments, *sizes)
    shares = ("12%", "25%", "38%", "62%", "75%", "100%")  # of 8 experts 1, 2, 3, 5, 6 and 8
    moefied = [f"MoEfied, {router}{dealt}" for router in ("similarity", "mlp") for dealt in ("", ", dealt out")]
    names = (*moefied, "SSD with 25% in sparse phases")
    assert [row["name"] for row in rows] == [f"{n}, {s} of the neurons: loss / dense" for n in names for s in shares]
    for line in (rows[start : start + 6] for start in range(0, 30, 6)):
        assert line[-1]["value"] == pytest.approx(1, rel=1e-5)
        assert abs(line[0]["value"] - 1) > 1e-4
        assert all(row["value"] == row["details"]["loss"] / row["details"]["dense"] for row in line)
        assert len({row["details"]["dense"] for row in line}) == 1
    assert len({row["details"]["dense"] for row in rows[:24]}) == 1
    assert rows[0]["details"]["dense"] != rows[24]["details"]["dense"]
    height, width, _ = imread(tmp_path / "out" / "quality.png").shape
    assert (width, height) == (960, 600)


@pytest.mark.parametrize(
    ("arm", "message"),
    [
        ("ssd", 'has formed experts: give a run with ssd.schedule "dense"'),
        ("dense", "has never formed experts: give a run that has switched"),
    ],
)
def test_one_run_is_dense_and_the_other_is_not(
    runs: dict[str, Path], arm: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert quality.main(["--dense", str(runs[arm]), "--ssd", str(runs[arm])]) == 2
    assert message in capsys.readouterr().err


def test_runs_must_be_alike(runs: dict[str, Path]) -> None:
    dense, ssd = open_model(runs["dense"]), open_model(runs["ssd"])
    quality.check_pair(dense, ssd)
    values = ssd.index.values | {"identity": ssd.index.values["identity"] | {"model.activation": "gelu", "seed": 9}}
    other = replace(ssd, index=replace(ssd.index, step=9, values=values))
    wanted = r"equal in model.activation \(relu, gelu\), seed \(\d+, 9\), steps \(16, 9\): give runs"
    with pytest.raises(ConfigError, match=wanted):
        quality.check_pair(dense, other)
