"""Speed of the sparse feed-forward network on a GPU in bf16: forward and backward, beside dense and torch's grouped_mm.

    python -m benchmarks.ffn_gpu [--quick] [--json FILE] [--profile FILE]

Every row is a ratio from one process, better when lower. The variants take turns, timed with CUDA events; each turn has
inputs and so a routing of its own. `ideal` is the roofline of an H200 (790 TFLOP/s, 4.3 TB/s) where there is one.
"""

import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from benchmarks.row import Row
from benchmarks.table import parser_for, report
from benchmarks.timing import paired
from ssd_megatron.ffn.bank import NeuronBank
from ssd_megatron.ffn.kernels import sparse_ffn
from ssd_megatron.ffn.routers import Router, router_weights_from_bank

DEVICE = torch.device("cuda")
TURNS = 21
WARM_UP = 4
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Case:
    """One network with a quarter of its experts for each token, and the ratio to dense that it must reach."""

    hidden: int
    neurons: int
    experts: int
    goal: float
    ideal: float
    tokens: int = 16384
    activation: str = "relu"

    def __str__(self) -> str:
        size, name = self.neurons // self.experts, f"h {self.hidden}, d_ff {self.neurons}"
        return f"{name}, {self.experts} experts of {size}" + f", {self.activation}" * (self.activation != "relu")


QUICK_CASES = (Case(2048, 8192, 32, goal=0.40, ideal=0.317),)
CASES = (
    Case(2048, 8192, 16, goal=0.36, ideal=0.287),
    *QUICK_CASES,
    Case(2048, 8192, 64, goal=0.60, ideal=0.524),
    Case(4096, 16384, 32, goal=0.34, ideal=0.283),
)


class Network:
    """One network's parameters, and the variants of its forward pass."""

    def __init__(self, case: Case) -> None:
        torch.manual_seed(0)
        self.case = case
        self.bank = NeuronBank(case.hidden, case.neurons, case.activation, False, dtype=DTYPE, device=DEVICE)
        self.router = Router(
            case.hidden, case.experts, case.experts // 4, "straight_through", dtype=DTYPE, device=DEVICE
        )
        with torch.no_grad():
            for w_FH in self.bank.neuron_parameters().values():
                w_FH.normal_(std=case.hidden**-0.5)
            self.router.weight.copy_(router_weights_from_bank(self.bank.rows(), case.experts))
        self.parameters = [*self.bank.parameters(), self.router.weight]

    def dense(self, x: Tensor) -> Tensor:
        """As dense mode computes it."""
        tensors = self.bank.tensors()
        return tensors.hidden(self.bank.activation.act(F.linear(x, *tensors.firing)), x) @ tensors.w_out

    def plain_dense(self, x: Tensor) -> Tensor:
        """Two linear layers as one would write them."""
        return F.linear(F.relu(F.linear(x, self.bank.w_in)), self.bank.w_out.t())

    def sparse(self, backend: str) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            routing, bank = self.router.route(x), self.bank
            return sparse_ffn(routing.x_TH, *routing[:2], bank.tensors(), bank.activation, self.case.experts, backend)

        return run

    def kernels(self, backend: str, x: Tensor) -> Callable[[Tensor], Tensor]:
        """The sparse network with the experts of these inputs chosen beforehand."""
        ids, bank = self.router.route(x.detach()).expert_ids_TK, self.bank
        gates = torch.ones(ids.shape, device=DEVICE, requires_grad=True)
        return lambda x: sparse_ffn(x, ids, gates, bank.tensors(), bank.activation, self.case.experts, backend)

    def grouped_mm(self, x: Tensor) -> Tensor:
        """What PyTorch offers, well put together: sorted copies, grouped matmuls, sums without atomics."""
        ids, *_ = self.router.route(x)
        sorted_ids, order = ids.flatten().sort(stable=True)
        ends = torch.searchsorted(sorted_ids, torch.arange(self.case.experts, device=DEVICE), right=True).int()
        row_of_copy = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=DEVICE))
        token_C, row_TK = order // ids.shape[1], row_of_copy.view(ids.shape)
        w_in, w_out = (w.view(self.case.experts, -1, w.shape[1]) for w in (self.bank.w_in, self.bank.w_out))
        rows = _expand(x, token_C, row_TK)
        return _collect(F.grouped_mm(F.relu(F.grouped_mm(rows, w_in.mT, offs=ends)), w_out, offs=ends), token_C, row_TK)


class _Expand(torch.autograd.Function):
    """A row for every copy of a token."""

    @staticmethod
    def forward(ctx: Any, x_TH: Tensor, token_C: Tensor, row_TK: Tensor) -> Tensor:
        ctx.save_for_backward(row_TK)
        return x_TH.index_select(0, token_C)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_CH: Tensor) -> tuple[Tensor, None, None]:
        (row_TK,) = ctx.saved_tensors
        return d_CH.index_select(0, row_TK.flatten()).view(*row_TK.shape, -1).sum(1), None, None


class _Collect(torch.autograd.Function):
    """The sum of each token's rows."""

    @staticmethod
    def forward(ctx: Any, y_CH: Tensor, token_C: Tensor, row_TK: Tensor) -> Tensor:
        ctx.save_for_backward(token_C)
        return y_CH.index_select(0, row_TK.flatten()).view(*row_TK.shape, -1).sum(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_TH: Tensor) -> tuple[Tensor, None, None]:
        (token_C,) = ctx.saved_tensors
        return d_TH.index_select(0, token_C), None, None


