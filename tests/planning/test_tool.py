"""tools/plan.py: what it prints, writes and refuses, and that docs/planning.md has what it prints."""

import importlib.util
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = (ROOT / "docs" / "planning.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^python tools/plan\.py (.*--markdown.*)$", DOCS, re.MULTILINE)


MICRO = "train_micro_batch_size_per_gpu"


def tool() -> Callable[[list[str]], int]:
    spec = importlib.util.spec_from_file_location("plan_tool", ROOT / "tools" / "plan.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    main: Callable[[list[str]], int] = module.main
    return main


def config(size: str = "13b") -> list[str]:
    return ["--ds_config", str(ROOT / "examples" / "gpt" / f"{size}.json"), "--gpus", "64"]


def test_there_is_a_table_of_each_size_in_the_docs() -> None:
    assert ["1.3b" in c for c in COMMANDS].count(True) >= 1
    assert any("13b" in c and "--gpus 64" in c for c in COMMANDS)
    assert any("70b" in c and "--gpus 1024" in c for c in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_tables_of_the_docs_are_what_their_commands_print(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert tool()(shlex.split(command)) == 0
    assert capsys.readouterr().out.strip() in DOCS


def test_a_layout_asked_for_is_shown_with_memory_bytes_and_times(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "plan.json"
    sizes = ["--tensor", "2", "--pipeline", "4", "--expert", "2", "--set", "zero_optimization.stage=1"]
    assert tool()([*config(), *sizes, "--json", str(path)]) == 0
    output = capsys.readouterr().out
    for word in ("memory of the fullest rank", "reduce-scatter", "all-to-all", "bubble", "switch to sparse"):
        assert word in output
    written = json.loads(path.read_text())
    (plan,) = written["plans"]
    assert plan["layout"] | {"tensor": 2, "pipeline": 4, "expert": 2, "data": 8} == plan["layout"]
    assert written["cluster"]["inter_gbs"] == 50.0
    assert plan["fits"] and 10 < plan["memory_total"] / 2**30 < 30
    assert plan["step_seconds"]["dense"] == pytest.approx(sum(plan["seconds"]["dense"].values()))


def test_weights_gathered_once_a_step_take_memory_and_save_bytes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plans = []
    for gather in ("microbatch", "step"):
        path = tmp_path / f"{gather}.json"
        setting = f"ssd_megatron.parallel.dense_gather={gather}"
        assert tool()([*config(), "--pipeline", "4", "--expert", "2", "--set", setting, "--json", str(path)]) == 0
        assert f" {gather} " in capsys.readouterr().out
        plans += json.loads(path.read_text())["plans"]
    (passes, once), banks = plans, 40 // 4 * 2 * 5120 * 20480 * 2
    assert passes["memory"]["kept_weights"] == 0
    assert once["memory"]["kept_weights"] == pytest.approx(banks, rel=0.01)
    assert once["memory_total"] > passes["memory_total"]
    sent = [
        sum(t["sent"] * t["times"] for t in plan["traffic"]["dense"] if t["group"] == "expert")
        for plan in (passes, once)
    ]
    assert sent[0] > 8 * sent[1] > 0


def test_settings_that_only_some_layouts_take_do_not_stop_a_recommendation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = json.loads(Path(config()[1]).read_text())
    given["ssd_megatron"].setdefault("parallel", {})["dense_gather"] = "step"
    given["ssd_megatron"]["ssd"]["rebalance_limit"] = 1.2
    (tmp_path / "ds.json").write_text(json.dumps(given))
    assert tool()(["--ds_config", str(tmp_path / "ds.json"), "--gpus", "64"]) == 0
    recommended = capsys.readouterr().out
    assert tool()(config()) == 0
    assert recommended == capsys.readouterr().out


def test_recommendations_are_as_many_as_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "plan.json"
    assert tool()([*config(), "--top", "3", "--json", str(path), "--link", "intra=300", "inter=25"]) == 0
    written = json.loads(path.read_text())
    assert len(written["plans"]) == 3
    assert (written["cluster"]["intra_gbs"], written["cluster"]["inter_gbs"]) == (300.0, 25.0)
    capsys.readouterr()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tensor", "16"], "parallel.tensor_parallel_size (16) must divide model.num_attention_heads (40)"),
        (["--tensor", "2", "--pipeline", "5"], "must divide the number of processes (64)"),
        (["--expert", "5"], "parallel.expert_parallel_size (5) must divide the data parallel size (64"),
        (
            ["--pipeline", "4", "--set", "zero_optimization.stage=2"],
            "zero_optimization.stage (2) does not work with pipeline_parallel_size (4): use stage 1",
        ),
        (["--gpus_per_node", "24"], "--gpus (64) must be whole nodes of --gpus_per_node (24)"),
        (["--link", "outer=3"], "--link outer=3: must be intra=GB/s or inter=GB/s"),
        (["--link", "inter=fast"], "--link inter=fast: must be"),
        (["--top", "0"], "--top (0) must be at least 1"),
        (["--tensor", "0"], "tensor_parallel_size (0)"),
        (["--set", f"{MICRO}=4"], f"--set {MICRO}=4 has no effect on what is compared here: leave it out, or name one"),
        (["--expert", "2", "--set", "ssd_megatron.parallel.tensor_parallel_size=2"], "tensor_parallel_size=2 has no"),
        (["--fraction", "50"], "--fraction (50.0) must be a share of the peak"),
        (["--set", "ssd_megatron.model.num_layers=1600"], "no layout fits into the 71.6 GiB"),
    ],
)
def test_impossible_sizes_end_with_status_2_and_one_message(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tool()([*config(), *arguments]) == 2
    output = capsys.readouterr()
    assert message in output.err and output.out == ""
    assert "Traceback" not in output.err
