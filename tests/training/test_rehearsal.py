"""One rank of a job on paper: who owns what is what the engine says, and a large job fits into seconds."""

import json
import resource
from pathlib import Path

import pytest

from pretrain_ssd import main
from ssd_megatron.config.load import Hardware, load_config
from ssd_megatron.config.schema import ParallelConfig
from ssd_megatron.errors import ConfigError
from ssd_megatron.parallel.topology import Topology
from ssd_megatron.switching.switch import neuron_tensor_names
from ssd_megatron.training.rehearsal import Rehearsal, owners_on_paper, rehearse
from tests.ranks import forkserver, run_ranks
from tests.small_engine import NOWHERE, build, run_config
from tests.small_run import small_config

LAYOUTS = [
    (1, {}),
    (3, {}),
    (2, {"tensor_parallel_size": 2}),
    (4, {"tensor_parallel_size": 2, "expert_parallel_size": 2}),
    (4, {"expert_parallel_size": 2}),
    (4, {"pipeline_parallel_size": 2, "expert_parallel_size": 2}),
]
EXAMPLES = Path(__file__).parents[2] / "examples"


def owners(topology: Topology, parallel: ParallelConfig) -> int:
    config = run_config(topology.world.size, hidden_size=36, num_query_groups=2, parallel=parallel.model_dump())
    model, engine = build(topology, config)
    names = [tensor for name, ffn in model.ffns.items() for tensor in neuron_tensor_names(name, ffn)]
    on_paper = owners_on_paper(model, topology)
    assert set(on_paper) == set(names)
    for name in names:
        assert on_paper[name] == engine.state.owners(name), name
    return len(names)


@pytest.mark.parametrize(("ranks", "sizes"), LAYOUTS)
def test_owners_on_paper_are_those_of_the_engine(ranks: int, sizes: dict[str, int]) -> None:
    parallel = ParallelConfig(**sizes)
    assert all(count > 0 for count in run_ranks(ranks, owners, parallel, parallel=parallel))


def rehearse_in_a_process(results: "object", path: Path, rank: int, world_size: int) -> None:
    config = load_config(path, world_size=world_size, hardware=Hardware("cuda", True, "H100", True))
    rehearsal = rehearse(config, rank)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    results.put((rehearsal, peak))  # type: ignore[attr-defined]


def rehearsal_of(config: dict, folder: Path, rank: int, world_size: int) -> tuple[Rehearsal, int]:
    """One rank of a job, and the most memory that its process had, in bytes."""
    path = folder / "ds.json"
    path.write_text(json.dumps(config))
    results = forkserver().Queue()
    process = forkserver().Process(target=rehearse_in_a_process, args=(results, path, rank, world_size))
    process.start()
    rehearsal, peak = results.get(timeout=200)
    process.join()
    return rehearsal, peak


def test_a_rank_of_a_job_of_1024(tmp_path: Path) -> None:
    config = json.loads((EXAMPLES / "gpt" / "70b.json").read_text())
    config["train_batch_size"] = 1024
    config["ssd_megatron"]["parallel"] = {
        "tensor_parallel_size": 8,
        "pipeline_parallel_size": 8,
        "expert_parallel_size": 4,
    }
    rehearsal, peak = rehearsal_of(config, tmp_path, 517, 1024)
    assert (rehearsal.rank, rehearsal.world_size) == (517, 1024)
    assert {name: len(ranks) for name, ranks in rehearsal.groups.items()} == {
        "tensor-parallel": 8,
        "pipeline": 8,
        "data-parallel": 16,
        "expert-parallel": 4,
        "expert-data-parallel": 4,
    }
    assert rehearsal.blocks == range(40, 50)
    assert rehearsal.seconds < 60
    assert peak < 4 * 2**30
    # A random order leaves a neuron where it is with probability 1 / homes; each rank owns a quarter of its home's.
    bank = 10 * 3 * 28672 * 8192 / 32 / 4 * 12
    assert rehearsal.sent == pytest.approx(bank * 31 / 32, rel=0.05)
    assert rehearsal.received == pytest.approx(bank * 31 / 32, rel=0.05)


def test_a_rank_that_is_not_there_is_refused(tmp_path: Path) -> None:
    config = run_config(2)
    with pytest.raises(ConfigError, match=r"--rank \(2\) must be between 0 and 1"):
        rehearse(config, 2)


def test_a_dry_run_of_a_rank_that_is_not_there_is_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(small_config(NOWHERE, tmp_path / "run")))
    assert main(["--ds_config", str(path), "--dry_run", "--world_size", "4", "--rank", "4"]) == 2
    output = capsys.readouterr()
    assert output.err == "error: --rank (4) must be between 0 and 3\n"
    assert output.out == ""