_expand: Callable[..., Tensor] = _Expand.apply
_collect: Callable[..., Tensor] = _Collect.apply


def inputs(case: Case) -> Tensor:
    return torch.randn(case.tokens, case.hidden, dtype=DTYPE, device=DEVICE).requires_grad_()


def milliseconds(run: Callable[[Tensor], Tensor], network: Network, x: Tensor, dy: Tensor | None) -> float:
    """One forward, and with `dy` one backward to all that the variant reads."""
    x.grad = None
    for parameter in network.parameters:
        parameter.grad = None
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(5_000_000)  # the host gets ahead: what is timed is the device
    start.record()
    y = run(x)
    if dy is not None:
        y.backward(dy)
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def kept_bytes(run: Callable[[Tensor], Tensor], network: Network, x: Tensor) -> int:
    """Float tensors that the forward pass keeps, besides inputs and parameters."""
    given = {t.data_ptr() for t in (x, *network.parameters)}
    kept: dict[int, int] = {}

    def note(t: Tensor) -> Tensor:
        if t.data_ptr() not in given and t.is_floating_point() and t.dim() == 2:
            kept[t.data_ptr()] = t.numel() * t.element_size()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        run(x)
    return sum(kept.values())


def compare(case: Case, turns: int) -> Iterator[Row]:
    from ssd_megatron.ffn.kernels.triton_routing import sort_copies  # benchmarks.ffn imports this file without triton

    network = Network(case)
    dy = torch.randn(case.tokens, case.hidden, dtype=DTYPE, device=DEVICE)
    times: dict[str, list[float]] = {}
    for turn in range(-WARM_UP, turns):
        x = inputs(case)
        variants = {
            "dense": network.dense,
            "kernels": network.kernels("triton", x),
            "plain dense": network.plain_dense,
            "triton": network.sparse("triton"),
            "grouped_mm": network.grouped_mm,
            "torch": network.sparse("torch"),
        }
        for name, run in variants.items():
            for part, gradient in (("", dy), (" forward", None)):
                taken = milliseconds(run, network, x, gradient)
                if turn >= 0:
                    times.setdefault(name + part, []).append(taken)
        ids = network.router.route(x.detach()).expert_ids_TK
        taken = milliseconds(lambda _, ids=ids: sort_copies(ids, case.experts).row_TK, network, x, None)
        if turn >= 0:
            times.setdefault("sort forward", []).append(taken)
    typical = {name: statistics.median(taken) for name, taken in times.items()}
    for name, taken in typical.items():
        print(f"        {taken:8.3f} ms  {case}: {name}", flush=True)
    dense = min(("dense", "plain dense"), key=lambda name: typical[name])
    flops = 12 * case.tokens * case.hidden * case.neurons
    speed = f"dense {typical[dense]:.2f} ms, {flops / typical[dense] / 1e9:.0f} TFLOP/s"
    ours = f"triton {typical['triton']:.2f} ms, {flops / 4 / typical['triton'] / 1e9:.0f} TFLOP/s"
    yield Row(f"{case} ({speed}; {ours}): sparse / dense", paired(times["triton"], times[dense]), case.goal, case.ideal)
    yield Row(f"{case}: its kernels alone / dense", paired(times["kernels"], times[dense]), case.goal, case.ideal)
    forward = paired(times["triton forward"], times[f"{dense} forward"])
    yield Row(f"{case}: sparse / dense, forward only", forward, case.goal + 0.02, case.ideal)
    yield Row(f"{case}: triton / grouped_mm", paired(times["triton"], times["grouped_mm"]), 0.65, 0.0)
    yield Row(f"{case}: triton / backend torch", paired(times["triton"], times["torch"]), 1.0, 0.0)
    yield Row(f"{case}: dense mode / plain layers", paired(times["dense"], times["plain dense"]), 1.02, 1.0)
    routing = [
        (whole - kernels + sort) / whole
        for whole, kernels, sort in zip(times["triton"], times["kernels"], times["sort forward"], strict=True)
    ]
    yield Row(f"{case}: router and sorting, share of sparse", statistics.median(routing), 0.05, 0.0)
    x = inputs(case)
    hidden = case.tokens * case.neurons // 4 * x.element_size()
    kept = kept_bytes(network.kernels("triton", x), network, x)
    yield Row(f"{case}: kept for the backward / outputs of the chosen neurons", kept / hidden, 1.0, 1.0)


def profile(case: Case, path: Path) -> None:
    """Time per kernel of three sparse steps."""
    network, x = Network(case), inputs(case)
    dy = torch.randn_like(x)
    run = network.sparse("triton")
    run(x).backward(dy)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(3):
            run(x).backward(dy)
        torch.cuda.synchronize()
    path.write_text(f"{case}\n{profiler.key_averages().table(sort_by='cuda_time_total', row_limit=40)}\n")


def rows(quick: bool) -> Iterator[Row]:
    for case in QUICK_CASES if quick else CASES:
        yield from compare(case, 9 if quick else TURNS)


def main() -> int:
    parser = parser_for(__doc__)
    parser.add_argument("--profile", type=Path, help="write the time of each kernel at one shape here")
    args = parser.parse_args()
    met = report("sparse feed-forward network", rows(args.quick), args.json)
    if args.profile:
        profile(QUICK_CASES[0], args.profile)
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
