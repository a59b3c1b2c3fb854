"""Models that tensor-parallel ranks use together: real ranks against one process, and tools that a launcher starts."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ssd_megatron.config.schema import ParallelConfig
from ssd_megatron.errors import ConfigError
from ssd_megatron.inference.generate import generate
from ssd_megatron.inference.load import load
from ssd_megatron.inference.model import CausalModel
from ssd_megatron.inference.sampling import Sampling
from ssd_megatron.inference.t5 import EncoderDecoder
from ssd_megatron.parallel.topology import Topology
from tests.ranks import run_ranks
from tests.saved_models import BERT, ROPE, T5, T5_11, trained

ROOT = Path(__file__).parents[2]
MODELS: dict[str, dict[str, Any]] = {
    "gpt": {},
    "gpt, rope, grouped queries, gate, untied": ROPE,
    "gpt, heads of an own size": ROPE | {"kv_channels": 12},
    "gpt, means": {"ssd": {"router": "avg_k"}},
    "gpt, all activations": {"ssd": {"router": "oracle"}},
    "gpt, scaled": {"ssd": {"router": "switch"}},
    "gpt, hashed neurons": {"ssd": {"router": "rand_hash", "num_experts": 64}},
    "bert": BERT,
    "t5": T5,
    "t5 1.1": T5_11,
}


def compute(
    topology: Topology, folder: Path, inputs: list[torch.Tensor], mode: Any, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """Logits, what a family generates greedily, and how much of the model this rank has."""
    model = load(folder, dtype=dtype, mode=mode, group=topology.tensor)
    found: dict[str, Any] = {"logits": model(*inputs), "rows": len(model.ffns[0].bank.w_in)}
    if isinstance(model, CausalModel):
        prompts = [inputs[0][0, :5].tolist(), inputs[0][1, :3].tolist()]
        # One token at a time as well, which other kernels compute.
        found["one"] = model(inputs[0][:1, :1])
        found["generated"] = list(generate(model, prompts, Sampling(seed=3), 8))
    if isinstance(model, EncoderDecoder):
        found["generated"] = list(generate(model.encode(inputs[0]), [[0], [0]], Sampling(greedy=True), 6))
    return found


@pytest.mark.parametrize("mode", ["dense", "sparse"])
@pytest.mark.parametrize("name", MODELS)
def test_two_ranks_compute_what_one_does(tmp_path: Path, name: str, mode: str) -> None:
    expected = trained(**MODELS[name])
    folder = expected.write(tmp_path)
    inputs = [tensor for field, tensor in expected.inputs.items() if field != "position_ids"]
    (alone,) = run_ranks(1, compute, folder, inputs, mode)
    torch.testing.assert_close(alone["logits"], getattr(expected, mode), rtol=1e-4, atol=1e-4)
    ranks = run_ranks(2, compute, folder, inputs, mode, parallel=ParallelConfig(tensor_parallel_size=2))
    for rank in ranks:
        assert rank["rows"] * 2 == alone["rows"]
        assert torch.equal(rank["logits"], ranks[0]["logits"])
        torch.testing.assert_close(rank["logits"], alone["logits"], rtol=1e-4, atol=1e-4)
        if "one" in alone:
            torch.testing.assert_close(rank["one"], alone["one"], rtol=1e-4, atol=1e-4)
        assert rank.get("generated") == alone.get("generated")


def test_two_ranks_in_bf16_are_near(tmp_path: Path) -> None:
    expected = trained()
    layout = ParallelConfig(tensor_parallel_size=2)
    arguments = (expected.write(tmp_path), [expected.tokens], "dense", torch.bfloat16)
    for rank in run_ranks(2, compute, *arguments, parallel=layout):
        assert float((rank["logits"] - expected.dense).norm() / expected.dense.norm()) < 0.03


def refused(topology: Topology, folder: Path, mode: Any) -> str:
    with pytest.raises(ConfigError) as error:
        load(folder, mode=mode, group=topology.tensor)
    return str(error.value)


def test_what_does_not_divide_is_refused(tmp_path: Path) -> None:
    model = trained(num_attention_heads=3, hidden_size=48)
    layout = ParallelConfig(tensor_parallel_size=2)
    (message, _) = run_ranks(2, refused, model.write(tmp_path / "heads"), "dense", parallel=layout)
    assert message == "the number of processes (2) must divide model.num_attention_heads (3): start 1 or 3"
    model = trained(ffn_hidden_size=80, ssd={"num_experts": 5})
    (message, _) = run_ranks(2, refused, model.write(tmp_path / "experts"), "sparse", parallel=layout)
    assert message == "the number of processes (2) must divide ssd.num_experts (5): start 1 or 5"


def test_tools_by_a_launcher(tmp_path: Path, corpus: Any) -> None:
    folder, text = trained().write(tmp_path / "model"), tmp_path / "text.txt"
    text.write_text("Some text that is to be predicted.\n" * 20)
    model = ["--checkpoint", str(folder), "--tokenizer", str(corpus.tokenizer)]
    generate_tool = ["tools/generate.py", *model, "--dtype", "fp32", "--mode", "sparse", "--max_new_tokens", "4"]
    evaluate_tool = ["tools/evaluate.py", *model, "--text", str(text)]

    def run(command: list[str], ranks: int) -> subprocess.CompletedProcess[str]:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        line = [sys.executable, *launcher, *command]
        return subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)

    texts = []
    for ranks in (1, 2):
        file = tmp_path / f"{ranks}.json"
        done = run([*generate_tool, "--prompt", "Some", "--greedy", "--json", str(file)], ranks)
        assert done.returncode == 0, done.stderr
        texts.append(json.loads(file.read_text())[0]["texts"])
        assert done.stdout.count("Some") == 1  # the others are silent
    assert texts[0] == texts[1]
    losses = []
    for ranks in (1, 2):
        file = tmp_path / f"losses {ranks}.json"
        assert run([*evaluate_tool, "--json", str(file)], ranks).returncode == 0
        losses.append([result["loss"] for result in json.loads(file.read_text())["results"]])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    done = run(generate_tool, 2)
    assert done.returncode != 0
    assert "error (rank " in done.stderr
    assert "): 2 processes cannot ask for prompts: give --prompt or --prompts" in done.stderr
