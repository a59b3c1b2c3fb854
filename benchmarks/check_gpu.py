"""Is the Triton backend right on this GPU? Against brute force in fp32, at small shapes and at those that are timed.

    python -m benchmarks.check_gpu [--json FILE]

Also: the same bits in two runs, no wait for the device, and a CUDA graph of forward and backward; and models in use,
whose steps are replayed from CUDA graphs (check_graphs.py). What the interpreter cannot show, as it has no bf16 and no
tensor cores. Ends with status 1 if something is wrong.
"""

import math
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

import torch
from torch import Tensor

from benchmarks.row import Row
from benchmarks.table import parser_for, report
from ssd_megatron.ffn.bank import NeuronBank
from ssd_megatron.ffn.kernels import sparse_ffn
from ssd_megatron.ffn.kernels.decode import MOST_TOKENS
from ssd_megatron.ffn.kernels.triton_decode import best_experts, few_tokens_ffn

DEVICE = torch.device("cuda")
TOLERANCE = {torch.bfloat16: 1.5e-2, torch.float16: 4e-3, torch.float32: 1e-5}


@dataclass(frozen=True)
class Case:
    """`skew`: how unevenly experts are chosen. `elsewhere`: share of the copies that are computed on another rank.
    `scaled`: outputs are multiplied by gates, which are random."""

    tokens: int
    hidden: int
    size: int
    experts: int
    top_k: int
    activation: str = "relu"
    dtype: torch.dtype = torch.bfloat16
    add_bias: bool = False
    skew: float = 0.0
    elsewhere: float = 0.0
    scaled: bool = False


CASES = (
    Case(2048, 2048, 512, 16, 4),
    Case(2048, 2048, 256, 32, 8),
    Case(2048, 2048, 128, 64, 16),
    Case(2048, 4096, 512, 8, 2),
    Case(3000, 2048, 256, 32, 8, skew=2.0, elsewhere=0.3),
    Case(3000, 2048, 256, 8, 1, skew=50.0),
    Case(1500, 1024, 128, 16, 4, "squared_relu", add_bias=True),
    Case(1500, 1024, 128, 16, 4, "reglu", add_bias=True),
    Case(1500, 1024, 128, 16, 4, "gelu", torch.float16),
    Case(1000, 768, 96, 32, 5, "swiglu", elsewhere=0.5),
    Case(1500, 1024, 128, 16, 4, "swiglu", add_bias=True, elsewhere=0.3, scaled=True),
    Case(777, 520, 72, 10, 3, "relu", torch.float32, add_bias=True),
    Case(1, 1024, 128, 16, 4),
    Case(2, 2048, 256, 32, 8, "geglu_tanh", add_bias=True),
    Case(2, 520, 72, 10, 3, "relu", torch.float32, add_bias=True),
)


class Problem:
    """A case's tensors, from a seed."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(0)
        self.case = case
        bank = NeuronBank(case.hidden, case.size * case.experts, case.activation, case.add_bias, dtype=case.dtype)
        self.bank = bank.to(DEVICE)
        with torch.no_grad():
            for parameter in self.bank.parameters():
                parameter.normal_(std=case.hidden**-0.5)
        self.x = torch.randn(case.tokens, case.hidden, device=DEVICE).to(case.dtype).requires_grad_()
        self.dy = torch.randn(case.tokens, case.hidden, device=DEVICE).to(case.dtype)
        scores = torch.randn(case.tokens, case.experts) + case.skew * torch.randn(case.experts)
        ids = scores.topk(case.top_k, dim=1).indices
        ids[torch.rand(ids.shape) < case.elsewhere] = -1
        self.ids = ids.to(DEVICE)
        gates = torch.rand(ids.shape) if case.scaled else torch.ones(ids.shape)
        self.gates = gates.to(DEVICE).requires_grad_()

    def run(self, backend: str) -> dict[str, Tensor]:
        """Output and gradients."""
        leaves = {"x": self.x, "gates": self.gates, **self.bank.neuron_parameters()}
        case, bank = self.case, self.bank
        y = sparse_ffn(
            self.x, self.ids, self.gates, bank.tensors(), bank.activation, case.experts, backend, case.scaled
        )
        return {"y": y, **dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), self.dy), strict=True))}

    def in_fp32(self) -> "Problem":
        """The same values, exactly."""
        self.bank.float()
        self.x, self.dy = self.x.detach().float().requires_grad_(), self.dy.float()
        return self


def unequal(a: dict[str, Tensor], b: dict[str, Tensor]) -> int:
    return sum(not torch.equal(a[name], b[name]) for name in a)


def relative_error(found: Tensor, exact: Tensor) -> float:
    return ((found.float() - exact).norm() / exact.norm().clamp(min=1e-30)).item()


@torch.no_grad()
def decoded(problem: Problem) -> tuple[Tensor, int]:
    """What the kernels for one or two tokens give, and how many tokens get others than the experts of best score."""
    case, bank = problem.case, problem.bank
    y = few_tokens_ffn(problem.x, problem.ids, bank.tensors(), bank.activation, case.experts)
    rows = torch.randn(case.experts, case.hidden, device=DEVICE).to(case.dtype)
    best = (problem.x.float() @ rows.float().t()).topk(case.top_k).indices.sort().values
    ids = best_experts(problem.x, rows, None, case.top_k).sort().values
    return y, int((ids != best).any(dim=1).sum())


def check(case: Case) -> list[Row]:
    """Numbers of tensors that are not what they must be, and the largest relative error of any."""
    torch.backends.cuda.matmul.allow_tf32 = False
    problem = Problem(case)
    first, second = problem.run("triton"), problem.run("triton")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    problem.run("triton")
    torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = problem.run("triton")
    graph.replay()
    found = [
        Row(f"{case}: tensors that differ between two runs", unequal(first, second), 0.0, 0.0),
        Row(f"{case}: tensors that differ in a CUDA graph", unequal(first, captured), 0.0, 0.0),
    ]
    if case.tokens <= MOST_TOKENS:
        first["y by the kernels of a token"], mistaken = decoded(problem)
        found.append(Row(f"{case}: tokens whose experts are not the best ones", mistaken, 0.0, 0.0))
    wanted = problem.in_fp32().run("reference")
    errors = {name: relative_error(mine, wanted[name.split()[0]]) for name, mine in first.items()}
    worst = max(errors, key=lambda name: (errors[name] != errors[name], errors[name]))  # NaN is the worst of all
    return [*found, Row(f"{case}: largest relative error, {worst}", errors[worst], TOLERANCE[case.dtype], 0.0)]


def check_models() -> list[Row]:
    from benchmarks import check_graphs  # what that needs beside torch and triton need not be there for the cases

    return list(check_graphs.rows())


def rows() -> Iterator[Row]:
    """Cases in processes of their own, several at a time: most of it is compiling."""
    with ProcessPoolExecutor(min(len(CASES), max(1, (os.cpu_count() or 2) // 2)), get_context("spawn")) as pool:
        models = pool.submit(check_models)  # the longest one first
        cases = [(str(case), pool.submit(check, case)) for case in CASES]
        for name, running in [*cases, ("models in use", models)]:
            if (failure := running.exception()) is None:
                yield from running.result()
            else:
                yield Row(f"{name}: {type(failure).__name__}: {failure}", math.inf, 0.0, 0.0)


def main() -> None:
    arguments = parser_for(__doc__, quick=False).parse_args()
    sys.exit(0 if report("the Triton backend beside brute force", rows(), arguments.json) else 1)


if __name__ == "__main__":
    main()
