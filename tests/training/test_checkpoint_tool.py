"""tools/checkpoint.py: what it shows, finds and writes, on checkpoints of several ranks."""

import json
import resource
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ssd_megatron.parallel.zero import EXP_AVG, KINDS
from ssd_megatron.training import checkpoint_files as files
from ssd_megatron.training.checkpoint_tools import consolidate, find_checkpoint, verify
from tests.checkpoints import edit_index, model_by_identity
from tests.layouts import Layout, oracle_config, run_layout
from tests.ranks import start_process
from tools import checkpoint as tool

STEPS = 6
W_IN = "blocks.1.layer.mlp.bank.w_in"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One training on two layouts, with a switch before step 4: the run folders."""
    base = tmp_path_factory.mktemp("tool")
    config = oracle_config(base, [(1, "dense"), (4, "sparse")], STEPS)
    layouts = {"one": Layout(), "four": Layout(tensor=2, expert=2, data=2)}
    return {name: run_layout(base / name, layout, config) for name, layout in layouts.items()}


@pytest.fixture
def folder(runs: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the checkpoint that four ranks wrote, which the test may damage."""
    return Path(shutil.copytree(find_checkpoint(runs["four"]), tmp_path / "step_00000006"))


def flip_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-100] ^= 1
    path.write_bytes(content)


def test_inspect_shows_step_mode_layout_partition_and_tensors(
    runs: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    assert tool.main(["inspect", str(runs["four"])]) == 0
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    shown = {row[0]: row[1:] for row in rows if row}
    assert shown["step"] == ["6 of 6"]
    assert shown["mode"] == ["sparse"]
    assert shown["phases"] == ["dense 1-3, sparse 4-6"]
    assert shown["saved on"] == ["tensor-parallel 2, pipeline 1, expert-parallel 2, data-parallel 2 (4 ranks)"]
    assert shown["partition"][0].startswith("8 experts per layer, top_k ")
    assert shown["Adam steps"] == ["decay 6, no_decay 6, router 3"]
    assert "counter flops" in shown
    assert shown["blocks.1.layer.mlp"][:3] == ["64", "8", "8"]
    # 3 kinds of 64 x 32 numbers of 4 bytes, in one file of each home.
    assert shown[W_IN] == ["64 x 32", "0.025", "4"]
    assert len(shown["rank_00003.safetensors"][1]) == 64


def test_a_whole_checkpoint_is_whole(runs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    for run_dir in runs.values():
        assert tool.main(["verify", str(run_dir)]) == 0
        assert "step_00000006 is whole" in capsys.readouterr().out


def test_every_damage_has_a_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flip_bit(folder / "rank_00001.safetensors")
    (folder / "rank_00002.safetensors").unlink()
    (folder / "shared.safetensors").write_bytes(b"short")
    edit_index(folder, lambda index: index["pieces"].pop(f"{W_IN}|exp_avg"))
    assert tool.main(["verify", str(folder)]) == 1
    found = sorted(capsys.readouterr().out.splitlines())
    assert len(found) == 4
    assert found[0] == f"index.json: {W_IN}|exp_avg: elements 0 to 2047 are in no file"
    assert found[1] == "rank_00001.safetensors does not have its checksum"
    assert found[2] == "rank_00002.safetensors is missing"
    assert found[3].startswith("shared.safetensors has 5 bytes instead of ")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda i: i["pieces"][f"{W_IN}|master"][0].update(numel=500), "elements 500 to 511 are in no file"),
        (lambda i: i["pieces"][f"{W_IN}|master"][0].update(numel=600), "elements 512 to 599 are there twice"),
        (lambda i: i["pieces"][f"{W_IN}|master"].reverse(), ""),
        (lambda i: i["shapes"].update({W_IN: [65, 32]}), "elements 2048 to 2079 are in no file"),
        (lambda i: i["shapes"].update({W_IN: [63, 32]}), "elements 2016 to 2047 are there twice or too many"),
        (lambda i: i["shapes"].pop(W_IN), f"has pieces of {W_IN}|exp_avg without its shape"),
        (lambda i: i["files"].pop(), "which it does not list"),
        (lambda i: i["files"].append({**i["files"][0], "name": "more"}), "more is missing"),
        (lambda i: i.update(format_version=1), "has format 1; this version reads format 2"),
    ],
)
def test_an_index_that_does_not_fit_is_found(folder: Path, change: Callable[[dict], object], said: str) -> None:
    edit_index(folder, change)
    found = verify(folder)
    assert (said in found[0]) if said else found == []


