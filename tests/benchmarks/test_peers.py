"""benchmarks.peers on tiny networks: every peer is there, and gives what brute force gives."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.peer_kinds import PEERS, ours
from benchmarks.peer_problem import Contender, Problem
from benchmarks.peers import TOLERANCE, Case, check, compare
from benchmarks.row import Missing, Row
from tests.benchmarks.helpers import run_benchmark

CPU = torch.device("cpu")


@pytest.mark.parametrize("activation", ["relu", "reglu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_peer_runs_or_says_why_not(activation: str, dtype: torch.dtype) -> None:
    case = Case(dtype, hidden=32, neurons=128, experts=8, tokens=64, activation=activation, goal=1.0)
    rows = {row.name.partition("ours / ")[2]: row for row in compare(case, turns=1, device=CPU)}
    assert set(rows) == set(PEERS) - {"ours"}
    reasons = {name: row.reason for name, row in rows.items() if isinstance(row, Missing)}
    expected = {"megablocks": "needs CUDA", "scattermoe": "needs CUDA"}
    if activation == "relu":
        expected["DeepSpeed GroupedExperts"] = "its experts are gated"
    assert reasons == expected
    errors = [float(str(row.details["theirs"])) for row in rows.values() if isinstance(row, Row)]
    assert max(errors) <= TOLERANCE[dtype]


def test_a_peer_with_another_result_is_not_compared() -> None:
    def halved(problem: Problem) -> Contender:
        right = ours(problem)
        return replace(right, forward=lambda x_TH, ids_TK: right.forward(x_TH, ids_TK) / 2)

    problem = Problem.random(32, 128, 8, 2, "relu", torch.float32, CPU)
    assert check(halved, problem, problem.work(64, 0), 1e-4) == "gives another result: relative error 5.0e-01"


def test_rows_of_the_quick_run_are_complete(tmp_path: Path) -> None:
    rows = run_benchmark("peers", tmp_path, "--quick", "--threads", "1")
    assert len(rows) == 2 * (len(PEERS) - 1)