def rewrite(folder: Path, name: str, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of a file and enter its new size and checksum."""
    tensors = load_file(folder / name)
    change(tensors)
    save_file(tensors, folder / name)
    record = {"name": name, "size": (folder / name).stat().st_size, "sha256": files.sha256_of(folder / name)}
    edit_index(folder, lambda i: i.update(files=[record if f["name"] == name else f for f in i["files"]]))


def test_files_that_hold_something_else_are_found(folder: Path) -> None:
    rewrite(folder, "rank_00000.safetensors", lambda t: t.update({"x|master": torch.ones(1)}))
    rewrite(folder, "rank_00003.safetensors", lambda t: t.update({f"{W_IN}|master": torch.ones(3)}))
    assert verify(folder) == [
        "rank_00000.safetensors has [1] elements of x|master, index.json none",
        f"rank_00003.safetensors has [3] elements of {W_IN}|master, index.json [512]",
    ]


def test_a_neuron_that_is_there_twice_is_found(folder: Path) -> None:
    rewrite(folder, "shared.safetensors", lambda t: t["blocks.0.layer.mlp.bank.neuron_ids"].__setitem__(1, 5))
    assert verify(folder) == ["shared.safetensors does not have each neuron of blocks.0.layer.mlp.bank once"]


def test_one_file_of_four_ranks_is_the_model_of_one_process(runs: dict[str, Path], tmp_path: Path) -> None:
    out = {name: tmp_path / f"{name}.safetensors" for name in runs}
    for name, run_dir in runs.items():
        assert tool.main(["consolidate", str(run_dir), "--out", str(out[name])]) == 0
    identities = [load_file(path)["blocks.0.layer.mlp.bank.neuron_ids"] for path in out.values()]
    assert not torch.equal(*identities)
    one, four = (model_by_identity(find_checkpoint(run_dir), tmp_path / "model") for run_dir in runs.values())
    assert one.keys() == four.keys() and len(one) == 30
    for name, expected in one.items():
        torch.testing.assert_close(four[name], expected, rtol=1e-5, atol=1e-6)
    with safe_open(out["four"], framework="pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in one}
        metadata = file.metadata()
    assert shapes == files.read_index(find_checkpoint(runs["four"])).shapes
    assert metadata["step"] == "6" and metadata["kind"] == "master" and metadata["format"] == "pt"
    assert json.loads(metadata["config"])["model.hidden_size"] == 32


def test_kind_and_dtype_are_those_asked_for(folder: Path, tmp_path: Path) -> None:
    index = files.read_index(folder)
    size = consolidate(folder, tmp_path / "moments", EXP_AVG, torch.bfloat16)
    assert size == (tmp_path / "moments").stat().st_size
    found = load_file(tmp_path / "moments")
    for name, shape in index.shapes.items():
        expected = files.read_interval(folder, index, files.key_of(name, EXP_AVG), 0, torch.Size(shape).numel())
        assert found[name].dtype == torch.bfloat16 and expected.abs().max() > 0
        assert torch.equal(found[name].flatten(), expected.to(torch.bfloat16))


def limited(argv: list[str], limit: int) -> None:
    """The tool where no file can grow beyond `limit` bytes: writing fails as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    sys.exit(tool.main(argv))


def test_a_full_disk_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out" / "model.safetensors"
    out.parent.mkdir()
    out.write_text("the model before")
    process = start_process(limited, ["consolidate", str(folder), "--out", str(out)], 20_000)
    process.join(60)
    assert process.exitcode == 1
    assert [path.name for path in out.parent.iterdir()] == [out.name] and out.read_text() == "the model before"


def test_no_model_is_made_of_a_damaged_checkpoint(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flip_bit(folder / "rank_00001.safetensors")
    assert tool.main(["consolidate", str(folder), "--out", str(tmp_path / "model")]) == 1
    assert "is damaged: rank_00001.safetensors does not have its checksum" in capsys.readouterr().err
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("command", ["inspect", "verify", "consolidate"])
def test_wrong_folders_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    more = ["--out", str(tmp_path / "out")] if command == "consolidate" else []
    assert tool.main([command, str(tmp_path / "nowhere"), *more]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'nowhere'} is no folder: give a run_dir")
    assert tool.main([command, str(tmp_path), *more]) == 2
    assert "has no checkpoint: give a run_dir" in capsys.readouterr().err
    (tmp_path / "step_00000001").mkdir()
    assert tool.main([command, str(tmp_path / "step_00000001"), *more]) == 1
    captured = capsys.readouterr()
    assert "index.json cannot be read: [Errno 2] No such file or directory" in captured.out + captured.err


TENSORS, NUMEL = 10, 1_000_000


def measure_consolidate(folder: Path, report: Path) -> None:
    """Peak growth of this process's own memory, in bytes."""

    def own_memory() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

    def watch() -> None:
        while not done.wait(0.001):
            peaks.append(own_memory())

    torch.set_num_threads(1)
    done, peaks = threading.Event(), [own_memory()]
    thread = threading.Thread(target=watch)
    thread.start()
    consolidate(folder, folder.parent / "model.safetensors")
    done.set()
    thread.join()
    report.write_text(str(max(peaks) - peaks[0]))


def test_consolidating_needs_the_memory_of_the_largest_tensor(tmp_path: Path) -> None:
    folder = files.temporary_folder(tmp_path, 1)
    folder.mkdir()
    names = [f"tensor{i}" for i in range(TENSORS)]
    values = {files.key_of(name, kind): torch.zeros(NUMEL) for name in names for kind in KINDS}
    records = [
        files.write_tensors(folder, files.rank_file(0), values),
        files.write_tensors(folder, files.SHARED, {"labels": torch.zeros(1)}),
    ]
    pieces = {key: [files.Piece(files.rank_file(0), 0, NUMEL)] for key in values}
    index = files.Index(1, dict.fromkeys(names, (NUMEL,)), pieces, {"identity": {}}, records)
    folder = files.commit(tmp_path, index)
    process = start_process(measure_consolidate, folder, tmp_path / "report")
    process.join(60)
    assert process.exitcode == 0
    assert (tmp_path / "model.safetensors").stat().st_size > TENSORS * NUMEL * 4
    assert int((tmp_path / "report").read_text()) < 4.5 * NUMEL * 4
